"""Variants of focal loss: a gamma that adapts during training, and the IoU of the predicted box as target."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.errors import require
from onestage.losses.class_weights import Weights
from onestage.losses.classification import SigmoidClassificationLoss, one_hot
from onestage.losses.focal import TINY, SigmoidFocalLoss, focal_loss, require_gamma
from onestage.losses.normaliser import sum_over_processes


class AutomatedFocalLoss(SigmoidFocalLoss):
    """Focal loss with gamma = -log(p), p the running mean of p_t over positive anchors. arXiv:1904.09048.

    Gamma is large while objects are rarely recognised, and goes to 0 (cross-entropy) as p goes to 1. The formula and
    the momentum of 0.95 are the paper's. Ours: the mean is over the positive anchors of all processes, and its start
    is corrected as in Adam, so that gamma adapts from the first batch. Gamma is 2 before the first positive anchor,
    and constant in evaluation.

    Args:
        alpha: as in `SigmoidFocalLoss`, and so are `label_smoothing` and `class_weights`.
        momentum: of the running mean, in [0, 1).
    """

    weighted_probability: Tensor  # scalar, sum of p_t with the weights of the running mean
    total_weight: Tensor  # scalar in [0, 1], sum of these weights

    def __init__(
        self,
        alpha: float | None = 0.25,
        momentum: float = 0.95,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
    ) -> None:
        super().__init__(alpha, 2.0, label_smoothing, class_weights)
        require(0 <= momentum < 1, "AutomatedFocalLoss: momentum", momentum, "in [0, 1)", "The paper uses 0.95.")
        self.momentum = momentum
        self.register_buffer("weighted_probability", torch.zeros(()))
        self.register_buffer("total_weight", torch.zeros(()))

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Update the running mean in training, then return the focal loss, [B, A]."""
        if self.training and torch.is_grad_enabled() and class_logits.requires_grad:
            is_positive, p_t = labels >= 0, self.true_probability(class_logits.detach(), labels)
            sums = torch.stack([(p_t * is_positive).sum(), is_positive.sum().to(p_t.dtype)])
            total, count = sum_over_processes(sums).unbind()
            rate = (1 - self.momentum) * (count > 0)  # a batch without objects changes nothing
            self.weighted_probability.mul_(1 - rate).add_(rate * total / count.clamp(min=1))
            self.total_weight.mul_(1 - rate).add_(rate)
        return super().per_anchor_loss(class_logits, labels, box_quality)

    def current_gamma(self) -> Tensor:
        """Return gamma, a scalar >= 0."""
        mean = self.weighted_probability / self.total_weight.clamp(min=TINY)
        return torch.where(self.total_weight > 0, -mean.clamp(min=TINY, max=1).log(), 2.0)


class QualityFocalLoss(SigmoidClassificationLoss):
    """QFL = -|y - p|^beta ((1 - y) log(1 - p) + y log(p)), y the IoU of the predicted box. arXiv:2006.04388, eq. 2.

    Args:
        beta: focus on hard examples, in [1, 100]; below 1 the slope at p = y is infinite. The paper uses 2.
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
