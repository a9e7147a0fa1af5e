"""The focal loss of a batch, forward and backward: torchvision's with one-hot targets, ours, and ours compiled."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from benchmarks.timing import compare
from onestage.losses import ClassificationLoss, MinedCrossEntropy, SigmoidFocalLoss, SoftmaxFocalLoss
from onestage.types import BACKGROUND

SHARE_OF_POSITIVES = 0.005  # about 40 of SSD300's 8732 anchors


def run(rounds: int, quick: bool) -> None:
    """Compare at 32 images of SSD300 with COCO's 80 classes."""
    num_images, num_anchors, num_classes = (2, 100, 5) if quick else (32, 8732, 80)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    logits = torch.randn(num_images, num_anchors, num_classes, device=device) - 4
    is_object = torch.rand(num_images, num_anchors, device=device) < SHARE_OF_POSITIVES
    classes = torch.randint(0, num_classes, is_object.shape, device=device)
    labels = torch.where(is_object, classes, BACKGROUND)

    focal = SigmoidFocalLoss()
    contestants = {
        "torchvision.ops.sigmoid_focal_loss, one-hot targets": _torchvision_step(logits, labels),
        "onestage, SigmoidFocalLoss": _step(focal, logits, labels),
        "onestage, SigmoidFocalLoss, compiled": _step(torch.compile(focal), logits, labels),
    }
    _assert_same(contestants)
    with_background = torch.cat([logits, logits.new_zeros(num_images, num_anchors, 1)], dim=2)
    contestants |= {
        "onestage, SoftmaxFocalLoss": _step(SoftmaxFocalLoss(), with_background, labels),
        "onestage, MinedCrossEntropy": _step(MinedCrossEntropy(), with_background, labels),
    }
    shape = f"{num_images} x {num_anchors} x {num_classes}"
    compare(f"classification loss of {shape} logits, forward and backward, {device.type}", contestants, rounds)


def _torchvision_step(logits: Tensor, labels: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    logits = logits.clone().requires_grad_()
    num_classes = logits.shape[2]

    def step() -> tuple[Tensor, Tensor]:
        column = torch.where(labels >= 0, labels, num_classes)[..., None]
        targets = logits.new_zeros(*labels.shape, num_classes + 1).scatter_(2, column, 1)[..., :-1]
        loss = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    return step


def _step(
    loss_function: ClassificationLoss | Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    logits = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_function(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    return step


def _assert_same(contestants: dict[str, Callable[[], tuple[Tensor, Tensor]]]) -> None:
    expected_loss, expected_gradient = next(iter(contestants.values()))()
    for name, step in contestants.items():
        loss, gradient = step()
        assert abs(loss / expected_loss - 1) < 1e-4, f"{name}: another loss"
        assert (gradient - expected_gradient).abs().max() < 1e-5, f"{name}: another gradient"
    print("asserted: the same loss within 0.01 %, the same gradient within 1e-5")
