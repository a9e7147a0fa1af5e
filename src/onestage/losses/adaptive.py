"""Focal loss whose gamma follows the training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onestage.errors import ConfigError
from onestage.losses.class_weights import ClassWeights
from onestage.losses.focal import SigmoidFocalLoss
from onestage.losses.normaliser import sum_over_processes


class AutomatedFocalLoss(SigmoidFocalLoss):
    """Focal loss with gamma = -log(p), p the running mean of p_t over positive anchors. arXiv:1904.09048.

    While objects are seldom recognised gamma is large, and nearly all of the loss is that of hard examples; as p goes
    to 1, gamma goes to 0 and the loss to cross-entropy. From the paper are the formula and the smoothing by 0.95. Ours
    is that the mean is taken over positives, those of all processes, and corrected for its start as Adam's is, so that
    gamma follows from the first batch on. Before any positive anchor gamma is 2; in evaluation it stays as it was.

    Args:
        alpha: as in `SigmoidFocalLoss`.
        momentum: of the running mean, 0..1.
        label_smoothing: as in `SigmoidFocalLoss`.
        class_weights: see `ClassificationLoss`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    weighted_probability: Tensor  # scalar, sum of the weights below times p_t
    total_weight: Tensor  # scalar, 0..1

    def __init__(
        self,
        alpha: float | None = 0.25,
        momentum: float = 0.95,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(alpha, 2.0, label_smoothing, class_weights)
        if not 0 <= momentum < 1:
            raise ConfigError(
                f"AutomatedFocalLoss: momentum is {momentum}; it must be in 0..1, without 1.\n"
                "The paper's is momentum: 0.95"
            )
        self.momentum = momentum
        self.register_buffer("weighted_probability", torch.zeros(()))
        self.register_buffer("total_weight", torch.zeros(()))

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Follow the positives of this batch, if it is one of training, then sum the focal loss."""
        if self.training and class_logits.requires_grad:
            self._follow(class_logits.detach(), labels)
        return super().costs(class_logits, labels, box_quality)

    def current_gamma(self) -> Tensor:
        """Return gamma, a scalar, at least 0."""
        mean = self.weighted_probability / self.total_weight.clamp(min=torch.finfo(torch.float32).tiny)
        gamma = -mean.clamp(min=torch.finfo(torch.float32).tiny, max=1).log()
        return torch.where(self.total_weight > 0, gamma, 2.0)

    def _follow(self, class_logits: Tensor, labels: Tensor) -> None:
        is_positive = labels >= 0
        probabilities = self.true_probability(class_logits, labels)
        total, count = sum_over_processes(
            torch.stack([(probabilities * is_positive).sum(), is_positive.sum().to(probabilities.dtype)])
        ).unbind()
        rate = (1 - self.momentum) * (count > 0)  # a batch without objects says nothing
        self.weighted_probability.mul_(1 - rate).add_(rate * total / count.clamp(min=1))
        self.total_weight.mul_(1 - rate).add_(rate)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"alpha={self.alpha}, momentum={self.momentum}, label_smoothing={self.label_smoothing}"
