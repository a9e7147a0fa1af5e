import math

import pytest
import torch
import torch.nn.functional as F
from loss_references import one_hot, random_anchors
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from onestage.losses import QualityFocalLoss, SigmoidFocalLoss, SoftmaxCrossEntropy, SoftmaxFocalLoss, VarifocalLoss
from onestage.types import BACKGROUND, IGNORE

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.5]


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
