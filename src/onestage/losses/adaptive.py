"""Focal loss with a gamma that adapts during training."""

import torch
from torch import Tensor

from onestage.errors import require
from onestage.losses.class_weights import Weights
from onestage.losses.focal import TINY, SigmoidFocalLoss
from onestage.losses.normaliser import sum_over_processes


class AutomatedFocalLoss(SigmoidFocalLoss):
    """Focal loss with gamma = -log(p), p the running mean of p_t over positive anchors. arXiv:1904.09048.

    Gamma is large while objects are rarely recognised, and goes to 0 (cross-entropy) as p goes to 1. The formula and
    the momentum of 0.95 are the paper's. Ours: the mean is over the positive anchors of all processes, and its start
    is corrected as in Adam, so that gamma adapts from the first batch. Gamma is 2 before the first positive anchor,
    and constant in evaluation.

    Args:
        alpha: as in `SigmoidFocalLoss`.
        momentum: of the running mean, in [0, 1).
        label_smoothing: as in `SigmoidFocalLoss`.
        class_weights: see `ClassificationLoss`.
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
        if self.training and class_logits.requires_grad:
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
