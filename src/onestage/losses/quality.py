"""Focal losses whose target for an object is how well its box was predicted, so that scores rank boxes too."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.errors import ConfigError
from onestage.losses.arguments import LARGEST_GAMMA, require_gamma
from onestage.losses.class_weights import ClassWeights
from onestage.losses.classification import SigmoidClassificationLoss
from onestage.losses.focal import negative_cost, negative_costs


class QualityFocalLoss(SigmoidClassificationLoss):
    """QFL = -|y - p|^beta ((1 - y) log(1 - p) + y log(p)), y the IoU of the predicted box. arXiv:2006.04388, eq. 2.

    Args:
        beta: how much less easy examples count, 1..100: below, the slope at p = y is infinite. The paper's is 2.
        class_weights: see `ClassificationLoss`.

    Raises:
        ConfigError: if beta is out of its range.
    """

    uses_box_quality: ClassVar[bool] = True

    def __init__(self, beta: float = 2.0, class_weights: Sequence[float] | ClassWeights | None = None) -> None:
        super().__init__(class_weights)
        if not 1 <= beta <= LARGEST_GAMMA:
            raise ConfigError(
                f"QualityFocalLoss: beta is {beta}; it must be at least 1, and at most {LARGEST_GAMMA:g}, where hardly "
                "anything counts any more.\nThe paper's is beta: 2.0"
            )
        self.beta = beta

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Sum the quality focal loss over the sigmoids of each anchor; that of a negative is the focal loss's."""
        negatives, true_logits = negative_costs(class_logits, labels, self.beta)
        distance = (box_quality - true_logits.sigmoid()).abs()
        positives = distance.pow(self.beta) * _cross_entropy(true_logits, box_quality)
        return negatives + torch.where(labels >= 0, positives, 0.0)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"beta={self.beta}"


class VarifocalLoss(SigmoidClassificationLoss):
    """VFL = -q (q log(p) + (1 - q) log(1 - p)) of objects, -alpha p^gamma log(1 - p) else. arXiv:2008.13367, eq. 2.

    q is the IoU of the predicted box; an object whose box misses it, q = 0, counts as a negative.

    Args:
        alpha: weight of negatives, at least 0. The paper's is 0.75.
        gamma: how much less easy negatives count, 0..100. The paper's is 2.
        class_weights: see `ClassificationLoss`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    uses_box_quality: ClassVar[bool] = True

    def __init__(
        self, alpha: float = 0.75, gamma: float = 2.0, class_weights: Sequence[float] | ClassWeights | None = None
    ) -> None:
        super().__init__(class_weights)
        if not 0 <= alpha < math.inf:
            raise ConfigError(
                f"VarifocalLoss: alpha is {alpha}; it must be a number, at least 0.\nThe paper's is alpha: 0.75"
            )
        require_gamma("VarifocalLoss", gamma)
        self.alpha = alpha
        self.gamma = gamma

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Sum the varifocal loss over the sigmoids of each anchor."""
        negatives, true_logits = negative_costs(class_logits, labels, self.gamma)
        found = box_quality * _cross_entropy(true_logits, box_quality)
        missed = self.alpha * negative_cost(true_logits, self.gamma)
        positives = torch.where(box_quality > 0, found, missed)
        return self.alpha * negatives + torch.where(labels >= 0, positives, 0.0)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}"


def _cross_entropy(logits: Tensor, quality: Tensor) -> Tensor:
    """Return -(y log(p) + (1 - y) log(1 - p)), elementwise, for y in 0..1."""
    return F.binary_cross_entropy_with_logits(logits, quality.to(logits.dtype), reduction="none")
