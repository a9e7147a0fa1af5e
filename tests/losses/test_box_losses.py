import math

import pytest
import torch
from torch.testing import assert_close

from onestage.boxes.coders import DeltaBoxCoder, GridBoxCoder
from onestage.losses import CIoULoss, DIoULoss, GIoULoss, GridBoxLoss, L1Loss, SmoothL1Loss, SquaredGridBoxLoss
from onestage.types import Anchors

ANCHOR_0_ALONE = torch.tensor([[True, False]])
ANCHORS = Anchors(torch.tensor([[50.0, 50.0, 20.0, 40.0], [10.0, 10.0, 8.0, 8.0]]), torch.ones(2), (2,))


def test_smooth_l1_of_one_positive_is_hand_computed() -> None:
    # The object of anchor 0 has deltas (5, 5, 0, 5 ln 2), see the coder's test; anchor 1 is background.
    gt_boxes = torch.tensor([[[50.0, 30.0, 70.0, 110.0], [0.0, 0.0, 0.0, 0.0]]])
    box_outputs = torch.tensor([[[4.5, 5.0, 3.0, 5 * math.log(2)], [9.0, 9.0, 9.0, 9.0]]], requires_grad=True)
    loss = SmoothL1Loss(beta=1.0)(box_outputs, gt_boxes, ANCHORS, DeltaBoxCoder(), ANCHOR_0_ALONE)
    # differences -0.5, 0, 3, 0: 0.5^2 / 2 + (3 - 1/2)
    assert_close(loss, torch.tensor(0.125 + 2.5))
    loss.backward()
    assert_close(box_outputs.grad, torch.tensor([[[-0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]))


SHIFTED = torch.tensor([[[50.0, 30.0, 70.0, 70.0], [0.0, 0.0, 0.0, 0.0]]])  # anchor 0 is 40, 30, 60, 70
ASPECT = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2  # v of CIoU; its weight is v / (1 - IoU + v)


@pytest.mark.parametrize(
    ("loss", "gt_box", "expected"),
    [
        # Overlap 10 of 30 wide: IoU 1/3; enclosing box 30 x 40 is covered whole; centres 10 apart, diagonal 50.
        (GIoULoss(), [50.0, 30.0, 70.0, 70.0], 2 / 3),
        (DIoULoss(), [50.0, 30.0, 70.0, 70.0], 2 / 3 + 10**2 / 50**2),
        (CIoULoss(), [50.0, 30.0, 70.0, 70.0], 2 / 3 + 10**2 / 50**2),  # the same aspect ratio
        # The anchor 20 x 40 inside an object 40 x 40 of the same centre: IoU 1/2, no distance of centres.
        (CIoULoss(), [30.0, 30.0, 70.0, 70.0], 0.5 + ASPECT * ASPECT / (0.5 + ASPECT)),
        # 20 wide, 20 apart, of one height: IoU 0, a third of the enclosing box empty.
        (GIoULoss(), [80.0, 30.0, 100.0, 70.0], 1 + 1 / 3),
    ],
)
def test_iou_losses_are_hand_computed(loss, gt_box, expected) -> None:
    gt_boxes = torch.tensor([[gt_box, [0.0, 0.0, 0.0, 0.0]]])
    box_outputs = torch.zeros(1, 2, 4, requires_grad=True)
    total = loss(box_outputs, gt_boxes, ANCHORS, DeltaBoxCoder(), ANCHOR_0_ALONE)
    total.backward()
    assert_close(total, torch.tensor(expected), rtol=1e-5, atol=0)
    assert (box_outputs.grad[0, 1] == 0).all()


# Far away both edges of a box of e^-100 px round to the same number.
FLAT = [[shift, shift, *flat] for shift in (1e4, -1e4, 6e4, 1e10) for flat in ((-500, -500), (1, -500), (-500, 1))]


@pytest.mark.parametrize("loss", [L1Loss(), GIoULoss(), DIoULoss(), CIoULoss()])
def test_extreme_outputs_and_flat_boxes_far_away_give_finite_loss_and_gradient(loss) -> None:
    for outputs in ([100.0] * 4, [-100.0] * 4, *FLAT):
        box_outputs = torch.tensor([[outputs] * 2], requires_grad=True)
        total = loss(box_outputs, SHIFTED, ANCHORS, DeltaBoxCoder(), ANCHOR_0_ALONE)
        total.backward()
        assert total.isfinite()
        assert box_outputs.grad.isfinite().all()


def test_no_positives_and_empty_boxes_give_zero_loss_and_gradient() -> None:
    box_outputs = torch.ones(1, 2, 4, requires_grad=True)
    loss = SmoothL1Loss()(box_outputs, torch.zeros(1, 2, 4), ANCHORS, DeltaBoxCoder(), ANCHOR_0_ALONE & False)
    loss.backward()
    assert loss == 0
    assert (box_outputs.grad == 0).all()


CELLS = Anchors(torch.tensor([[16.0, 16.0, 10.0, 20.0]] * 2), torch.tensor([32.0] * 2), (2,))


def test_grid_box_losses_equal_hand_computed_values_and_skip_other_anchors() -> None:
    gt_boxes = torch.tensor([[[3.0, 6.0, 13.0, 26.0], [0.0, 0.0, 0.0, 0.0]]])  # centre (8, 16): sigmoids 1/4, 1/2
    outputs = torch.tensor([[[0.0, 0.0, 0.2, -0.4], [5.0, 5.0, 5.0, 5.0]]], requires_grad=True)
    sizes = (0.2**2 + 0.4**2) / 2
    found = GridBoxLoss().per_anchor_loss(outputs, gt_boxes, CELLS, GridBoxCoder(), ANCHOR_0_ALONE)
    assert_close(found, torch.tensor([[2 * math.log(2) + sizes, 0.0]]))
    found = SquaredGridBoxLoss()(outputs, gt_boxes, CELLS, GridBoxCoder(), ANCHOR_0_ALONE)
    assert_close(found, torch.tensor(0.25**2 / 2 + sizes))
    found.backward()
    assert (outputs.grad[0, 1] == 0).all()
