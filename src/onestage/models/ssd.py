"""SSD: Single Shot MultiBox Detector (arXiv:1512.02325), on VGG16 or any other backbone."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from onestage.boxes.anchors import AnchorGrid, AnchorShapes, named_levels, ssd_shapes
from onestage.boxes.coders import DeltaBoxCoder
from onestage.boxes.matchers import BestAnchors, IoUMatcher
from onestage.boxes.nms import Selection
from onestage.errors import require
from onestage.losses.box import BoxLoss, SmoothL1Loss
from onestage.losses.classification import ClassificationLoss, SoftmaxClassificationLoss
from onestage.losses.focal import SigmoidFocalLoss
from onestage.losses.normaliser import PositiveNormaliser
from onestage.models.detector import AnchorDetector, Backbone
from onestage.models.heads import AnchorHead, ExtraLayer, ExtraLayers
from onestage.models.vgg import PIXEL_STD, VGG
from onestage.models.weights import load_published, load_vgg16, torchvision_ssd300

AnchorTable = Literal["voc", "coco"]


def ssd_levels(
    strides: Sequence[float], sizes: Sequence[float], aspect_ratios: Sequence[float] | None = None
) -> tuple[AnchorShapes, ...]:
    """Return a table of anchors in the paper's form.

    strides: of three levels or more, px. sizes: s_k of each level and the next size of the last, px. aspect_ratios: of
    all levels; None: the paper's, 2, and 3 on all levels but the first and last two.
    """
    papers = [(2,), *[(2, 3)] * (len(strides) - 3), (2,), (2,)]
    rows = zip(strides, sizes[:-1], sizes[1:], [aspect_ratios] * len(strides) if aspect_ratios else papers, strict=True)
    return tuple(AnchorShapes(stride, ssd_shapes(size, following, ratios)) for stride, size, following, ratios in rows)


class SSD(AnchorDetector):
    """Single-shot detector on feature maps of several strides; the subclasses fix the size of the input.

    Args:
        num_classes: K, without the background.
        classification_loss: owns the link between logits and scores. None: SigmoidFocalLoss().
        box_loss: None: SmoothL1Loss().
        image_size: side of the square input, px; only the published size (None) is accepted.
        anchors: a table of the paper (COCO's objects are smaller), or one `AnchorShapes` for each feature map, finest
            first, as `onestage anchors` proposes them.
        backbone: maps of `backbone_strides`, such as onestage.models.TorchvisionBackbone; None: the paper's.
        backbone_weights: IMAGENET1K_FEATURES, the path of a VGG16's state dict, or None for random weights.
        pretrained: torchvision_coco or the path of a state dict of torchvision's ssd300_vgg16 or, for SSDLite320, its
            ssdlite320_mobilenet_v3_large, with MinedCrossEntropy and anchors "coco"; it replaces all weights.
        prior: score of every anchor before training, in (0, 1); with a softmax that of all classes together.
            RetinaNet's pi.
        positive_iou: overlap that makes an anchor positive, in (0, 1].
        negative_iou: overlap below which it is background, in (0, positive_iou].
        best_anchors: the rule for the best anchors of an object, one or ties; see `IoUMatcher`.
        min_best_iou: with less overlap an object does not keep its best anchor, in [0, positive_iou].
        normaliser_momentum: of the running mean of positives that divides the losses, in [0, 1); 0: each batch's own.
        score_threshold: detections score more than this, in [0, 1).
        nms_threshold: overlap by more than this suppresses the lower score of a class, in [0, 1].
        candidates_per_class: boxes of a class that enter suppression, >= 1.
        max_detections: D, >= 1.
    """

    image_size: int
    anchor_tables: ClassVar[Mapping[str, Sequence[AnchorShapes]]]
    extra_layers: ClassVar[Sequence[ExtraLayer]]
    backbone_strides: tuple[int, int] = (8, 16)
    neck_class: type[ExtraLayers] = ExtraLayers
    head_class: type[AnchorHead] = AnchorHead

    def __init__(
        self,
        num_classes: int,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        image_size: int | None = None,
        anchors: AnchorTable | list[AnchorShapes] = "voc",
        backbone: Backbone | None = None,
        backbone_weights: str | None = None,
        pretrained: str | None = None,
        prior: float = 0.01,
        positive_iou: float = 0.5,
        negative_iou: float = 0.5,
        best_anchors: BestAnchors = "one",
        min_best_iou: float = 0.0,
        normaliser_momentum: float = 0.0,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        candidates_per_class: int = 400,
        max_detections: int = 200,
    ) -> None:
        name, side = type(self).__name__, type(self).image_size
        remedy = f"Set data.image_size: {side} (of data.resize its own size), or choose another model.detector."
        require(image_size in (None, side), f"{name}: image_size", image_size, str(side), remedy)
        require(num_classes >= 1, f"{name}: num_classes", num_classes, ">= 1")
        require(0 < prior < 1, f"{name}: prior", prior, "in (0, 1)", "RetinaNet's is 0.01.")
        levels = named_levels(f"{name}: anchors", anchors, self.anchor_tables)
        tables = (next(iter(self.anchor_tables.values())), levels)
        strides, given = ([level.stride for level in table] for table in tables)
        fits = len(given) == len(strides) and all(abs(a - b) < 0.01 for a, b in zip(given, strides, strict=True))
        require(fits, f"{name}: anchors, strides", given, f"{strides}, one level for each feature map")
        is_own_backbone = backbone is None
        backbone, loss = backbone or self.make_backbone(), classification_loss or SigmoidFocalLoss()
        fits, rule = backbone.strides == self.backbone_strides, str(self.backbone_strides)
        require(fits, f"{name}: strides of the backbone", backbone.strides, rule)
        neck = self.neck_class(backbone.out_channels, self.extra_layers)
        anchors_per_cell, box_coder = [len(level.shapes) for level in levels], DeltaBoxCoder((0.1, 0.2))
        box_head = self.head_class(neck.out_channels, anchors_per_cell, box_coder.num_outputs)
        class_head = self.head_class(neck.out_channels, anchors_per_cell, loss.num_logits(num_classes))
        class_head.start_at_prior(loss.prior_bias(num_classes, prior))
        super().__init__(
            num_classes,
            backbone=backbone,
            neck=neck,
            class_head=class_head,
            box_head=box_head,
            anchor_grid=AnchorGrid(levels, max_side=side),
            classification_loss=loss,
            box_loss=box_loss or SmoothL1Loss(),
            box_coder=box_coder,
            matcher=IoUMatcher(positive_iou, negative_iou, best_anchors, min_best_iou),
            normaliser=PositiveNormaliser(normaliser_momentum),
            selection=Selection(score_threshold, nms_threshold, max_detections, candidates_per_class),
        )
        is_vgg16 = isinstance(backbone, VGG) and backbone.is_vgg16
        if pretrained is not None:
            place, found = f"pretrained: {pretrained}", f"{name}, {anchors}, {type(loss).__name__}"
            rule = "torchvision's: SSD300 or SSDLite320, coco, a softmax"
            remedy = "Set anchors: coco and classification_loss: onestage.losses.MinedCrossEntropy, or pretrained: null"
            fits = is_own_backbone and isinstance(loss, SoftmaxClassificationLoss) and anchors == "coco"
            fits &= type(self).published_state is not SSD.published_state
            require(fits, f"{place}: detector", found, rule, remedy)
            load_published(self, pretrained)
        elif backbone_weights is not None:
            place, rule = f"backbone_weights: {backbone_weights}: backbone of {name}", "VGG16 without batch norm"
            remedy = "Set backbone_weights: null, or choose SSD300 or SSD512 without another backbone."
            require(is_vgg16, place, type(backbone).__name__, rule, remedy)
            load_vgg16(backbone, backbone_weights, PIXEL_STD)

    def make_backbone(self) -> Backbone:
        """Return the network of the first two feature maps, with random weights."""
        return VGG()


# Sizes of the anchors: the Caffe code of the paper (examples/ssd/ssd_{pascal,coco}*.py) spaces s_k evenly from s_min
# (VOC 0.20 at 300, 0.15 at 512; COCO 0.15, 0.10) to 0.90 of the image in whole percent, continues one step for the
# last next size, and gives conv4_3 a size of its own below s_min.


class SSD300(SSD):
    """SSD300: 8732 anchors on maps of 38, 19, 10, 5, 3 and 1 cells. VOC07 77.2 mAP, COCO 25.1 (SSD table 6)."""

    image_size = 300
    _strides = (8, 16, 32, 64, 100, 300)
    anchor_tables: ClassVar = {
        "voc": ssd_levels(_strides, (30, 60, 111, 162, 213, 264, 315)),
        "coco": ssd_levels(_strides, (21, 45, 99, 153, 207, 261, 315)),
    }
    _unpadded = ExtraLayer(128, 256, stride=1, padding=0)
    extra_layers: ClassVar = (ExtraLayer(256, 512), ExtraLayer(128, 256), _unpadded, _unpadded)  # conv8_2 to conv11_2

    def published_state(self, key: str, value: str) -> Mapping[str, Tensor]:
        """Return the weights of torchvision's ssd300_vgg16; see `torchvision_ssd300`."""
        return torchvision_ssd300(key, value, PIXEL_STD)


class SSD512(SSD):
    """SSD512: 24564 anchors on maps of 64, 32, 16, 8, 4, 2 and 1 cells. VOC07 79.8 mAP, COCO 28.8."""

    image_size = 512
    _strides = (8, 16, 32, 64, 128, 256, 512)
    anchor_tables: ClassVar = {
        "voc": ssd_levels(_strides, (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.6)),
        "coco": ssd_levels(_strides, (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72)),
    }
    _last = ExtraLayer(128, 256, kernel_size=4)  # 2 cells, padded to 4, give 1
    extra_layers: ClassVar = (ExtraLayer(256, 512), *[ExtraLayer(128, 256)] * 3, _last)


# Ours, not published: small SSDs for CPUs, which train from random weights. One table of anchors serves both names.
# The drawn shapes measure 12 to 76 px at 128 px and are at most 1.5 times as long as wide. The anchors of SSD128 and
# SSD256 are small for their maps: a finer map gives tighter boxes (docs/data/shapes_recipe.csv).


class SSD160(SSD):
    """A small SSD: 2390 anchors on maps of 20, 10, 5, 3 and 1 cells, a narrow VGG11 with batch norm."""

    image_size = 160
    _levels = ssd_levels((8, 16, 32, 53, 160), (16, 32, 68.8, 105.6, 142.4, 179.2))  # s_min 0.20, and 0.10 below it
    anchor_tables: ClassVar = {"voc": _levels, "coco": _levels}
    extra_layers: ClassVar = (ExtraLayer(64, 128), ExtraLayer(64, 128), ExtraLayer(64, 128, stride=1, padding=0))

    def make_backbone(self) -> VGG:
        """Return configuration A of VGG at a quarter of its widths."""
        return VGG((1, 1, 2, 2, 2), (16, 32, 64, 128, 128), fc_width=256, fc6_dilation=2, batch_norm=True)


class SSD128(SSD):
    """The smallest SSD, for the drawn shapes: 1344 anchors on maps of 16, 8 and 4 cells."""

    image_size = 128
    _levels = ssd_levels((8, 16, 32), (17, 38, 72, 112), (1.5,))
    anchor_tables: ClassVar = {"voc": _levels, "coco": _levels}
    extra_layers: ClassVar = (ExtraLayer(64, 128),)

    def make_backbone(self) -> VGG:
        """Return a VGG of few narrow layers, with stride 2 in the first one."""
        widths = (16, 24, 64, 128, 128)
        return VGG((1, 1, 1, 1, 1), widths, fc_width=128, fc6_dilation=2, batch_norm=True, stem_stride=2)


class SSD256(SSD):
    """A small SSD for the drawn shapes on maps of 16, 8 and 4 cells, as SSD128, but images of twice the size.

    One more pooling and two more convolutions: nine points of mAP in as many steps (docs/data/shapes_recipe.csv).
    """

    image_size = 256
    _levels = ssd_levels((16, 32, 64), (34, 76, 144, 224), (1.5,))
    anchor_tables: ClassVar = {"voc": _levels, "coco": _levels}
    extra_layers: ClassVar = (ExtraLayer(64, 128),)
    backbone_strides = (16, 32)

    def make_backbone(self) -> VGG:
        """Return a narrow VGG with stride 2 in the first layer, and two layers in stages 3 and 4."""
        widths = (16, 32, 64, 128, 128)
        return VGG((1, 1, 2, 2, 1), widths, 128, fc6_dilation=2, batch_norm=True, stem_stride=2, strides=(16, 32))
