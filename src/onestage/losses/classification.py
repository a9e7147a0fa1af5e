"""Classification losses. Each owns its link function: how many logits K classes need, and how logits become scores."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestage.errors import ConfigError
from onestage.types import BACKGROUND


class ClassificationLoss(nn.Module, ABC):
    """A loss over all anchors of a batch, and the link between logits and scores that belongs to it."""

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
    def total(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Compute what `forward` returns, outside autocast, from logits that are float32 or better."""

    def forward(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the loss over anchors, a scalar; the caller divides by the number of positive ones.

        Args:
            class_logits: [B, A, C'].
            labels: [B, A] int64: 0..K-1, BACKGROUND, or IGNORE for anchors that have no part in the loss.
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            return self.total(_at_least_float32(class_logits), labels)


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


class SigmoidFocalLoss(SigmoidClassificationLoss):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), summed. RetinaNet eq. 5 (arXiv:1708.02002).

    Args:
        alpha: weight of positives, 0..1; negatives weigh 1 - alpha. None: both weigh 1, eq. 4.
        gamma: how much less easy examples count, at least 0; 0 is cross-entropy.

    Raises:
        ConfigError: if alpha or gamma is out of its range.
    """

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        if alpha is not None and not 0 <= alpha <= 1:
            raise ConfigError(
                f"SigmoidFocalLoss: alpha is {alpha}; the weight of positives lies in 0..1.\n"
                "RetinaNet's is alpha: 0.25; alpha: null weighs positives and negatives alike"
            )
        if not 0 <= gamma < math.inf:
            raise ConfigError(
                f"SigmoidFocalLoss: gamma is {gamma}; it must be at least 0.\n"
                "RetinaNet's is gamma: 2.0; gamma: 0.0 is cross-entropy"
            )
        self.alpha = alpha
        self.gamma = gamma

    def total(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the focal loss of each anchor's K sigmoids; of a background anchor all K are negatives."""
        loss: Tensor = _FocalSum.apply(class_logits, labels, self.alpha, self.gamma)
        return loss

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}"


class _FocalSum(torch.autograd.Function):
    """The focal loss of all sigmoids as negatives, put right at the one logit of each positive anchor.

    With p = sigmoid(x), s = softplus(x) = -log(1 - p), for a negative:
        FL = w p^gamma s       dFL/dx = w p^gamma (gamma (1 - p) s + p)       w = 1 - alpha
    and for a positive the same at -x, with w = alpha and the sign of the derivative changed (RetinaNet appendix B).

    No [B, A, K] targets are made, and only the gradient is kept for backward. Written out rather than left to autograd
    also because the derivative of p^gamma would be infinite at p = 0 for gamma < 1.
    """

    @staticmethod
    def forward(ctx: Any, class_logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
        negative_weight, positive_weight = (1.0, 1.0) if alpha is None else (1 - alpha, alpha)
        is_positive = (labels >= 0)[..., None]  # [B, A, 1]
        class_of_anchor = labels.clamp(min=0)[..., None]  # [B, A, 1]; of anchors without an object not used
        weights = negative_weight * (labels >= BACKGROUND)[..., None].to(class_logits.dtype)  # 0 at IGNORE

        loss, gradient = _focal_terms(class_logits, weights, gamma)
        positive_logits = class_logits.gather(2, class_of_anchor)
        positive_loss, positive_gradient = _focal_terms(-positive_logits, positive_weight, gamma)

        # One logit of each anchor is written, so that no two writes meet: the same result on every run.
        positive_gradient = torch.where(is_positive, -positive_gradient, gradient.gather(2, class_of_anchor))
        ctx.save_for_backward(gradient.scatter_(2, class_of_anchor, positive_gradient))
        positive_loss = torch.where(is_positive, positive_loss, loss.gather(2, class_of_anchor))
        return loss.scatter_(2, class_of_anchor, positive_loss).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _focal_terms(logits: Tensor, weights: Tensor | float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the focal loss of negatives and its derivative, elementwise; finite for any finite logit."""
    probability = logits.sigmoid()
    cross_entropy = F.softplus(logits)  # -log(1 - p)
    modulation = probability.pow(gamma) * weights
    gradient = (1 - probability).mul_(cross_entropy).mul_(gamma).add_(probability).mul_(modulation)
    return modulation.mul_(cross_entropy), gradient


class MinedCrossEntropy(SoftmaxClassificationLoss):
    """Softmax cross-entropy over the positives and each image's hardest negatives. SSD section 2.2 (arXiv:1512.02325).

    The hardest are the BACKGROUND anchors of largest loss, of equal ones the first. An image without positive anchors
    gets as many negatives as an image with one, so that it teaches what background is; the Caffe code and torchvision
    leave it out.

    Args:
        negatives_per_positive: at least 1.

    Raises:
        ConfigError: if negatives_per_positive is less than 1.
    """

    def __init__(self, negatives_per_positive: int = 3) -> None:
        super().__init__()
        if negatives_per_positive < 1:
            raise ConfigError(
                f"MinedCrossEntropy: negatives_per_positive is {negatives_per_positive}; it must be at least 1.\n"
                "SSD's is negatives_per_positive: 3"
            )
        self.negatives_per_positive = negatives_per_positive

    def total(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """Sum the cross-entropy of positives and mined negatives."""
        background = class_logits.shape[-1] - 1
        targets = torch.where(labels >= 0, labels, background)
        # Two axes, because cross_entropy on [B, C', A] has no deterministic backward on CUDA.
        cross_entropy = F.cross_entropy(class_logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(labels)
        is_positive = labels >= 0
        is_counted = is_positive | self._hard_negatives(cross_entropy.detach(), labels)
        return torch.where(is_counted, cross_entropy, 0.0).sum()

    def _hard_negatives(self, cross_entropy: Tensor, labels: Tensor) -> Tensor:
        """Return which anchors are mined, [B, A] bool."""
        is_negative = labels == BACKGROUND
        num_positives = (labels >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        hardness = cross_entropy.masked_fill(~is_negative, -torch.inf)
        order = hardness.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(labels.shape[1], device=labels.device).expand_as(order)
        rank_of_anchor = torch.empty_like(order).scatter_(1, order, ranks)  # a permutation: no two writes meet
        return is_negative & (rank_of_anchor < self.negatives_per_positive * num_positives)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"negatives_per_positive={self.negatives_per_positive}"


def _at_least_float32(values: Tensor) -> Tensor:
    """Widen float16 and bfloat16, whose 8 or 11 significant bits are too few for a sum over 10^6 terms."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
