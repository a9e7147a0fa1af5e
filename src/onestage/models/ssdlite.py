"""SSDLite (arXiv:1801.04381, section 6.2) on MobileNetV3-Large (arXiv:1905.02244), for phones and CPUs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, cast

from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights
from torchvision.ops import Conv2dNormActivation

from onestage.models.detector import Backbone
from onestage.models.heads import AnchorHead, ExtraLayer, ExtraLayers, initialise
from onestage.models.ssd import SSD, ssd_levels
from onestage.models.weights import torchvision_weights

PIXEL_MEAN_AND_STD = 127.5  # images of -1..1
BATCH_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)  # torchvision's; the papers give neither
NORMAL = partial(nn.init.normal_, std=0.03)  # the weights of all convolutions
RELU6_BLOCK = partial(Conv2dNormActivation, norm_layer=BATCH_NORM, activation_layer=nn.ReLU6)


class MobileNetV3(Backbone):
    """MobileNetV3-Large with its last blocks at half their width (section 6.3): 672 and 480 channels."""

    def __init__(self) -> None:
        super().__init__((672, 480), (16, 32), (PIXEL_MEAN_AND_STD,) * 3, (PIXEL_MEAN_AND_STD,) * 3)
        blocks = mobilenet_v3_large(norm_layer=BATCH_NORM, reduced_tail=True).features
        block = cast(nn.Sequential, blocks.get_submodule("13.block"))  # C4 is what this block of stride 2 expands
        to_c4, to_c5 = nn.Sequential(*list(blocks)[:13], block[0]), nn.Sequential(block[1:], *list(blocks)[14:])
        self.parts = nn.ModuleList([to_c4, to_c5])
        initialise(self, NORMAL)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return C4 (stride 16) and C5 (stride 32) of normalised images, [B, 3, H, W] float."""
        c4 = self.parts[0](images)
        return [c4, self.parts[1](c4)]


class LiteLayers(ExtraLayers):
    """SSDLite's neck: SSD's extra feature maps by depthwise separable convolutions. See `ExtraLayers`."""

    def make_block(self, in_channels: int, layer: ExtraLayer) -> nn.Module:
        """Return a reduction, a depthwise convolution, and an expansion, each with batch norm and ReLU6."""
        reduced = layer.reduced_channels
        depthwise = RELU6_BLOCK(reduced, reduced, layer.kernel_size, layer.stride, groups=reduced)
        block = [RELU6_BLOCK(in_channels, reduced, 1), depthwise, RELU6_BLOCK(reduced, layer.out_channels, 1)]
        return initialise(nn.Sequential(*block), NORMAL)


class LiteHead(AnchorHead):
    """SSD's head with a depthwise 3 x 3 and a 1 x 1 convolution per level. See `AnchorHead`."""

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_outputs: int) -> None:
        super().__init__(in_channels, anchors_per_cell, num_outputs, kernel_size=1)
        depthwise = (RELU6_BLOCK(channels, channels, 3, groups=channels) for channels in in_channels)
        self.levels = nn.ModuleList(map(nn.Sequential, depthwise, self.levels))
        initialise(self, NORMAL)


class SSDLite320(SSD):
    """SSDLite320 on MobileNetV3-Large: 3234 anchors, 3.4 M parameters. COCO 21.3 mAP (torchvision).

    Its last map is one cell, so batch norm trains only with two images or more.
    torchvision evaluates with score_threshold 0.001, nms_threshold 0.55, candidates_per_class 300, max_detections 300.
    """

    image_size = 320
    backbone_strides = (16, 32)
    neck_class = LiteLayers
    head_class = LiteHead
    _sizes = (*(320 * (0.2 + 0.15 * level) for level in range(6)), 320)  # s_min 0.2 and s_max 0.95 of the image
    _levels = ssd_levels((16, 32, 64, 320 / 3, 160, 320), _sizes, (2, 3))
    anchor_tables: ClassVar = {"voc": _levels, "coco": _levels}
    extra_layers: ClassVar = (ExtraLayer(256, 512), ExtraLayer(128, 256), ExtraLayer(128, 256), ExtraLayer(64, 128))

    def make_backbone(self) -> MobileNetV3:
        """Return the network of the first two feature maps, with random weights."""
        return MobileNetV3()

    def published_state(self, key: str, value: str) -> Mapping[str, Tensor]:
        """Return the weights of torchvision's ssdlite320_mobilenet_v3_large."""
        return torchvision_weights(self, key, value, SSDLite320_MobileNet_V3_Large_Weights.COCO_V1)
