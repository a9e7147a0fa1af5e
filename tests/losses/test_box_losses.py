import math

import pytest
import torch
from torch.testing import assert_close

from onestage.boxes.coders import DeltaBoxCoder
from onestage.errors import ConfigError
from onestage.losses import SmoothL1Loss

ANCHORS = torch.tensor([[50.0, 50.0, 20.0, 40.0], [10.0, 10.0, 8.0, 8.0]])  # cxcywh


def test_smooth_l1_of_one_positive_is_hand_computed() -> None:
    # The object of anchor 0 has deltas (5, 5, 0, 5 ln 2), see the coder's test; anchor 1 is background.
    gt_boxes = torch.tensor([[[50.0, 30.0, 70.0, 110.0], [0.0, 0.0, 0.0, 0.0]]])
    box_deltas = torch.tensor([[[4.5, 5.0, 3.0, 5 * math.log(2)], [9.0, 9.0, 9.0, 9.0]]], requires_grad=True)
    is_positive = torch.tensor([[True, False]])
    loss = SmoothL1Loss(beta=1.0)(box_deltas, gt_boxes, ANCHORS, DeltaBoxCoder(), is_positive)
    # differences -0.5, 0, 3, 0: 0.5^2 / 2 + (3 - 1/2)
    assert_close(loss, torch.tensor(0.125 + 2.5))
    loss.backward()
    assert_close(box_deltas.grad, torch.tensor([[[-0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]))


def test_beta_moves_the_bend() -> None:
    gt_boxes = torch.tensor([[[40.0, 30.0, 60.0, 70.0], [6.0, 6.0, 14.0, 14.0]]])  # the anchors themselves
    box_deltas = torch.tensor([[[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    is_positive = torch.tensor([[True, True]])
    for beta, expected in [(0.0, 0.5), (0.25, 0.5 - 0.125), (1.0, 0.125)]:
        loss = SmoothL1Loss(beta)(box_deltas, gt_boxes, ANCHORS, DeltaBoxCoder(), is_positive)
        assert_close(loss, torch.tensor(expected))


def test_no_positives_give_zero_loss_and_zero_gradient_even_with_empty_boxes() -> None:
    box_deltas = torch.ones(1, 2, 4, requires_grad=True)
    loss = SmoothL1Loss()(
        box_deltas, torch.zeros(1, 2, 4), ANCHORS, DeltaBoxCoder(), torch.zeros(1, 2, dtype=torch.bool)
    )
    loss.backward()
    assert loss == 0
    assert (box_deltas.grad == 0).all()


def test_bfloat16_deltas_are_widened() -> None:
    box_deltas = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    is_positive = torch.tensor([[True, True]])
    gt_boxes = torch.tensor([[[50.0, 30.0, 70.0, 110.0], [6.0, 6.0, 14.0, 14.0]]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = SmoothL1Loss()(box_deltas, gt_boxes, ANCHORS, DeltaBoxCoder(), is_positive)
    assert loss.dtype == torch.float32


def test_negative_beta_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"beta is -1\.0"):
        SmoothL1Loss(beta=-1.0)
