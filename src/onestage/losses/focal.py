"""Focal loss (arXiv:1708.02002) with sigmoids and with a softmax, and cross-entropy, which it is at gamma = 0."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.losses.arguments import require_focal_arguments
from onestage.losses.class_weights import ClassWeights
from onestage.losses.classification import SigmoidClassificationLoss, SoftmaxClassificationLoss, true_column


class SigmoidFocalLoss(SigmoidClassificationLoss):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) of each anchor's K sigmoids. RetinaNet eq. 5 (arXiv:1708.02002).

    Of a background anchor all K sigmoids are negatives, of a positive one all but that of its class.

    Smoothing is that of YOLO's classifiers: at positive anchors the target of the object's class is 1 - smoothing / 2
    and that of the others smoothing / 2, and the loss is the mixture of the losses of both answers. Background is not
    smoothed: its 10^5 sigmoids would all be held up at smoothing / 2, above most thresholds of a detector.

    Args:
        alpha: weight of positives, 0..1; negatives weigh 1 - alpha. None: both weigh 1, eq. 4.
        gamma: how much less easy examples count, 0..100; 0 is cross-entropy.
        label_smoothing: share of doubt in the targets of positive anchors, 0..1.
        class_weights: see `ClassificationLoss`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(class_weights)
        require_focal_arguments(type(self).__name__, alpha, gamma, label_smoothing)
        self.alpha = alpha
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Sum the focal loss over the sigmoids of each anchor."""
        negative_weight, positive_weight = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)
        gamma = self.current_gamma()
        negatives, true_logits = negative_costs(class_logits, labels, gamma)
        negatives = negative_weight * negatives
        positives = positive_weight * negative_cost(-true_logits, gamma)
        if self.label_smoothing == 0:
            return negatives + torch.where(labels >= 0, positives, 0.0)

        doubt = self.label_smoothing / 2
        others_as_positives, _ = negative_costs(-class_logits, labels, gamma)
        others = (1 - doubt) * negatives + doubt * positive_weight * others_as_positives
        own = (1 - doubt) * positives + doubt * negative_weight * negative_cost(true_logits, gamma)
        return torch.where(labels >= 0, others + own, negatives)

    def current_gamma(self) -> float | Tensor:
        """Return gamma, a number or a scalar tensor without gradient."""
        return self.gamma

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, label_smoothing={self.label_smoothing}"


class SoftmaxFocalLoss(SoftmaxClassificationLoss):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) with p_t from a softmax over K classes and background.

    RetinaNet's section 3 says in a footnote that this form works well, and goes on with sigmoids (arXiv:1708.02002).

    Smoothing at positive anchors is that of arXiv:1512.00567, section 7: the target is 1 - smoothing on the object's
    class, plus smoothing / (K + 1) on every logit, background's too; the loss is the mixture of the losses of these
    answers. Background is not smoothed, as with sigmoids.

    Args:
        alpha: weight of positive anchors, 0..1; background weighs 1 - alpha. None: both weigh 1.
        gamma: how much less easy examples count, 0..100; 0 is softmax cross-entropy.
        label_smoothing: share of doubt in the targets of positive anchors, 0..1.
        class_weights: see `ClassificationLoss`.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(class_weights)
        require_focal_arguments(type(self).__name__, alpha, gamma, label_smoothing)
        self.alpha = alpha
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the focal loss of the one true answer of each anchor."""
        log_probabilities = class_logits.log_softmax(dim=-1)
        log_p_t = log_probabilities.gather(2, true_column(class_logits, labels)[..., None])[..., 0]
        costs: Tensor = _FocalOfLogProbability.apply(log_p_t, self.gamma)
        if self.label_smoothing > 0:
            every_answer = _FocalOfLogProbability.apply(log_probabilities, self.gamma).mean(dim=-1)
            smoothed = (1 - self.label_smoothing) * costs + self.label_smoothing * every_answer
            costs = torch.where(labels >= 0, smoothed, costs)
        if self.alpha is None:
            return costs
        return costs * torch.where(labels >= 0, self.alpha, 1 - self.alpha)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"alpha={self.alpha}, gamma={self.gamma}, label_smoothing={self.label_smoothing}"


class SigmoidCrossEntropy(SigmoidFocalLoss):
    """-alpha_t log(p_t) of each anchor's K sigmoids. RetinaNet eq. 1, and eq. 3 with an alpha (arXiv:1708.02002).

    Args:
        alpha: weight of positives, 0..1; negatives weigh 1 - alpha. None: both weigh 1.
        label_smoothing: as in `SigmoidFocalLoss`.
        class_weights: see `ClassificationLoss`.
    """

    def __init__(
        self,
        alpha: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(alpha, 0.0, label_smoothing, class_weights)


class SoftmaxCrossEntropy(SoftmaxFocalLoss):
    """-alpha_t log(p_t) of each anchor, with p_t from a softmax over K classes and background.

    Args:
        alpha: weight of positive anchors, 0..1; background weighs 1 - alpha. None: both weigh 1.
        label_smoothing: as in `SoftmaxFocalLoss`.
        class_weights: see `ClassificationLoss`.
    """

    def __init__(
        self,
        alpha: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(alpha, 0.0, label_smoothing, class_weights)


def negative_costs(class_logits: Tensor, labels: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sum `negative_cost` over the sigmoids of each anchor that should be 0: all but that of its object's class.

    This is where nearly all terms of a sigmoid loss are, B x A x K of them, hence written to touch memory seldom: no
    targets of that shape are made, and of all values only the gradient is kept for backward.

    Args:
        class_logits: [B, A, K].
        labels: [B, A] int64.
        gamma: at least 0, a number or a scalar tensor without gradient.

    Returns:
        The sums, [B, A], and the logits that should be 1, [B, A]; of anchors without object the first class's, which
        must not be used.
    """
    costs, true_logits = _NegativeCosts.apply(class_logits, labels, gamma)
    return costs, true_logits


def negative_cost(logits: Tensor, gamma: float | Tensor) -> Tensor:
    """Return -p^gamma log(1 - p), the focal loss of a sigmoid that should be 0, elementwise; of one that should be 1 at
    the negative of its logit.
    """  # noqa: D205 # one sentence, too long for one line
    cost: Tensor = _NegativeCost.apply(logits, gamma)
    return cost


def _focal_terms(logits: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s and p^gamma, the factors of the focal loss of negatives, and the derivative of their product.

    Elementwise; finite for logits of up to 1e36 in size.

    With p = sigmoid(x) and s = softplus(x) = -log(1 - p), RetinaNet appendix B:
        FL = p^gamma s       dFL/dx = p^gamma (gamma (1 - p) s + p)
    Written out rather than left to autograd also because the derivative of p^gamma alone is infinite at p = 0 for
    gamma < 1.
    """
    probability = logits.sigmoid()
    cross_entropy = F.softplus(logits)
    modulation = probability.pow(gamma)
    scaled = cross_entropy * gamma
    gradient = probability.addcmul_(probability, scaled, value=-1).add_(scaled).mul_(modulation)
    return cross_entropy, modulation, gradient


def _refuse_second_derivatives() -> None:
    """Raise where a derivative is to be differentiated: it was saved as a number, and the second would be wrong.

    torch's `once_differentiable` sees that only where the incoming gradient has a graph, which that of a sum has not.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the focal losses can be differentiated once only; leave out create_graph=True")


class _NegativeCost(torch.autograd.Function):
    """`negative_cost`, with the derivative written out."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gamma: float | Tensor) -> Tensor:
        cross_entropy, modulation, gradient = _focal_terms(logits, gamma)
        ctx.save_for_backward(gradient)
        # Not in place: compiled by torch 2.11, an output that was written in place has a gradient of 0, without a word.
        return cross_entropy * modulation

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        (gradient,) = ctx.saved_tensors
        return grad_cost * gradient, None


class _NegativeCosts(torch.autograd.Function):
    """`negative_costs`: one pass for all sigmoids, put right at the one logit of each positive anchor."""

    @staticmethod
    def forward(ctx: Any, class_logits: Tensor, labels: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
        is_positive = (labels >= 0)[..., None]  # [B, A, 1]
        class_of_anchor = labels.clamp(min=0)[..., None]  # [B, A, 1]
        cross_entropy, modulation, gradient = _focal_terms(class_logits, gamma)
        costs = cross_entropy.mul_(modulation)
        # One logit of each anchor is written, so that no two writes meet: the same result on every run.
        for terms in (costs, gradient):
            terms.scatter_(2, class_of_anchor, terms.gather(2, class_of_anchor).masked_fill_(is_positive, 0))
        ctx.save_for_backward(gradient, class_of_anchor, is_positive)
        return costs.sum(dim=2), class_logits.gather(2, class_of_anchor)[..., 0]

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor, grad_true_logits: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        gradient, class_of_anchor, is_positive = ctx.saved_tensors
        gradient = gradient * grad_costs[..., None]
        own = torch.where(is_positive, grad_true_logits[..., None], gradient.gather(2, class_of_anchor))
        return gradient.scatter_(2, class_of_anchor, own), None, None


class _FocalOfLogProbability(torch.autograd.Function):
    """-(1 - p)^gamma log(p) of u = log(p), elementwise; finite, with its derivative, for u in -inf < u <= 0.

    dFL/du = -(1 - p)^gamma (1 - gamma p u / (1 - p)), where u / (1 - p) goes to -1 as p goes to 1.
    """

    @staticmethod
    def forward(ctx: Any, log_probability: Tensor, gamma: float) -> Tensor:
        complement = -torch.expm1(log_probability)  # 1 - p
        is_certain = complement == 0
        ratio = torch.where(is_certain, -1.0, log_probability / complement.masked_fill(is_certain, 1))
        modulation = complement.pow(gamma)
        ctx.save_for_backward(-modulation * (1 - gamma * log_probability.exp() * ratio))
        return -modulation * log_probability

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        (gradient,) = ctx.saved_tensors
        return grad_cost * gradient, None
