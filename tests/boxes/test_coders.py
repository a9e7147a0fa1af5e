"""Box coders, overlaps and the way back to original pixels."""

import math

import torch
from torch.testing import assert_close

from onestage.boxes.coders import DeltaBoxCoder, GridBoxCoder
from onestage.boxes.geometry import paired_iou, pairwise_overlap, to_original
from onestage.types import Anchors


def anchors_of(boxes: torch.Tensor) -> Anchors:
    return Anchors(boxes, torch.ones(len(boxes)), (len(boxes),))


def test_encode_shifted_taller_box_gives_hand_computed_deltas_and_decode_the_box() -> None:
    anchor = anchors_of(torch.tensor([[50.0, 50.0, 20.0, 40.0]]))  # cxcywh
    gt_box = torch.tensor([[50.0, 30.0, 70.0, 110.0]])  # centre (60, 70), 20 x 80
    # dx = (60 - 50) / 20 / 0.1 = 5    dy = (70 - 50) / 40 / 0.1 = 5    dw = ln(1) / 0.2 = 0    dh = ln(2) / 0.2
    deltas = torch.tensor([[5.0, 5.0, 0.0, 5 * math.log(2)]])
    assert_close(DeltaBoxCoder(variances=(0.1, 0.2)).encode(gt_box, anchor), deltas)
    assert_close(DeltaBoxCoder().decode(deltas, anchor), gt_box)


def test_grid_coder_gives_hand_computed_outputs_and_the_box_back() -> None:
    # Cell of 32 px around (48, 16), anchor 20 x 40; object with centre (56, 8) and 40 x 20.
    anchors = Anchors(torch.tensor([[48.0, 16.0, 20.0, 40.0]]), torch.tensor([32.0]), (1,))
    gt_box = torch.tensor([[36.0, -2.0, 76.0, 18.0]])
    # sigmoid(tx) = (56 - 32) / 32 = 3/4, tx = ln 3;  sigmoid(ty) = 8 / 32 = 1/4, ty = -ln 3
    outputs = torch.tensor([[math.log(3), -math.log(3), math.log(2), -math.log(2)]])
    assert_close(GridBoxCoder().encode(gt_box, anchors), outputs)
    assert_close(GridBoxCoder().decode(outputs, anchors), gt_box)


def test_grid_coder_stays_finite_on_the_border_of_a_cell_and_for_wild_outputs() -> None:
    anchors = Anchors(torch.tensor([[16.0, 16.0, 32.0, 32.0]]), torch.tensor([32.0]), (1,))
    encoded = GridBoxCoder().encode(torch.tensor([[-8.0, 0.0, 8.0, 64.0]]), anchors)  # centre (0, 32)
    assert encoded.isfinite().all()
    assert_close(encoded[:, :2].sigmoid(), torch.tensor([[0.0, 1.0]]), atol=2e-6, rtol=0)
    wild = GridBoxCoder().decode(torch.tensor([[1e6, -1e6, 1e6, -1e6]]), anchors)
    assert_close(wild, torch.tensor([[32.0 - 1000, 0.0, 32.0 + 1000, 0.0]]))


def test_iou_of_half_covered_boxes_is_one_third_and_of_empty_boxes_zero() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [3.0, 3, 3, 3]])
    others = torch.tensor([[5.0, 0, 15, 10], [3.0, 3, 3, 3]])
    intersection, iou = pairwise_overlap(boxes, others)
    assert intersection.tolist() == [[50, 0], [0, 0]]
    assert_close(iou, torch.tensor([[1 / 3, 0.0], [0.0, 0.0]]))  # 50 / (100 + 100 - 50)
    assert_close(paired_iou(boxes, others), torch.tensor([1 / 3, 0.0]))


def test_to_original_undoes_a_stretch_and_a_letterbox_and_clips() -> None:
    boxes = torch.tensor([[30.0, 60.0, 150.0, 90.0], [-5.0, 0.0, 300.0, 300.0]]).expand(2, 2, 4)
    # 150 x 600 (width x height) stretched to 300 x 300; 600 x 300 at half its size, 75 px below the top
    placements = torch.tensor([[2.0, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 75.0]])
    original = to_original(boxes, placements, torch.tensor([[600, 150], [300, 600]]))  # height, width
    assert original[0].tolist() == [[15, 120, 75, 180], [0, 0, 150, 600]]
    assert original[1].tolist() == [[60, 0, 300, 30], [0, 0, 600, 300]]
