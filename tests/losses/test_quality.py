import math

import pytest
import torch
from torch.testing import assert_close

from onestage.losses import QualityFocalLoss, VarifocalLoss
from onestage.types import BACKGROUND


def test_quality_focal_loss_at_even_odds_is_hand_computed() -> None:
    # p = 1/2, y = 0.8: |0.3|^2 ln 2. The same p at background: 0.25 ln 2.
    labels, quality = torch.tensor([[0, BACKGROUND]]), torch.tensor([[0.8, 0.0]])
    losses = QualityFocalLoss(beta=2.0).anchor_losses(torch.zeros(1, 2, 1), labels, quality)
    assert_close(losses, torch.tensor([[0.09 * math.log(2), 0.25 * math.log(2)]]))


def test_quality_focal_loss_and_gradient_are_zero_where_score_equals_quality() -> None:
    logits = torch.full((1, 1, 1), math.log(0.8 / 0.2), requires_grad=True)
    loss = QualityFocalLoss()(logits, torch.tensor([[0]]), torch.tensor([[0.8]]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert logits.grad.item() == pytest.approx(0, abs=1e-6)


def test_varifocal_loss_at_even_odds_is_hand_computed() -> None:
    # p = 1/2. q = 0.8: 0.8 ln 2. q = 0 and background: 0.75 * 0.25 ln 2.
    labels, quality = torch.tensor([[0, 0, BACKGROUND]]), torch.tensor([[0.8, 0.0, 0.0]])
    losses = VarifocalLoss(alpha=0.75, gamma=2.0).anchor_losses(torch.zeros(1, 3, 1), labels, quality)
    assert_close(losses, torch.tensor([[0.8, 0.1875, 0.1875]]) * math.log(2))
