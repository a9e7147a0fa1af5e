"""Hand-written gradient of the focal loss of negatives, behind `focal.py`.

Autograd keeps eight tensors of the size of the logits for the plain formula, this form one (docs/focal_loss.md). It is
used where that saves at least 28 bytes x 2^23 = 235 MB.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOGITS = 2**23


def saves_memory(class_logits: Tensor) -> bool:
    """Return whether the fused form pays for logits [B, A, K]; a compiler fuses the plain formula itself."""
    return class_logits.numel() >= MIN_LOGITS and not torch.compiler.is_compiling()


class SumNegatives(torch.autograd.Function):
    """Sums of -p^gamma log(1 - p) over all sigmoids of an anchor but the one of its object's class.

    With p = sigmoid(x) and s = softplus(x) = -log(1 - p), RetinaNet appendix B:
        FL = p^gamma s       dFL/dx = p^gamma (gamma (1 - p) s + p)
    """

    @staticmethod
    def forward(ctx: Any, class_logits: Tensor, labels: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums, [B, A], and the logits of the objects' classes, [B, A]; arbitrary without an object.

        class_logits: [B, A, K]. labels: [B, A] int64. gamma: >= 0, a number or a scalar tensor without gradient.
        """
        is_positive = (labels >= 0)[..., None]  # [B, A, 1]
        class_of_anchor = labels.clamp(min=0)[..., None]  # [B, A, 1]
        p, losses = class_logits.sigmoid(), F.softplus(class_logits)
        modulation = p.pow(gamma)
        scaled = losses * gamma
        gradient = p.addcmul_(p, scaled, value=-1).add_(scaled).mul_(modulation)
        losses = losses.mul_(modulation)
        # One element per anchor is written, so the result does not depend on the order of writes.
        for terms in (losses, gradient):
            terms.scatter_(2, class_of_anchor, terms.gather(2, class_of_anchor).masked_fill_(is_positive, 0))
        ctx.save_for_backward(gradient, class_of_anchor, is_positive)
        return losses.sum(dim=2), class_logits.gather(2, class_of_anchor)[..., 0]

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, grad_true_logits: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits."""
        # `once_differentiable` misses this: the incoming gradient of a sum has no graph.
        if torch.is_grad_enabled():
            raise RuntimeError("the fused focal loss can be differentiated once only; leave out create_graph=True")
        gradient, class_of_anchor, is_positive = ctx.saved_tensors
        gradient = gradient * grad_sums[..., None]
        own = torch.where(is_positive, grad_true_logits[..., None], gradient.gather(2, class_of_anchor))
        return gradient.scatter_(2, class_of_anchor, own), None, None
