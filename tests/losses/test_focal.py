"""Sigmoid focal loss against torchvision, its fused form against the plain one, and its gamma that adapts."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from annotation_sets import random_anchors
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from onestage.losses import AutomatedFocalLoss, SigmoidFocalLoss, VarifocalLoss
from onestage.losses.fused_focal import saves_memory
from onestage.types import BACKGROUND, IGNORE


def test_varifocal_loss_of_an_object_without_overlap_is_that_of_background() -> None:
    losses = VarifocalLoss(0.75, 2.0).anchor_losses(torch.zeros(1, 1, 1), torch.tensor([[0]]), torch.zeros(1, 1))
    assert_close(losses, torch.tensor([[0.75 * 0.25 * math.log(2)]]))  # p = 1/2


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


def step(loss: AutomatedFocalLoss, *probabilities: float) -> None:
    logits = torch.tensor(probabilities).logit()[None, :, None].requires_grad_()
    loss(logits, torch.zeros(1, len(probabilities), dtype=torch.int64))


def test_gamma_is_minus_log_of_the_bias_corrected_running_mean() -> None:
    loss = AutomatedFocalLoss(momentum=0.75)
    assert loss.current_gamma() == 2.0  # no positive anchor yet
    step(loss, 0.1, 0.3)
    assert_close(loss.current_gamma(), torch.tensor(-math.log(0.2)))  # from the first batch on
    step(loss, 0.9)
    # weights 3/16 and 4/16, 7/16 together: (3/16 * 0.2 + 4/16 * 0.9) / (7/16)
    assert_close(loss.current_gamma(), torch.tensor(-math.log((3 * 0.2 + 4 * 0.9) / 7)))
    other = AutomatedFocalLoss()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss.current_gamma(), other.current_gamma())
    underflown = AutomatedFocalLoss()
    underflown(torch.full((1, 1, 1), -200.0, requires_grad=True), torch.tensor([[0]]))
    assert underflown.current_gamma().isfinite()


def test_gamma_is_unchanged_by_batches_without_objects_evaluation_and_no_grad() -> None:
    loss = AutomatedFocalLoss()
    step(loss, 0.5)
    gamma = loss.current_gamma()
    loss(torch.zeros(1, 3, 1, requires_grad=True), torch.full((1, 3), BACKGROUND))
    assert torch.equal(loss.current_gamma(), gamma)
    loss.eval()
    step(loss, 0.9)
    loss.train()
    with torch.no_grad():
        loss(torch.zeros(1, 1, 1), torch.tensor([[0]]))
    assert torch.equal(loss.current_gamma(), gamma)


def test_running_mean_is_over_the_positives_of_all_processes(monkeypatch) -> None:
    loss = AutomatedFocalLoss()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    # The other process has three positives whose p_t sum to 1.5: (0.1 + 1.5) / 4 = 0.4, not (0.1 + 0.5) / 2.
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(torch.tensor([1.5, 3.0])))
    step(loss, 0.1)
    assert_close(loss.current_gamma(), torch.tensor(-math.log(0.4)))


def test_loss_and_gradient_equal_focal_loss_with_the_current_gamma() -> None:
    logits, labels = random_anchors(3)
    loss = AutomatedFocalLoss(alpha=0.25)
    total = loss(logits, labels)
    expected = SigmoidFocalLoss(0.25, loss.current_gamma().item())(logits, labels)
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(expected, logits))
