"""FCOS (arXiv:1904.01355) and, with another matcher, ATSS (arXiv:1912.02424)."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.coders import DistanceBoxCoder
from onestage.boxes.nms import Selection
from onestage.boxes.point_matchers import ATSSMatcher, PointMatcher
from onestage.errors import require
from onestage.losses.box import BoxLoss, GIoULoss
from onestage.losses.classification import ClassificationLoss, SigmoidClassificationLoss
from onestage.losses.focal import SigmoidFocalLoss
from onestage.losses.normaliser import PositiveNormaliser
from onestage.models.detector import AnchorDetector, Backbone
from onestage.models.heads import by_anchor, initialise, start_at
from onestage.models.retinanet import FPN, STRIDES, SharedHead, pyramid_backbone
from onestage.models.weights import load_published, torchvision_weights
from onestage.types import Predictions

ANCHOR_SCALE = 8  # strides; the square by which ATSS measures overlap, and `doctor` coverage. FCOS uses centres only.


class FCOS(AnchorDetector):
    """FCOS: a box from every cell of an FPN by its four distances, ranked by centerness. COCO 39.2 mAP (torchvision).

    The defaults are torchvision's. With `ATSSMatcher` it is ATSS on FCOS, but for the weights of the box loss, which
    are the centerness in ATSS's code.

    Args:
        num_classes: K, without the background.
        classification_loss: owns the link between logits and scores. None: SigmoidFocalLoss().
        box_loss: None: GIoULoss().
        backbone: maps of strides 8, 16 and 32; None: a ResNet-50 with random weights.
        channels: of the pyramid and the towers, a multiple of 64: two values for each of 32 groups on maps of a cell.
        tower_convs: 3 x 3 convolutions of each tower, >= 0, each with group normalisation.
        matcher: None: PointMatcher().
        pretrained: torchvision_coco or the path of a state dict of torchvision's fcos_resnet50_fpn, for all weights.
        prior: class score of every point before training, in (0, 1).
        normaliser_momentum: of the running mean of positives that divides the losses, in [0, 1); 0: each batch's own.
        score_threshold: detections score more than this, in [0, 1); for small networks less than 0.2.
        nms_threshold: overlap by more than this suppresses the lower score of a class, in [0, 1].
        candidates_per_level: (point, class) pairs of a level that enter suppression, >= 1.
        max_detections: D, >= 1.
    """

    loss_terms = ("classification", "box", "centerness")
    size_multiple = 32  # so that the maps of the backbone have no partial cells

    def __init__(
        self,
        num_classes: int,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        backbone: Backbone | None = None,
        channels: int = 256,
        tower_convs: int = 4,
        matcher: PointMatcher | ATSSMatcher | None = None,
        pretrained: str | None = None,
        prior: float = 0.01,
        normaliser_momentum: float = 0.0,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        candidates_per_level: int = 1000,
        max_detections: int = 100,
    ) -> None:
        name = type(self).__name__
        require(num_classes >= 1, f"{name}: num_classes", num_classes, ">= 1")
        require(0 < prior < 1, f"{name}: prior", prior, "in (0, 1)", "The paper's is 0.01.")
        require(tower_convs >= 0, f"{name}: tower_convs", tower_convs, ">= 0")
        require(channels > 0 and channels % 64 == 0, f"{name}: channels", channels, "> 0, a multiple of 64")
        backbone, loss = pyramid_backbone(name, backbone), classification_loss or SigmoidFocalLoss()
        class_head = SharedHead(channels, tower_convs, 1, True, loss.num_logits(num_classes), tower_bias=True)
        start_at(class_head.output, loss.prior_bias(num_classes, prior))
        super().__init__(
            num_classes,
            backbone=backbone,
            neck=FPN(backbone.out_channels, channels),
            class_head=class_head,
            box_head=DistanceHead(channels, tower_convs),
            # At the cells' corners, as in torchvision; the paper has them in the middle.
            anchor_grid=AnchorGrid([AnchorShapes(s, ((ANCHOR_SCALE * s, ANCHOR_SCALE * s),), 0.0) for s in STRIDES]),
            classification_loss=loss,
            box_loss=box_loss or GIoULoss(),
            box_coder=DistanceBoxCoder(),
            matcher=matcher or PointMatcher(),
            normaliser=PositiveNormaliser(normaliser_momentum),
            selection=Selection(score_threshold, nms_threshold, max_detections, None, candidates_per_level),
        )
        if pretrained is not None:
            place, fits = f"pretrained: {pretrained}: detector", isinstance(loss, SigmoidClassificationLoss)
            require(fits, place, type(loss).__name__, "a loss with sigmoids", "Or set pretrained: null.")
            load_published(self, pretrained)

    def forward(self, images: Tensor) -> Predictions:
        """Predict for every point. images: [B, 3, H, W] uint8 RGB."""
        predictions = super().forward(images)
        distances, centerness = torch.split(predictions.box_outputs, [4, 1], dim=-1)
        return predictions._replace(box_outputs=distances, quality_logits=centerness[..., 0])

    def quality_terms(self, predictions: Predictions, gt_boxes: Tensor, is_positive: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of the centerness of positive points, eq. 3."""
        assert predictions.quality_logits is not None
        distances = self.box_coder.encode(gt_boxes, predictions.anchors)
        sides = torch.stack([distances[..., 0::2], distances[..., 1::2]], dim=-1)  # [B, A, 2 of a pair, axis]
        sides = torch.where(is_positive[..., None, None], sides, 1.0)
        target = (sides.amin(dim=-2) / sides.amax(dim=-2)).clamp(min=0).prod(dim=-1).sqrt()
        losses = F.binary_cross_entropy_with_logits(predictions.quality_logits, target, reduction="none")
        return {"centerness": (losses * is_positive).sum()}

    def scores(self, predictions: Predictions) -> Tensor:
        """Return the geometric mean of class score and centerness (arXiv:2006.09214), [B, A, K] in [0, 1]."""
        assert predictions.quality_logits is not None
        return (super().scores(predictions) * predictions.quality_logits.sigmoid()[..., None]).sqrt()

    def published_state(self, key: str, value: str) -> Mapping[str, Tensor]:
        """Return the weights of torchvision's fcos_resnet50_fpn."""
        # Its towers are flat lists of convolutions, group norms and ReLUs.
        return torchvision_weights(self, key, value, FCOS_ResNet50_FPN_Weights.COCO_V1, layers_per_conv=3)


class DistanceHead(SharedHead):
    """FCOS's second tower, of the distances and the centerness. See `SharedHead`."""

    def __init__(self, channels: int, tower_convs: int) -> None:
        super().__init__(channels, tower_convs, 1, True, DistanceBoxCoder.num_outputs, tower_bias=True)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        initialise(self.centerness, partial(nn.init.normal_, std=0.01))

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Return four distances and the centerness logit, [B, A, 5] float32, of maps [B, channels, H_l, W_l]."""
        towers = [self.tower(features) for features in feature_maps]
        return by_anchor([torch.cat([self.output(t), self.centerness(t)], dim=1) for t in towers], 5)
