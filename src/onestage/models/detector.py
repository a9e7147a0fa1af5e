"""The detector that all anchor-based families share, and the interface of its backbone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.geometry import paired_iou
from onestage.boxes.matchers import Matcher, assign
from onestage.boxes.nms import Selection, select_detections
from onestage.errors import require
from onestage.losses.box import BoxLoss
from onestage.losses.classification import ClassificationLoss
from onestage.types import AnchorLosses, BoxCoder, Detections, Detector, Losses, Predictions, Targets

Pixel = tuple[float, float, float]  # a value for each RGB channel of 0..255


class Backbone(nn.Module, ABC):
    """Network from uint8 images to feature maps; normalisation belongs to it, because its weights decide it.

    out_channels, strides (px): of each feature map, finest first. pixel_mean, pixel_std: of the RGB channels of 0..255.
    """

    pixel_mean: Tensor  # [3, 1, 1]
    pixel_std: Tensor  # [3, 1, 1]

    def __init__(
        self, out_channels: Sequence[int], strides: Sequence[int], pixel_mean: Pixel, pixel_std: Pixel
    ) -> None:
        super().__init__()
        self.out_channels, self.strides = tuple(out_channels), tuple(strides)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self._frozen: list[nn.Module] = []  # a list, so that they are not registered twice

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps [B, C_l, H_l, W_l], finest first. images: [B, 3, H, W] uint8 RGB."""
        return self.features(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: [B, 3, H, W] of 0..255 to floats around 0."""
        normalised = (images.float() - self.pixel_mean) / self.pixel_std
        return normalised.to(next(self.parameters()).dtype)  # of `.half()`, or trainer.precision bf16-true

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of normalised images, [B, 3, H, W] float."""

    def freezable_stages(self) -> Sequence[Sequence[nn.Module]]:
        """Return the modules of each stage that `freeze` can freeze, the first stage first; none by default."""
        return ()

    def freeze(self, num_stages: int) -> None:
        """Keep the weights of the first stages and the statistics of their batch norms; ConfigError for too many."""
        stages, name = self.freezable_stages(), type(self).__name__
        rule = f"in [0, {len(stages)}], the stages of {name} that can be frozen"
        require(0 <= num_stages <= len(stages), "model.freeze", num_stages, rule)
        self._frozen = [module for stage in stages[:num_stages] for module in stage]
        for module in self._frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of all but the frozen modules, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


class AnchorDetector(Detector):
    """Backbone, neck and heads over anchors; match, encode, loss; decode, select.

    neck: the backbone's maps to those of all levels, finest first. class_head, box_head, quality_head: these to class
    logits [B, A, C'], box outputs [B, A, N] and quality logits [B, A, 1]. normaliser: is_positive [B, A] to the scalar
    > 0 that divides the losses.
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
        normaliser: nn.Module,
        selection: Selection,
        quality_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        name, kind = type(self).__name__, type(classification_loss).__name__
        selection.require_valid(name)
        has_background = classification_loss.has_background or "objectness" in self.loss_terms
        remedy = "Set it to onestage.losses.SigmoidFocalLoss, or choose YOLOv2 or YOLOv3."
        require(has_background, f"{name}: classification_loss", kind, "a loss with a background", remedy)
        self.num_classes, self.selection = num_classes, selection
        self.backbone, self.neck, self.anchor_grid = backbone, neck, anchor_grid
        self.class_head, self.box_head, self.quality_head = class_head, box_head, quality_head
        self.classification_loss, self.box_loss, self.normaliser = classification_loss, box_loss, normaliser
        self.box_coder, self.matcher = box_coder, matcher

    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB."""
        self.require_canvas((images.shape[-2], images.shape[-1]))
        maps = self.neck(self.backbone(images))
        grids = [(features.shape[-2], features.shape[-1]) for features in maps]
        quality = self.quality_head(maps)[..., 0] if self.quality_head is not None else None
        return Predictions(self.class_head(maps), self.box_head(maps), self.anchor_grid(grids), quality)

    def loss(self, predictions: Predictions, targets: Targets) -> Losses:
        """Return the two terms of SSD eq. 1 and those of `quality_terms`, divided by the normaliser's number."""
        class_logits, box_outputs, anchors, _ = predictions
        with torch.autocast(box_outputs.device.type, enabled=False):
            labels, gt_boxes = self.assign(predictions, targets)
            is_positive = labels >= 0
            divisor = self.normaliser(is_positive)
            box_quality = self.box_quality(self.classification_loss, predictions, gt_boxes, is_positive)
            others = self.quality_terms(predictions, gt_boxes, is_positive)
        classification = self.classification_loss(class_logits, labels, box_quality)
        box = self.box_loss(box_outputs, gt_boxes, anchors, self.box_coder, is_positive)
        terms = {"classification": classification, "box": box, **others}
        return Losses({name: value / divisor for name, value in terms.items()}, is_positive.sum())

    def quality_terms(self, predictions: Predictions, gt_boxes: Tensor, is_positive: Tensor) -> dict[str, Tensor]:
        """Return the sums of further terms over positive anchors; see `BoxLoss.forward`. None by default."""
        return {}

    @torch.no_grad()
    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses:
        """Return the loss of every anchor in the term of `shared_term`."""
        with torch.autocast(predictions.box_outputs.device.type, enabled=False):
            labels, gt_boxes = self.assign(predictions, targets)
            loss, logits, labels_of_term = self.shared_term(predictions, labels)
            box_quality = self.box_quality(loss, predictions, gt_boxes, labels >= 0)
            losses = loss.anchor_losses(logits, labels_of_term, box_quality)
            return AnchorLosses(labels, losses, loss.true_probability(logits, labels_of_term))

    def shared_term(self, predictions: Predictions, labels: Tensor) -> tuple[ClassificationLoss, Tensor, Tensor]:
        """Return the loss that all anchors share, its logits [B, A, C'], and its labels [B, A]."""
        return self.classification_loss, predictions.class_logits, labels

    @torch.no_grad()
    def detect(self, predictions: Predictions, content_sizes: Tensor | None = None) -> Detections:
        """Decode, clip to `content_sizes` ([B, 2] (height, width), px; None: the canvas), threshold and suppress."""
        with torch.autocast(predictions.box_outputs.device.type, enabled=False):
            boxes, level_sizes = self.decode(predictions), predictions.anchors.level_sizes
            if content_sizes is None:
                limits = self._canvas(predictions)
            else:
                limits = content_sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4]
            boxes = boxes.clamp(min=0).minimum(limits)
            return select_detections(boxes, self.scores(predictions), level_sizes, self.selection)

    def scores(self, predictions: Predictions) -> Tensor:
        """Return the score of every anchor and class, [B, A, K] in [0, 1]."""
        return self.classification_loss.scores(predictions.class_logits)

    def decode(self, predictions: Predictions) -> Tensor:
        """Return the predicted box of every anchor, [B, A, 4] xyxy, px."""
        return self.box_coder.decode(predictions.box_outputs.float(), predictions.anchors)

    def assign(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return label [B, A] and box [B, A, 4] of the object of every anchor; see `onestage.boxes.matchers.assign`."""
        with torch.no_grad():
            predicted_boxes = self.decode(predictions) if self.matcher.needs_predictions else None
        return assign(self.matcher, targets, predictions.anchors, predicted_boxes)

    @property
    def uses_class_weights(self) -> bool:
        """Whether the classification loss has class weights."""
        return self.classification_loss.class_weights is not None

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Pass the number of training objects of each class, [K], to a loss with class weights."""
        if self.classification_loss.class_weights is not None:
            self.classification_loss.class_weights.set_class_counts(class_counts)

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compile forward() and the losses over classes in place."""
        super().compile(*args, **settings)
        for loss in self.children():
            if isinstance(loss, ClassificationLoss):
                loss.compile(*args, **settings)

    @torch.no_grad()
    def anchor_summary(
        self, canvas: tuple[int, int] | None = None
    ) -> tuple[tuple[AnchorShapes, ...], tuple[tuple[int, int], ...]]:
        """Return the anchors of each level and its (rows, columns) on a canvas; None: the only one that it takes, px.

        Runs the network on a blank image: under `torch.device("meta")` neither that nor building it costs anything.
        """
        side, is_training = self.image_size or 0, self.training
        canvas = canvas or (side, side)
        require(min(canvas) > 0, "canvas", canvas, "(height, width) > 0, px")
        images = torch.zeros(1, 3, *canvas, dtype=torch.uint8, device=self.anchor_grid.shapes.device)
        maps = self.eval().neck(self.backbone(images))
        self.train(is_training)
        return self.anchor_grid.levels, tuple((m.shape[-2], m.shape[-1]) for m in maps)

    @torch.no_grad()
    def box_quality(
        self, loss: ClassificationLoss, predictions: Predictions, gt_boxes: Tensor, is_positive: Tensor
    ) -> Tensor | None:
        """Return the IoU of positive anchors' predicted boxes with their objects, 0 elsewhere, if the loss uses it."""
        if not loss.uses_box_quality:
            return None
        return torch.where(is_positive, paired_iou(self.decode(predictions), gt_boxes), 0.0)

    def _canvas(self, predictions: Predictions) -> Tensor:
        """Return (width, height, width, height) of the canvas: the far edge of the last cell of the finest level."""
        boxes, level = predictions.anchors.boxes, self.anchor_grid.levels[0]
        if self.image_size is not None:
            return boxes.new_full((4,), self.image_size)
        last_centres = boxes[: predictions.anchors.level_sizes[0], :2].amax(dim=0)
        return (last_centres + (1 - level.offset) * level.stride).repeat(2)
