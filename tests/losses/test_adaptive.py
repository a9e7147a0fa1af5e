import math

import torch
import torch.distributed as dist
from loss_references import random_anchors
from torch.testing import assert_close

from onestage.losses import AutomatedFocalLoss, SigmoidFocalLoss
from onestage.types import BACKGROUND


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
