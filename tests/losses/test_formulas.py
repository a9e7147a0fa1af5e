"""Loss and gradient of every loss against its formula in float64, also where sigmoids round to 0 or 1 in float32.

The formulas use the margin, the logit of an answer minus the logit of all others together:
p = sigmoid(margin), -log(p) = softplus(-margin).
"""

import pytest
import torch
import torch.nn.functional as F
from loss_references import FAMILY
from torch import Tensor
from torch.testing import assert_close

from onestage.types import BACKGROUND

QUALITY = 0.75


def focal(margin: Tensor, gamma: float) -> Tensor:
    return torch.sigmoid(-margin) ** gamma * F.softplus(-margin, threshold=50)


def sigmoids(alpha: float | None, gamma: float, smoothing: float = 0.0, weights: tuple[float, ...] = (1, 1, 1)):
    def anchor_loss(x: Tensor, label: int) -> Tensor:
        as_positive = focal(x, gamma) * (1 if alpha is None else alpha)
        as_negative = focal(-x, gamma) * (1 if alpha is None else 1 - alpha)
        if label == BACKGROUND:
            return as_negative.sum()
        targets = torch.full_like(x, smoothing / 2)
        targets[label] = 1 - smoothing / 2
        return weights[label] * (targets * as_positive + (1 - targets) * as_negative).sum()

    return anchor_loss


def softmax(alpha: float | None, gamma: float, smoothing: float = 0.0):
    def anchor_loss(x: Tensor, label: int) -> Tensor:
        others = torch.stack([torch.cat([x[:column], x[column + 1 :]]).logsumexp(0) for column in range(len(x))])
        answers = focal(x - others, gamma)
        if label == BACKGROUND:
            return answers[-1] * (1 if alpha is None else 1 - alpha)
        smoothed = (1 - smoothing) * answers[label] + smoothing * answers.mean()
        return smoothed * (1 if alpha is None else alpha)

    return anchor_loss


def quality_focal(x: Tensor, label: int) -> Tensor:
    terms = focal(-x, 2.0)
    if label >= 0:
        distance = (QUALITY - torch.sigmoid(x[label])).abs()
        cross_entropy = F.softplus(x[label], threshold=50) - QUALITY * x[label]
        terms = torch.cat([terms[:label], terms[label + 1 :], (distance**2 * cross_entropy)[None]])
    return terms.sum()


def varifocal(x: Tensor, label: int) -> Tensor:
    terms = 0.75 * focal(-x, 2.0)
    if label >= 0:
        found = QUALITY * (F.softplus(x[label], threshold=50) - QUALITY * x[label])
        terms = torch.cat([terms[:label], terms[label + 1 :], found[None]])
    return terms.sum()


REFERENCES = {
    "focal": sigmoids(0.25, 2.0),
    "focal, gamma 0.5": sigmoids(None, 0.5),
    "focal, smoothed": sigmoids(0.25, 2.0, 0.1),
    "focal, weighted": sigmoids(0.25, 2.0, weights=(0.5, 2.0, 1.0)),
    "softmax focal": softmax(0.25, 2.0),
    "softmax focal, gamma 0.5": softmax(None, 0.5),
    "softmax focal, smoothed": softmax(0.25, 0.5, 0.1),
    "cross-entropy": sigmoids(None, 0.0),
    "balanced": sigmoids(0.25, 0.0),
    "softmax cross-entropy": softmax(None, 0.0, 0.1),
    "mining": softmax(None, 0.0),  # all anchors are mined, and among the eight hardest
    "OHEM": softmax(None, 0.0),
    "adaptive": sigmoids(0.25, 2.0),  # before the first positive anchor
    "quality": quality_focal,
    "varifocal": varifocal,
}


@pytest.mark.parametrize("size", [100.0, 30.0, 0.7])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_equal_the_formula(name, size) -> None:
    loss = FAMILY[name]().eval()
    signs = torch.tensor([[1.0, -1, -1, -1], [-1, 1, -1, 1], [1, 1, -1, -1], [-1, -1, -1, 1]]).repeat(2, 1)
    signs = signs[:, : loss.num_logits(3)]
    labels = torch.tensor([[0, 0, 2, 1, BACKGROUND, 1, 2, BACKGROUND]])
    # Shifted by column, so that no two logits of a softmax are equal.
    logits = (size * signs + torch.arange(signs.shape[1])).float()[None].requires_grad_()
    losses = loss.anchor_losses(logits, labels, torch.full(labels.shape, QUALITY))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)

    exact = logits.detach().double().requires_grad_()
    expected = torch.stack([REFERENCES[name](exact[0, row], int(labels[0, row])) for row in range(labels.shape[1])])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert expected.max() > 0.05 * size
    assert_close(losses[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
