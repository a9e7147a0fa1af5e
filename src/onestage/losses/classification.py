"""The seam of classification losses. Each owns its link: how many logits K classes need, how they become scores."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from onestage.losses.class_weights import ClassWeights
from onestage.types import IGNORE


class ClassificationLoss(nn.Module, ABC):
    """A loss over all anchors of a batch, and the link between logits and scores that belongs to it.

    Args:
        class_weights: what an anchor counts by the class of its object, [K] numbers >= 0 or a rule that finds them in
            the training set; background counts 1. None: every anchor counts 1.
    """

    uses_box_quality: ClassVar[bool] = False  # whether `forward` has to be told how good the predicted boxes are

    def __init__(self, class_weights: Sequence[float] | ClassWeights | None = None) -> None:
        super().__init__()
        if class_weights is not None and not isinstance(class_weights, ClassWeights):
            class_weights = ClassWeights(class_weights)
        self.class_weights: ClassWeights | None = class_weights

    @abstractmethod
    def num_logits(self, num_classes: int) -> int:
        """Return C', the number of logits that a head predicts for each anchor."""

    @abstractmethod
    def scores(self, class_logits: Tensor) -> Tensor:
        """Turn logits [..., C'] into scores [..., K], 0..1, in float32 or better."""

    @abstractmethod
    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return the biases [C'] that give every anchor the score `prior` before any training, 0 < prior < 1."""

    @abstractmethod
    def true_probability(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return how sure the network is of the truth, p_t of RetinaNet eq. 2: [B, A], 0..1; of IGNORE anything."""

    @abstractmethod
    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the loss of each anchor, [B, A], before class weights; of IGNORE anything finite.

        Called outside autocast, with logits and box quality in float32 or better; see `anchor_costs`.
        """

    def anchor_costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor | None = None) -> Tensor:
        """Return what each anchor adds to the loss, [B, A] in float32 or better; 0 at IGNORE.

        Args:
            class_logits: [B, A, C'].
            labels: [B, A] int64: 0..K-1, BACKGROUND, or IGNORE for anchors that have no part in the loss.
            box_quality: [B, A], 0..1: the IoU of the predicted box of a positive anchor with its object, for losses
                that use it. None: 1.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            class_logits = _at_least_float32(class_logits)
            if box_quality is None:
                box_quality = class_logits.new_ones(()).expand(labels.shape)
            costs = self.costs(class_logits, labels, box_quality)
            if self.class_weights is not None:
                costs = costs * self.class_weights(labels)
            return torch.where(labels == IGNORE, 0.0, costs)

    def forward(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor | None = None) -> Tensor:
        """Return the sum of `anchor_costs`, a scalar; the caller divides by the number of positive anchors."""
        return self.anchor_costs(class_logits, labels, box_quality).sum()


class SigmoidClassificationLoss(ClassificationLoss):
    """A loss with K independent sigmoids: an anchor is background when all of them are low."""

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
        """Return p of the object's class, and of background 1 - p of the class that is most wrongly believed in."""
        class_logits = _at_least_float32(class_logits)
        of_class = class_logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels >= 0, of_class, -class_logits.amax(dim=2)).sigmoid()


class SoftmaxClassificationLoss(ClassificationLoss):
    """A loss with one softmax over K classes and the background, which is the last logit."""

    def num_logits(self, num_classes: int) -> int:
        """Return K + 1."""
        return num_classes + 1

    def scores(self, class_logits: Tensor) -> Tensor:
        """Return the softmax without its last column, the background."""
        return _at_least_float32(class_logits).softmax(dim=-1)[..., :-1]

    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return zeros and, for the background, b = log(K (1 - prior) / prior): all classes together have `prior`."""
        bias = torch.zeros(num_classes + 1)
        bias[-1] = math.log(num_classes * (1 - prior) / prior)
        return bias

    def true_probability(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return p of the object's class, or of the background."""
        log_probabilities = _at_least_float32(class_logits).log_softmax(dim=-1)
        return log_probabilities.gather(2, true_column(class_logits, labels)[..., None])[..., 0].exp()


def true_column(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Return which of the K + 1 logits should be high, [B, A]: the label, or the last for all that is no object."""
    return torch.where(labels >= 0, labels, class_logits.shape[-1] - 1)


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen float16 and bfloat16, whose 8 or 11 significant bits are too few for a sum over 10^6 terms."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
