"""Focal losses whose target is the IoU of the predicted box, so that scores also rank boxes."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.errors import require
from onestage.losses.class_weights import Weights
from onestage.losses.classification import SigmoidClassificationLoss, one_hot
from onestage.losses.focal import focal_loss, require_gamma


class QualityFocalLoss(SigmoidClassificationLoss):
    """QFL = -|y - p|^beta ((1 - y) log(1 - p) + y log(p)), y the IoU of the predicted box. arXiv:2006.04388, eq. 2.

    Args:
        beta: focus on hard examples, in [1, 100]; below 1 the slope at p = y is infinite. The paper uses 2.
        class_weights: see `ClassificationLoss`.
    """

    uses_box_quality: ClassVar[bool] = True

    def __init__(self, beta: float = 2.0, class_weights: Weights = None) -> None:
        super().__init__(class_weights)
        require_gamma("QualityFocalLoss: beta", beta, lowest=1.0)
        self.beta = beta

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the quality focal loss summed over the sigmoids of each anchor, [B, A]."""
        target = one_hot(labels, class_logits) * box_quality[..., None]  # y, 0 for all negatives
        distance = (target - class_logits.sigmoid()).abs()
        cross_entropy = F.binary_cross_entropy_with_logits(class_logits, target, reduction="none")
        return (distance**self.beta * cross_entropy).sum(dim=2)


class VarifocalLoss(SigmoidClassificationLoss):
    """VFL = -q (q log(p) + (1 - q) log(1 - p)) of objects, -alpha p^gamma log(1 - p) else. arXiv:2008.13367, eq. 2.

    q is the IoU of the predicted box; an object whose box misses it (q = 0) counts as a negative.

    Args:
        alpha: weight of negatives, finite and >= 0. The paper uses 0.75.
        gamma: focus on hard negatives, in [0, 100]. The paper uses 2.
        class_weights: see `ClassificationLoss`.
    """

    uses_box_quality: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, class_weights: Weights = None) -> None:
        super().__init__(class_weights)
        require(0 <= alpha < math.inf, "VarifocalLoss: alpha", alpha, "finite and >= 0", "The paper uses 0.75.")
        require_gamma("VarifocalLoss: gamma", gamma)
        self.alpha, self.gamma = alpha, gamma

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the varifocal loss summed over the sigmoids of each anchor, [B, A]."""
        target = one_hot(labels, class_logits) * box_quality[..., None]  # q, 0 for all negatives
        positives = target * F.binary_cross_entropy_with_logits(class_logits, target, reduction="none")
        negatives = self.alpha * focal_loss(class_logits, torch.zeros_like(target), None, self.gamma)
        return torch.where(target > 0, positives, negatives).sum(dim=2)
