"""VGG (arXiv:1409.1556): the feature maps of stage 4 and fc7 for SSD, and of stage 5 for pyramids."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.errors import require
from onestage.models.detector import Backbone

PIXEL_MEAN = (0.48235 * 255, 0.45882 * 255, 0.40784 * 255)  # RGB, of the Caffe VGG16: 123, 117, 104
# Near ImageNet's deviation, 58. The Caffe VGG16 divides by 1, so its first layer is multiplied by this number on
# loading: a power of two, which leaves every bit of the features as it is.
PIXEL_STD = 64.0


class L2Norm(nn.Module):
    """Scale the features of each cell to a learnt length, 20 at first. ParseNet section 3.3 (arXiv:1506.04579)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, C, H, W]; float32 inside, because the sum of squares overflows float16."""
        normalised = F.normalize(features.float(), dim=1)
        return (normalised * self.weight.float().view(1, -1, 1, 1)).to(features.dtype)


class VGG(Backbone):
    """Five stages of a VGG, then SSD's pool5, and fc6 and fc7 as dilated convolutions (SSD section 3).

    Args:
        depths: convolutions of the five stages; the default is configuration D, VGG16.
        widths: channels of the five stages.
        fc_width: channels of fc6 and fc7.
        fc6_dilation: of the 3 x 3 kernel of fc6; 6 fits a map of 19 cells, a smaller map needs less.
        batch_norm: after each convolution, as in torchvision's vgg16_bn; the published SSD has none.
        stem_stride: of the first convolution, 1 or 2; 2 replaces the first pooling, so that no stage has the full size.
        strides: of the feature maps, px: (8, 16) with SSD's pool5, which keeps the size, or (8, 16, 32) with VGG's own,
            and with stage 5 between the maps of stage 4 and fc7; (16, 32) keeps the first pooling beside a stem of 2.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 3, 3, 3),
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        fc_width: int = 1024,
        fc6_dilation: int = 6,
        batch_norm: bool = False,
        stem_stride: int = 1,
        strides: tuple[int, ...] = (8, 16),
    ) -> None:
        require(len(depths) == len(widths) == 5, "VGG: depths, widths", (depths, widths), "five numbers each")
        require(stem_stride in (1, 2), "VGG: stem_stride", stem_stride, "1 or 2")
        is_known = strides in ((8, 16), (8, 16, 32)) or (strides == (16, 32) and stem_stride == 2)
        require(is_known, "VGG: strides", strides, "(8, 16), (8, 16, 32), or (16, 32) with stem_stride 2")
        out_channels = (*widths[3 : len(strides) + 2], fc_width)
        super().__init__(out_channels, strides, PIXEL_MEAN, (PIXEL_STD,) * 3)
        self.is_vgg16 = tuple(depths) == (2, 2, 3, 3, 3) and not batch_norm
        layers: dict[str, nn.Module] = {}
        in_channels = 3
        pooled_stages = (1, 2, 3) if stem_stride == 1 or strides == (16, 32) else (2, 3)
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            for position in range(1, depth + 1):
                # 300 -> 150 -> 75 -> 38: the third pool rounds up, or conv4_3 would have 37 x 37 cells.
                is_pooled = position == depth and stage in pooled_stages
                pool = nn.MaxPool2d(2, 2, ceil_mode=stage == 3) if is_pooled else None
                stride = stem_stride if in_channels == 3 else 1
                layers |= _conv_layers(f"conv{stage}_{position}", in_channels, width, batch_norm, pool, stride=stride)
                in_channels = width
            if stage == 4:
                layers["pool4"] = nn.MaxPool2d(2, 2)
        layers["pool5"] = nn.MaxPool2d(3, 1, padding=1) if len(strides) == 2 else nn.MaxPool2d(2, 2)
        layers |= _conv_layers("fc6", in_channels, fc_width, batch_norm, dilation=fc6_dilation)
        layers |= _conv_layers("fc7", fc_width, fc_width, batch_norm, kernel_size=1)
        for name in ("fc6", "fc7"):
            nn.init.xavier_uniform_(layers[name].get_parameter("weight"))  # as all new layers of SSD (section 3)
        split = list(layers).index("pool4")
        self.to_conv4 = nn.Sequential(OrderedDict(list(layers.items())[:split]))
        self.to_fc7 = nn.Sequential(OrderedDict(list(layers.items())[split:]))
        self._pool5 = list(layers).index("pool5") - split
        self.conv4_norm = L2Norm(widths[3])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return stage 4 (L2-normalised), stage 5 if it is a map, and fc7 of normalised images [B, 3, H, W]."""
        conv4 = self.to_conv4(images)
        if len(self.strides) == 2:
            return [self.conv4_norm(conv4), self.to_fc7(conv4)]
        conv5 = self.to_fc7[: self._pool5](conv4)
        return [self.conv4_norm(conv4), conv5, self.to_fc7[self._pool5 :](conv5)]

    def freezable_stages(self) -> Sequence[Sequence[nn.Module]]:
        """Return the convolutions, with their batch norms, of the five stages."""
        layers = [*self.to_conv4.named_children(), *self.to_fc7.named_children()]
        return [[layer for name, layer in layers if name.startswith(f"conv{n}_")] for n in range(1, 6)]


def _conv_layers(
    name: str,
    in_channels: int,
    out_channels: int,
    batch_norm: bool,
    pool: nn.MaxPool2d | None = None,
    kernel_size: int = 3,
    **settings: Any,
) -> dict[str, nn.Module]:
    """Return a padded convolution, its pool and its batch norm if any, and its ReLU, by name.

    The pool comes first: the ReLU of the largest value is the largest ReLU, at a quarter of the work. A batch norm then
    sees the maxima, with which the drawn shapes are learnt better too (docs/data/shapes_recipe.csv).
    """
    padding = settings.get("dilation", 1) * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=not batch_norm, **settings)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layers: dict[str, nn.Module] = {name: conv}
    if pool is not None:
        layers[f"{name}_pool"] = pool
    if batch_norm:
        layers[f"{name}_bn"] = nn.BatchNorm2d(out_channels)
    return {**layers, f"{name}_relu": nn.ReLU(inplace=True)}
