"""The seam of classification losses: logits to scores, and one loss per anchor."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from onestage.losses.class_weights import ClassWeights, Weights
from onestage.types import IGNORE


class ClassificationLoss(nn.Module, ABC):
    """A loss over all anchors of a batch, and the link between its logits and scores.

    Args:
        class_weights: the weight of positive anchors by class, [K] numbers >= 0 or a rule that derives them from the
            training set; background has weight 1. None: every anchor has weight 1.
    """

    uses_box_quality: ClassVar[bool] = False  # whether `forward` needs the IoU of the predicted boxes
    has_background: ClassVar[bool] = True  # whether it learns that an anchor shows no object

    def __init__(self, class_weights: Weights = None) -> None:
        super().__init__()
        if class_weights is not None and not isinstance(class_weights, ClassWeights):
            class_weights = ClassWeights(class_weights)
        self.class_weights: ClassWeights | None = class_weights

    @abstractmethod
    def num_logits(self, num_classes: int) -> int:
        """Return C', the number of logits per anchor."""

    @abstractmethod
    def scores(self, class_logits: Tensor) -> Tensor:
        """Turn logits [..., C'] into scores [..., K] in [0, 1], float32 or better."""

    @abstractmethod
    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return the biases [C'] that give untrained anchors the score `prior`, in (0, 1)."""

    @abstractmethod
    def true_probability(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return p_t of RetinaNet eq. 2, [B, A] in [0, 1]; arbitrary at IGNORE."""

    @abstractmethod
    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the loss of each anchor without class weights, [B, A]; finite but arbitrary at IGNORE.

        `anchor_losses` calls it outside autocast with float32 logits and box quality, or better.
        """

    def anchor_losses(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor | None = None) -> Tensor:
        """Return what each anchor adds to the loss, [B, A], float32 or better; 0 at IGNORE.

        Args:
            class_logits: [B, A, C'].
            labels: [B, A] int64: 0..K-1, BACKGROUND, or IGNORE.
            box_quality: [B, A] in [0, 1], the IoU of each positive anchor's predicted box with its object. None: 1.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            class_logits = _at_least_float32(class_logits)
            if box_quality is None:
                box_quality = class_logits.new_ones(()).expand(labels.shape)
            losses = self.per_anchor_loss(class_logits, labels, box_quality)
            if self.class_weights is not None:
                losses = losses * self.class_weights(labels)
            return torch.where(labels == IGNORE, 0.0, losses)

    def forward(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor | None = None) -> Tensor:
        """Return the sum of `anchor_losses`, a scalar; the detector divides it by the number of positive anchors."""
        return self.anchor_losses(class_logits, labels, box_quality).sum()


class SigmoidClassificationLoss(ClassificationLoss):
    """A loss with K independent sigmoids; an anchor is background when all of them are low."""

    def num_logits(self, num_classes: int) -> int:
        """Return K."""
        return num_classes

    def scores(self, class_logits: Tensor) -> Tensor:
        """Return the sigmoid of each logit."""
        return _at_least_float32(class_logits).sigmoid()

    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return b = -log((1 - prior) / prior) for each class. RetinaNet section 4.1 (arXiv:1708.02002)."""
        return torch.full((num_classes,), -math.log((1 - prior) / prior))

    def true_probability(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return p of the object's class; for background 1 - p of the class with the highest score."""
        class_logits = _at_least_float32(class_logits)
        true_logits = class_logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels >= 0, true_logits, -class_logits.amax(dim=2)).sigmoid()


class SoftmaxClassificationLoss(ClassificationLoss):
    """A loss with one softmax over K classes and the background, which is the last logit."""

    def num_logits(self, num_classes: int) -> int:
        """Return K + 1."""
        return num_classes + 1

    def scores(self, class_logits: Tensor) -> Tensor:
        """Return the softmax without its last column, the background."""
        return _at_least_float32(class_logits).softmax(dim=-1)[..., :-1]

    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return zeros, and b = log(K (1 - prior) / prior) for background: all classes together have `prior`."""
        return torch.tensor([0.0] * num_classes + [math.log(num_classes * (1 - prior) / prior)])

    def true_probability(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return p of the object's class, or of the background."""
        log_probabilities = _at_least_float32(class_logits).log_softmax(dim=-1)
        return log_probabilities.gather(2, true_column(class_logits, labels)[..., None])[..., 0].exp()


def one_hot(labels: Tensor, class_logits: Tensor) -> Tensor:
    """Return targets [B, A, K], 1 at the class of a positive anchor, with the dtype of the logits."""
    classes = torch.arange(class_logits.shape[-1], device=labels.device)
    return (labels[..., None] == classes).to(class_logits.dtype)


def true_column(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the softmax column of the right answer, [B, A]: the label, or the last column without an object."""
    return torch.where(labels >= 0, labels, class_logits.shape[-1] - 1)


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen float16 and bfloat16: their 11 or 8 significant bits cannot sum 10^6 terms."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
