"""The detector that all anchor-based families share."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.iou import paired_iou
from onestage.boxes.matchers import Matcher, Predicted, assign
from onestage.boxes.nms import select_detections
from onestage.errors import require
from onestage.losses.box import BoxLoss
from onestage.losses.classification import ClassificationLoss
from onestage.models.backbone import Backbone
from onestage.types import AnchorLosses, Anchors, BoxCoder, Detections, Detector, Losses, Predictions, Targets


class Normaliser(Protocol):
    """Number that divides the sums of the losses."""

    def __call__(self, is_positive: Tensor, is_training: bool) -> Tensor:
        """Return a scalar > 0. is_positive: [B, A] bool."""


class Selection(NamedTuple):
    """Thresholds and limits from scores to detections; see `select_detections`."""

    score_threshold: float = 0.01
    nms_threshold: float = 0.45
    max_detections: int = 200
    candidates_per_class: int | None = 400
    candidates_per_level: int | None = None

    def require_valid(self, name: str) -> None:
        """Raise ConfigError if a value is out of its range. name: the detector's class."""
        require(0 <= self.score_threshold < 1, f"{name}: score_threshold", self.score_threshold, "in [0, 1)")
        require(
            0 <= self.nms_threshold <= 1, f"{name}: nms_threshold", self.nms_threshold, "in [0, 1]", "SSD's is 0.45"
        )
        for key in ("max_detections", "candidates_per_class", "candidates_per_level"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{name}: {key}", value, ">= 1")


class AnchorSummary(NamedTuple):
    """Where a detector places its anchors."""

    canvas: tuple[int, int]  # (height, width) of the input, px
    levels: tuple[AnchorShapes, ...]
    grids: tuple[tuple[int, int], ...]  # (rows, columns) of each level


class AnchorDetector(Detector):
    """Backbone, neck and heads over anchors; match, encode, loss; decode, select.

    Args:
        num_classes: K, without the background.
        backbone: images to feature maps, and their normalisation.
        neck: feature maps to feature maps of all levels.
        class_head: feature maps to class logits [B, A, C'].
        box_head: feature maps to box outputs [B, A, N].
        anchor_grid: anchors of the levels.
        classification_loss: owns the link between logits and scores.
        box_loss: of positive anchors.
        box_coder: owns the link between box outputs and boxes.
        matcher: assigns objects to anchors.
        normaliser: divides both losses.
        selection: from scores to detections.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Backbone,
        neck: nn.Module,
        class_head: nn.Module,
        box_head: nn.Module,
        anchor_grid: AnchorGrid,
        classification_loss: ClassificationLoss,
        box_loss: BoxLoss,
        box_coder: BoxCoder,
        matcher: Matcher,
        normaliser: Normaliser,
        selection: Selection,
    ) -> None:
        super().__init__()
        selection.require_valid(type(self).__name__)
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck
        self.class_head = class_head
        self.box_head = box_head
        self.anchor_grid = anchor_grid
        self.classification_loss = classification_loss
        self.box_loss = box_loss
        self.box_coder = box_coder
        self.matcher = matcher
        self.normaliser = normaliser
        self.selection = selection

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of all levels, finest first. images: [B, 3, H, W] uint8 RGB."""
        return cast(list[Tensor], self.neck(self.backbone(images)))

    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB."""
        height, width = images.shape[-2:]
        self.require_canvas((height, width))
        maps = self.feature_maps(images)
        return Predictions(self.class_head(maps), self.box_head(maps), self.anchor_grid(grids_of(maps)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile forward() and the classification loss in place."""
        super().compile(*args, **kwargs)
        self.classification_loss.compile(*args, **kwargs)

    def loss(self, predictions: Predictions, targets: Targets) -> Losses:
        """Return the two terms of SSD eq. 1, each a sum divided by what the normaliser makes of the positives.

        Images without objects count in `classification`. Nothing here waits for the device, and the number of
        operations does not depend on M.
        """
        class_logits, box_outputs, anchors, _ = predictions
        with torch.autocast(box_outputs.device.type, enabled=False):
            labels, gt_boxes = self._assign(predictions, targets)
            is_positive = labels >= 0
            divisor = self.normaliser(is_positive, is_training=self.training)
            box_quality = self._box_quality(predictions, gt_boxes, is_positive)
        classification = self.classification_loss(class_logits, labels, box_quality)
        box = self.box_loss(box_outputs, gt_boxes, anchors, self.box_coder, is_positive.float())
        return Losses({"classification": classification / divisor, "box": box / divisor}, is_positive.sum())

    @torch.no_grad()
    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses:
        """Return the classification loss of every anchor."""
        class_logits = predictions.class_logits
        with torch.autocast(class_logits.device.type, enabled=False):
            labels, gt_boxes = self._assign(predictions, targets)
            box_quality = self._box_quality(predictions, gt_boxes, labels >= 0)
            losses = self.classification_loss.anchor_costs(class_logits, labels, box_quality)
            return AnchorLosses(labels, losses, self.classification_loss.true_probability(class_logits, labels))

    @torch.no_grad()
    def detect(self, predictions: Predictions, content_sizes: Tensor | None = None) -> Detections:
        """Decode, clip, threshold and suppress; see `Detector.detect`."""
        with torch.autocast(predictions.box_outputs.device.type, enabled=False):
            return select_detections(
                self._clip(self._decode(predictions), predictions.anchors, content_sizes),
                self.scores(predictions),
                score_threshold=self.selection.score_threshold,
                iou_threshold=self.selection.nms_threshold,
                max_detections=self.selection.max_detections,
                candidates_per_class=self.selection.candidates_per_class,
                candidates_per_level=self.selection.candidates_per_level,
                level_sizes=predictions.anchors.level_sizes,
            )

    def scores(self, predictions: Predictions) -> Tensor:
        """Return the score of every anchor and class, [B, A, K] in [0, 1], float32 or better."""
        return self.classification_loss.scores(predictions.class_logits)

    @property
    def uses_class_weights(self) -> bool:
        """Whether the classification loss has class weights."""
        return self.classification_loss.class_weights is not None

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Pass the number of training objects of each class, [K], to a loss with class weights."""
        if self.classification_loss.class_weights is not None:
            self.classification_loss.class_weights.set_class_counts(class_counts)

    @torch.no_grad()
    def anchor_summary(self, canvas: tuple[int, int] | None = None) -> AnchorSummary:
        """Return anchor shapes and the grids of one canvas; None: the only one. Runs the network on a blank image.

        Raises:
            ConfigError: the detector does not take that canvas, or takes any and none is given.
        """
        if canvas is None:
            name, side = type(self).__name__, self.image_size
            require(side is not None, f"{name}: canvas", None, "(height, width), because it takes images of any size")
            canvas = (cast(int, side), cast(int, side))
        self.require_canvas(canvas)
        is_training = self.training
        images = torch.zeros(1, 3, *canvas, dtype=torch.uint8, device=self.anchor_grid.shapes.device)
        maps = self.eval().feature_maps(images)
        self.train(is_training)
        return AnchorSummary(canvas, self.anchor_grid.levels, tuple(grids_of(maps)))

    def _assign(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        predicted = None
        if self.matcher.needs_predictions:
            with torch.no_grad():
                predicted = Predicted(self._decode(predictions), self.scores(predictions))
        return assign(self.matcher, targets, predictions.anchors, predicted)

    def _decode(self, predictions: Predictions) -> Tensor:
        return self.box_coder.decode(predictions.box_outputs.float(), predictions.anchors)

    @torch.no_grad()
    def _box_quality(self, predictions: Predictions, gt_boxes: Tensor, is_positive: Tensor) -> Tensor | None:
        """Return the IoU of positive anchors' predicted boxes with their objects, 0 elsewhere, if the loss uses it."""
        if not self.classification_loss.uses_box_quality:
            return None
        return torch.where(is_positive, paired_iou(self._decode(predictions), gt_boxes), 0.0)

    def _clip(self, boxes: Tensor, anchors: Anchors, content_sizes: Tensor | None) -> Tensor:
        """Clip boxes [B, A, 4] to the content of each image or to the canvas."""
        boxes = boxes.clamp(min=0)
        if content_sizes is not None:
            limits = content_sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4] (x, y, x, y)
        elif self.image_size is not None:
            return boxes.clamp(max=self.image_size)
        else:  # the far edge of the finest grid's last cell, because the canvas is a multiple of the strides
            level = self.anchor_grid.levels[0]
            last_centres = anchors.boxes[: anchors.level_sizes[0], :2].amax(dim=0)
            limits = (last_centres + (1 - level.offset) * level.stride).repeat(2)
        return boxes.minimum(limits)


def grids_of(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the (rows, columns) of feature maps [B, C, H, W]."""
    return [(features.shape[-2], features.shape[-1]) for features in maps]
