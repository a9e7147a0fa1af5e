import math

import pytest
import torch
import torch.nn.functional as F
from loss_references import one_hot, random_anchors
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from onestage.losses import SigmoidCrossEntropy, SigmoidFocalLoss, SoftmaxCrossEntropy, SoftmaxFocalLoss
from onestage.types import BACKGROUND, IGNORE

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.5]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_focal_loss_at_even_odds_is_hand_computed() -> None:
    logits = torch.zeros(1, 1, 1)
    loss = SigmoidFocalLoss(alpha=0.25, gamma=2.0)
    # p = 1/2: alpha_t * (1/2)^2 * ln 2, alpha_t = 1/4 for a positive and 3/4 for a negative
    assert_close(loss(logits, torch.tensor([[0]])), torch.tensor(0.0625 * math.log(2)))
    assert_close(loss(logits, torch.tensor([[BACKGROUND]])), torch.tensor(0.1875 * math.log(2)))
    assert loss(logits, torch.tensor([[IGNORE]])) == 0


@pytest.mark.parametrize(("p", "gamma"), [(0.8, 2.0), (0.3, 2.0), (0.6, 0.5), (0.05, 5.0)])
def test_gradient_equals_the_derivative_by_p_t(p: float, gamma: float) -> None:
    # dFL/dp_t = alpha (1 - p_t)^(gamma - 1) (gamma ln p_t - (1 - p_t) / p_t), and dp/dx = p (1 - p)
    by_p_t = 0.25 * (1 - p) ** (gamma - 1) * (gamma * math.log(p) - (1 - p) / p)
    logits = torch.full((1, 1, 1), logit(p), dtype=torch.float64, requires_grad=True)
    SigmoidFocalLoss(0.25, gamma)(logits, torch.tensor([[0]])).backward()
    assert logits.grad.item() == pytest.approx(by_p_t * p * (1 - p), rel=1e-9)


def test_softmax_focal_loss_of_three_equal_logits_is_hand_computed() -> None:
    # Two classes and background, p = 1/3 each: alpha_t (2/3)^2 ln 3
    loss, logits = SoftmaxFocalLoss(alpha=0.25, gamma=2.0), torch.zeros(1, 1, 3)
    assert_close(loss(logits, torch.tensor([[1]])), torch.tensor(0.25 * 4 / 9 * math.log(3)))
    assert_close(loss(logits, torch.tensor([[BACKGROUND]])), torch.tensor(0.75 * 4 / 9 * math.log(3)))
    assert loss(logits, torch.tensor([[IGNORE]])) == 0


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, None])
def test_focal_loss_and_gradient_equal_torchvision(alpha, gamma) -> None:
    logits, labels = random_anchors(3)
    loss = SigmoidFocalLoss(alpha, gamma)(logits, labels)
    (gradient,) = torch.autograd.grad(3 * loss, logits)

    terms = sigmoid_focal_loss(logits, one_hot(labels, logits), alpha=-1 if alpha is None else alpha, gamma=gamma)
    expected = terms[labels != IGNORE].sum()
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_loss_without_gamma_is_cross_entropy_smoothed_at_positives_only(smoothing) -> None:
    logits, labels = random_anchors(4, num_classes=3)
    targets, flat = torch.where(labels >= 0, labels, 3).flatten(), logits.flatten(0, 1)
    plain = F.cross_entropy(flat, targets, reduction="none").view_as(labels)
    smoothed = F.cross_entropy(flat, targets, reduction="none", label_smoothing=smoothing).view_as(labels)
    expected = torch.where(labels >= 0, smoothed, torch.where(labels == BACKGROUND, plain, 0.0))
    assert_close(SoftmaxFocalLoss(None, 0.0, smoothing).anchor_losses(logits, labels), expected)
    assert_close(SoftmaxCrossEntropy(None, smoothing).anchor_losses(logits, labels), expected)


def test_smoothed_sigmoids_of_a_positive_mix_both_targets_and_background_is_unchanged() -> None:
    # gamma 0, no alpha, two classes, smoothing 0.2: targets 0.9 and 0.1
    logits = torch.tensor([[[logit(0.8), logit(0.3)]]])
    loss = SigmoidCrossEntropy(label_smoothing=0.2)
    own = -0.9 * math.log(0.8) - 0.1 * math.log(0.2)
    other = -0.1 * math.log(0.3) - 0.9 * math.log(0.7)
    assert_close(loss(logits, torch.tensor([[0]])), torch.tensor(own + other))
    assert_close(loss(logits, torch.tensor([[BACKGROUND]])), torch.tensor(-math.log(0.2) - math.log(0.7)))
