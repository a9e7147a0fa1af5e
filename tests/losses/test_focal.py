"""Focal losses by hand and against torchvision, and their hand-written gradient against the plain formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_references import random_anchors
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from onestage.losses import AutomatedFocalLoss, QualityFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss, VarifocalLoss
from onestage.losses.fused_focal import saves_memory
from onestage.types import BACKGROUND, IGNORE

LN2, LN3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    ("loss", "num_logits", "labels", "quality", "expected"),
    [
        # p = 1/2: alpha_t * (1/2)^2 * ln 2, alpha_t = 1/4 for a positive and 3/4 for a negative
        (SigmoidFocalLoss(0.25, 2.0), 1, [0, BACKGROUND, IGNORE], [1, 1, 1], [0.0625 * LN2, 0.1875 * LN2, 0]),
        # Two classes and background, p = 1/3 each: alpha_t (2/3)^2 ln 3
        (SoftmaxFocalLoss(0.25, 2.0), 3, [1, BACKGROUND, IGNORE], [1, 1, 1], [1 / 9 * LN3, 3 / 9 * LN3, 0]),
        # y = 0.8: |0.3|^2 ln 2. The same p at background: 0.25 ln 2.
        (QualityFocalLoss(2.0), 1, [0, BACKGROUND], [0.8, 0], [0.09 * LN2, 0.25 * LN2]),
        # q = 0.8: 0.8 ln 2. q = 0 and background: 0.75 * 0.25 ln 2.
        (VarifocalLoss(0.75, 2.0), 1, [0, 0, BACKGROUND], [0.8, 0, 0], [0.8 * LN2, 0.1875 * LN2, 0.1875 * LN2]),
    ],
)
def test_loss_of_equal_logits_is_hand_computed(loss, num_logits, labels, quality, expected) -> None:
    logits = torch.zeros(1, len(labels), num_logits)
    losses = loss.anchor_losses(logits, torch.tensor([labels]), torch.tensor([quality]).float())
    assert_close(losses, torch.tensor([expected]).float())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, None])
def test_focal_loss_and_gradient_equal_torchvision(alpha, gamma) -> None:
    logits, labels = random_anchors(3)
    loss = SigmoidFocalLoss(alpha, gamma)(logits, labels)
    (gradient,) = torch.autograd.grad(3 * loss, logits)

    targets = F.one_hot(labels.clamp(min=0), 3) * (labels >= 0)[..., None].float()
    terms = sigmoid_focal_loss(logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma)
    expected = terms[labels != IGNORE].sum()
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


LOSSES = [
    lambda: SigmoidFocalLoss(),
    lambda: SigmoidFocalLoss(None, 0.5),
    lambda: SigmoidFocalLoss(1.0, 0.0),
    lambda: SigmoidFocalLoss(0.25, 3.5, class_weights=[0.5, 2.0, 1.0]),
    lambda: AutomatedFocalLoss(),
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestage.losses.focal.saves_memory", lambda class_logits: True)


def loss_and_gradient(loss, logits, labels):
    total = loss(logits, labels)
    return total, *torch.autograd.grad(total, logits)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_fused_loss_and_gradient_equal_the_plain_formula(make, size, monkeypatch) -> None:
    logits, labels = random_anchors(3)
    logits = (logits.detach() * size).requires_grad_()
    expected = loss_and_gradient(make(), logits, labels)
    monkeypatch.setattr("onestage.losses.focal.saves_memory", lambda class_logits: True)
    assert_close(loss_and_gradient(make(), logits, labels), expected, rtol=1e-4, atol=1e-6)


def test_second_derivative_is_refused(fused) -> None:
    logits, labels = random_anchors(3)
    with pytest.raises(RuntimeError, match="can be differentiated once only; leave out create_graph=True"):
        torch.autograd.grad(SigmoidFocalLoss()(logits, labels), logits, create_graph=True)


def test_fused_form_is_used_from_8_million_logits_on_and_not_in_a_compiled_graph(monkeypatch) -> None:
    assert not saves_memory(torch.empty(1, device="meta").expand(32, 2390, 20))  # the small SSD
    assert not saves_memory(torch.empty(1, device="meta").expand(32, 8732, 20))  # SSD300, VOC
    assert saves_memory(torch.empty(1, device="meta").expand(32, 8732, 80))  # SSD300, COCO
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not saves_memory(torch.empty(1, device="meta").expand(32, 8732, 80))


def test_fused_form_keeps_one_tensor_of_the_size_of_the_logits(fused) -> None:
    logits, labels = torch.zeros(2, 500, 50, requires_grad=True), torch.full((2, 500), BACKGROUND)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        SigmoidFocalLoss()(logits, labels)
    large = [size for size in kept.values() if size >= logits.nbytes]
    assert large == [logits.nbytes]
