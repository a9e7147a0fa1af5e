"""RetinaNet (arXiv:1708.02002) on a feature pyramid (arXiv:1612.03144) of ResNet-50 or any other backbone."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from onestage.boxes.anchors import AnchorGrid, AnchorShapes, pyramid_shapes
from onestage.boxes.coders import DeltaBoxCoder
from onestage.boxes.matchers import IoUMatcher
from onestage.boxes.nms import Selection
from onestage.errors import require
from onestage.losses.box import BoxLoss, L1Loss
from onestage.losses.classification import ClassificationLoss, SigmoidClassificationLoss
from onestage.losses.focal import SigmoidFocalLoss
from onestage.losses.normaliser import PositiveNormaliser
from onestage.models.backbone import TorchvisionBackbone
from onestage.models.detector import AnchorDetector, Backbone
from onestage.models.heads import by_anchor, initialise, start_at
from onestage.models.weights import TORCHVISION_COCO, load_published, torchvision_weights

STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7, px
ANCHOR_SCALE = 4.0  # side of a level's smallest square anchor in strides (section 4: 32 to 512 px on P3 to P7)


class FPN(nn.Module):
    """RetinaNet's neck: P3 to P5 from three maps of a backbone, P6 and P7 by strided convolutions (section 4).

    Args:
        in_channels: channels of the backbone's maps, C3 to C5, finest first.
        channels: of every level.
        p6_from: the map that P6 is computed from: "p5" (torchvision, detectron2's later models) or "c5" (the paper).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, p6_from: Literal["p5", "c5"] = "p5") -> None:
        super().__init__()
        self.p6_from = p6_from
        self.laterals = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.smoothing = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        initialise(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps [B, channels, H_l, W_l] of all levels, finest first, from those of the backbone."""
        merged = [lateral(features) for lateral, features in zip(self.laterals, feature_maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):  # top-down
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[-2:])
        levels = [smooth(features) for smooth, features in zip(self.smoothing, merged, strict=True)]
        levels.append(self.p6(feature_maps[-1] if self.p6_from == "c5" else levels[-1]))
        return [*levels, self.p7(levels[-1].relu())]


def pyramid_backbone(name: str, backbone: Backbone | None) -> Backbone:
    """Return a ResNet-50 with random weights, or the given backbone; ConfigError if it has other maps than C3 to C5."""
    backbone = backbone or TorchvisionBackbone("resnet50", STRIDES[:3])
    remedy = "Set strides: [8, 16, 32] in the init_args of the backbone."
    place, fits = f"{name}: strides of the backbone", backbone.strides == STRIDES[:3]
    require(fits, place, backbone.strides, "(8, 16, 32)", remedy)
    return backbone


class SharedHead(nn.Module):
    """RetinaNet's head: a tower of 3 x 3 convolutions and the outputs, with the same weights for all levels.

    Section 4 (arXiv:1708.02002); group normalisation, with 32 groups, is torchvision's second version.

    tower_convs: each with a ReLU. tower_bias: whether they have biases; None: only without group normalisation.
    """

    def __init__(
        self,
        channels: int,
        tower_convs: int,
        anchors_per_cell: int,
        group_norm: bool,
        num_outputs: int,
        tower_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        norm = partial(nn.GroupNorm, 32) if group_norm else None
        self.tower = nn.Sequential(
            *[Conv2dNormActivation(channels, channels, norm_layer=norm, bias=tower_bias) for _ in range(tower_convs)]
        )
        self.output = nn.Conv2d(channels, anchors_per_cell * num_outputs, 3, padding=1)
        initialise(self, partial(nn.init.normal_, std=0.01))

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Return [B, A, num_outputs] float32 of maps [B, channels, H_l, W_l], in the order of `AnchorGrid`."""
        return by_anchor([self.output(self.tower(features)) for features in feature_maps], self.num_outputs)


class RetinaNet(AnchorDetector):
    """RetinaNet: FPN P3-P7, nine anchors per cell, two shared four-layer towers. COCO 36.4 to 41.5 mAP (torchvision).

    The defaults are torchvision's first version; its second has `p6_from: c5`, `group_norm: true` and GIoULoss.

    Args:
        num_classes: K, without the background.
        classification_loss: owns the link between logits and scores. None: SigmoidFocalLoss().
        box_loss: None: L1Loss().
        anchors: one `AnchorShapes` for each of P3 to P7, as `onestage anchors` proposes them; None: the paper's.
        anchor_scale: side of the smallest square anchor of each level in strides, > 0; for small images less than 4. It
            is not used with `anchors`.
        backbone: maps of strides 8, 16 and 32, such as TorchvisionBackbone; None: a ResNet-50 with random weights.
        channels: of the pyramid and the towers; with group norm a multiple of 64, see `FCOS`.
        tower_convs: 3 x 3 convolutions of each tower, >= 0.
        p6_from: map that P6 is computed from; see `FPN`.
        group_norm: whether the towers have group normalisation with 32 groups.
        pretrained: torchvision_coco or the path of a state dict of torchvision's retinanet_resnet50_fpn or, with group
            norm and P6 from C5, of its retinanet_resnet50_fpn_v2; it replaces all weights.
        prior: score of every anchor before training, in (0, 1). The paper's pi.
        positive_iou: overlap that makes an anchor positive, in (0, 1].
        negative_iou: overlap below which it is background, in (0, positive_iou].
        normaliser_momentum: of the running mean of positives that divides the losses, in [0, 1); 0: each batch's own.
        score_threshold: detections score more than this, in [0, 1).
        nms_threshold: overlap by more than this suppresses the lower score of a class, in [0, 1].
        candidates_per_level: (anchor, class) pairs of a level that enter suppression, >= 1.
        max_detections: D, >= 1.
    """

    size_multiple = 32  # so that the maps of the backbone have no partial cells

    def __init__(
        self,
        num_classes: int,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        anchors: list[AnchorShapes] | None = None,
        anchor_scale: float = ANCHOR_SCALE,
        backbone: Backbone | None = None,
        channels: int = 256,
        tower_convs: int = 4,
        p6_from: Literal["p5", "c5"] = "p5",
        group_norm: bool = False,
        pretrained: str | None = None,
        prior: float = 0.01,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        normaliser_momentum: float = 0.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        candidates_per_level: int = 1000,
        max_detections: int = 300,
    ) -> None:
        name = type(self).__name__
        require(num_classes >= 1, f"{name}: num_classes", num_classes, ">= 1")
        require(0 < prior < 1, f"{name}: prior", prior, "in (0, 1)", "The paper's is 0.01.")
        require(anchor_scale > 0, f"{name}: anchor_scale", anchor_scale, "> 0", "The paper's is 4.0.")
        require(p6_from in ("p5", "c5"), f"{name}: p6_from", p6_from, "p5 or c5")
        require(tower_convs >= 0, f"{name}: tower_convs", tower_convs, ">= 0")
        fits, rule = channels > 0 and (not group_norm or channels % 64 == 0), "> 0, a multiple of 64 with group_norm"
        require(fits, f"{name}: channels", channels, rule)
        backbone = pyramid_backbone(name, backbone)
        levels = anchors or [AnchorShapes(stride, pyramid_shapes(anchor_scale * stride), 0.0) for stride in STRIDES]
        strides, counts = [level.stride for level in levels], {len(level.shapes) for level in levels}
        require(strides == list(STRIDES), f"{name}: anchors, strides", strides, f"{list(STRIDES)}, one level for each")
        require(len(counts) == 1, f"{name}: anchors per cell", counts, "the same on all levels, whose heads are shared")
        loss, box_coder = classification_loss or SigmoidFocalLoss(), DeltaBoxCoder((1.0, 1.0))
        tower = (channels, tower_convs, counts.pop(), group_norm)
        class_head = SharedHead(*tower, loss.num_logits(num_classes))
        start_at(class_head.output, loss.prior_bias(num_classes, prior))
        super().__init__(
            num_classes,
            backbone=backbone,
            neck=FPN(backbone.out_channels, channels, p6_from),
            class_head=class_head,
            box_head=SharedHead(*tower, box_coder.num_outputs),
            anchor_grid=AnchorGrid(levels),
            classification_loss=loss,
            box_loss=box_loss or L1Loss(),
            box_coder=box_coder,
            matcher=IoUMatcher(positive_iou, negative_iou, best_anchors="ties"),
            normaliser=PositiveNormaliser(normaliser_momentum),
            selection=Selection(score_threshold, nms_threshold, max_detections, None, candidates_per_level),
        )
        self.group_norm = group_norm
        if pretrained is not None:
            is_torchvision = isinstance(loss, SigmoidClassificationLoss) and group_norm == (p6_from == "c5")
            is_torchvision &= anchors is None and anchor_scale == ANCHOR_SCALE
            settings = f"{type(loss).__name__}, {group_norm=}, p6_from={p6_from}, {anchor_scale=:g}"
            rule = "torchvision's: sigmoids, the paper's anchors, and group_norm with p6_from c5 or neither"
            require(is_torchvision, f"pretrained: {pretrained}: detector", settings, rule, "Or set pretrained: null.")
            load_published(self, pretrained)

    def published_state(self, key: str, value: str) -> Mapping[str, Tensor]:
        """Return the weights of torchvision's retinanet_resnet50_fpn or, with group norm, of its second version."""
        versions = (RetinaNet_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_V2_Weights)
        published = versions[self.group_norm].COCO_V1
        # Before torchvision 0.13 the towers were flat lists of convolutions and ReLUs.
        state = torchvision_weights(self, key, value, published, layers_per_conv=2)
        # The published first version was trained with eps = 0 in the batch norms: var + 0 = (var - eps) + eps.
        if not self.group_norm and (value == TORCHVISION_COCO or value.endswith(published.url.rpartition("/")[2])):
            for name, module in self.named_modules():
                if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                    state[f"{name}.running_var"] = state[f"{name}.running_var"] - module.eps
        return state
