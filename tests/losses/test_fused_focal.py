"""The hand-written gradient against the plain formula and against finite differences."""

import pytest
import torch
from loss_references import random_anchors
from torch.testing import assert_close

from onestage.losses import AutomatedFocalLoss, SigmoidFocalLoss, focal, fused_focal
from onestage.types import BACKGROUND

LOSSES = [
    lambda: SigmoidFocalLoss(),
    lambda: SigmoidFocalLoss(None, 0.5),
    lambda: SigmoidFocalLoss(1.0, 0.0),
    lambda: SigmoidFocalLoss(0.25, 3.5, class_weights=[0.5, 2.0, 1.0]),
    lambda: AutomatedFocalLoss(),
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(focal, "saves_memory", lambda class_logits: True)


def loss_and_gradient(loss, logits, labels):
    total = loss(logits, labels)
    return total, *torch.autograd.grad(total, logits)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_fused_loss_and_gradient_equal_the_plain_formula(make, size, monkeypatch) -> None:
    logits, labels = random_anchors(3)
    logits = (logits.detach() * size).requires_grad_()
    expected = loss_and_gradient(make(), logits, labels)
    monkeypatch.setattr(focal, "saves_memory", lambda class_logits: True)
    assert_close(loss_and_gradient(make(), logits, labels), expected, rtol=1e-4, atol=1e-6)


def test_second_derivative_is_refused(fused) -> None:
    logits, labels = random_anchors(3)
    with pytest.raises(RuntimeError, match="can be differentiated once only; leave out create_graph=True"):
        torch.autograd.grad(SigmoidFocalLoss()(logits, labels), logits, create_graph=True)


def test_fused_form_is_used_from_8_million_logits_on_and_not_in_a_compiled_graph(monkeypatch) -> None:
    assert not fused_focal.saves_memory(torch.empty(1, device="meta").expand(32, 2390, 20))  # the small SSD
    assert not fused_focal.saves_memory(torch.empty(1, device="meta").expand(32, 8732, 20))  # SSD300, VOC
    assert fused_focal.saves_memory(torch.empty(1, device="meta").expand(32, 8732, 80))  # SSD300, COCO
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fused_focal.saves_memory(torch.empty(1, device="meta").expand(32, 8732, 80))


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
