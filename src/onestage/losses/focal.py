"""Focal loss with sigmoids or a softmax; gamma = 0 is cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.errors import require
from onestage.losses.class_weights import Weights
from onestage.losses.classification import (
    ClassificationLoss,
    SigmoidClassificationLoss,
    SoftmaxClassificationLoss,
    one_hot,
    true_column,
)
from onestage.losses.fused_focal import SumNegatives, saves_memory

MAX_GAMMA = 100.0  # 0.5^100 = 1e-30; products with smaller factors underflow in float32
TINY = torch.finfo(torch.float32).tiny


def focal_loss(class_logits: Tensor, target: Tensor, alpha: float | None, gamma: float | Tensor) -> Tensor:
    """Return FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) elementwise. RetinaNet eq. 5 (arXiv:1708.02002).

    class_logits, target: any shape; a target is 1 for the class of the object, else 0.
    """
    p = class_logits.sigmoid()
    one_minus_p_t = torch.where(target == 1, 1 - p, p)  # 1 - (1 - p) would round a small p to 0
    alpha_t = 1.0 if alpha is None else torch.where(target == 1, alpha, 1 - alpha)
    cross_entropy = F.binary_cross_entropy_with_logits(class_logits, target, reduction="none")  # -log(p_t)
    # The derivative of 0^gamma is infinite for gamma < 1: NaN gradients where p_t rounds to 1, at logits above 17.
    return alpha_t * one_minus_p_t.clamp(min=TINY) ** gamma * cross_entropy


def require_gamma(name: str, gamma: float, lowest: float = 0.0) -> None:
    """Check an exponent of focus; `name` is the class and its argument."""
    rule = f"in [{lowest:g}, {MAX_GAMMA:g}]"
    require(lowest <= gamma <= MAX_GAMMA, name, gamma, rule, "The papers use 2.0; 0.0 is cross-entropy.")


class FocalLoss(ClassificationLoss):
    """The arguments of focal loss; the subclasses define p_t.

    Args:
        alpha: weight of positives in [0, 1]; negatives have 1 - alpha. None: both have weight 1 (RetinaNet eq. 4).
        gamma: focus on hard examples, in [0, 100]; 0 is cross-entropy.
        label_smoothing: of positive anchors, in [0, 1). Background is not smoothed: it would lift all scores.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
    ) -> None:
        super().__init__(class_weights)
        name, remedy = type(self).__name__, "RetinaNet uses alpha: 0.25; alpha: null weighs all anchors equally."
        require(alpha is None or 0 <= alpha <= 1, f"{name}: alpha", alpha, "in [0, 1] or null", remedy)
        require_gamma(f"{name}: gamma", gamma)
        remedy = "A usual value is label_smoothing: 0.1; 0.0 disables it."
        require(0 <= label_smoothing < 1, f"{name}: label_smoothing", label_smoothing, "in [0, 1)", remedy)
        self.alpha, self.gamma, self.label_smoothing = alpha, gamma, label_smoothing


class SigmoidFocalLoss(FocalLoss, SigmoidClassificationLoss):
    """Focal loss of the K sigmoids of each anchor. RetinaNet eq. 5 (arXiv:1708.02002).

    All K sigmoids of a background anchor are negatives; of a positive anchor, all but the one of its class.

    Label smoothing is that of YOLO's classifiers: the target is 1 - smoothing / 2 for the object's class and
    smoothing / 2 for the others, and the loss is the mixture of the losses of both targets.
    """

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the focal loss summed over the sigmoids of each anchor, [B, A]."""
        gamma = self.current_gamma()
        if self.label_smoothing == 0 and saves_memory(class_logits):  # keeps one tensor [B, A, K], not eight
            negatives: Tensor
            negatives, true_logits = SumNegatives.apply(class_logits, labels, gamma)
            positives = focal_loss(true_logits, torch.ones_like(true_logits), self.alpha, gamma)
            negative_weight = 1.0 if self.alpha is None else 1 - self.alpha
            return negative_weight * negatives + torch.where(labels >= 0, positives, 0.0)
        target = one_hot(labels, class_logits)  # all zeros for background
        losses = focal_loss(class_logits, target, self.alpha, gamma)
        if self.label_smoothing > 0:
            opposite = focal_loss(class_logits, 1 - target, self.alpha, gamma)
            doubt = torch.where(labels >= 0, self.label_smoothing / 2, 0.0)[..., None]
            losses = (1 - doubt) * losses + doubt * opposite
        return losses.sum(dim=2)

    def current_gamma(self) -> float | Tensor:
        """Return gamma, a number or a scalar tensor without gradient."""
        return self.gamma


class SoftmaxFocalLoss(FocalLoss, SoftmaxClassificationLoss):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) with p_t from a softmax over K classes and background.

    A footnote in section 3 of RetinaNet (arXiv:1708.02002) reports similar results for this form.

    Label smoothing is that of arXiv:1512.00567, section 7: the target is 1 - smoothing for the object's class plus
    smoothing / (K + 1) for every logit, and the loss is the mixture of the losses of these targets.
    """

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the focal loss of the right answer of each anchor, [B, A]."""
        log_p = class_logits.log_softmax(dim=-1)
        losses = self._focal(log_p.gather(2, true_column(class_logits, labels)[..., None])[..., 0])
        if self.label_smoothing > 0:
            smoothed = (1 - self.label_smoothing) * losses + self.label_smoothing * self._focal(log_p).mean(dim=-1)
            losses = torch.where(labels >= 0, smoothed, losses)
        if self.alpha is None:
            return losses
        return losses * torch.where(labels >= 0, self.alpha, 1 - self.alpha)

    def _focal(self, log_p: Tensor) -> Tensor:
        """Return -(1 - p)^gamma log(p); see `focal_loss` for the clamp."""
        return -((-torch.expm1(log_p)).clamp(min=TINY) ** self.gamma) * log_p


class SigmoidCrossEntropy(SigmoidFocalLoss):
    """-alpha_t log(p_t) of the K sigmoids of each anchor. RetinaNet eq. 1; eq. 3 with an alpha (arXiv:1708.02002)."""

    def __init__(self, alpha: float | None = None, label_smoothing: float = 0.0, class_weights: Weights = None) -> None:
        super().__init__(alpha, 0.0, label_smoothing, class_weights)


class SoftmaxCrossEntropy(SoftmaxFocalLoss):
    """-alpha_t log(p_t) of each anchor, with p_t from a softmax over K classes and background."""

    def __init__(self, alpha: float | None = None, label_smoothing: float = 0.0, class_weights: Weights = None) -> None:
        super().__init__(alpha, 0.0, label_smoothing, class_weights)
