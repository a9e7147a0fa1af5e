import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder
from torchvision.ops import box_convert

from onestage.boxes.coders import DeltaBoxCoder, GridBoxCoder
from onestage.errors import ConfigError
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


def test_round_trip_over_a_batch_agrees_with_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.rand(7, 4, generator=generator) * 50 + 10
    low = torch.rand(3, 7, 2, generator=generator) * 100
    gt_boxes = torch.cat([low, low + 5 + torch.rand(3, 7, 2, generator=generator) * 80], dim=-1)
    coder, reference = DeltaBoxCoder(), TorchvisionCoder((10.0, 10.0, 5.0, 5.0))
    deltas = coder.encode(gt_boxes, anchors_of(anchors))
    decoded = coder.decode(deltas, anchors_of(anchors))
    assert_close(decoded, gt_boxes, atol=1e-4, rtol=1e-5)
    anchors_xyxy = box_convert(anchors, "cxcywh", "xyxy")
    for i in range(3):
        assert_close(deltas[i], reference.encode_single(gt_boxes[i], anchors_xyxy), atol=1e-4, rtol=1e-5)
        assert_close(decoded[i], reference.decode_single(deltas[i], anchors_xyxy), atol=1e-4, rtol=1e-5)


def test_decode_of_a_wild_delta_is_finite() -> None:
    anchor = anchors_of(torch.tensor([[100.0, 100.0, 16.0, 16.0]]))
    boxes = DeltaBoxCoder().decode(torch.tensor([[0.0, 0.0, 1e6, -1e6]]), anchor)
    assert_close(boxes, torch.tensor([[100.0 - 500, 100.0, 100.0 + 500, 100.0]]))  # 62.5 * 16 / 2 = 500


@pytest.mark.parametrize("variances", [(0.1,), (0.0, 0.2), (-0.1, 0.2), (float("nan"), 0.2)])
def test_variances_that_are_not_two_positive_numbers_are_refused(variances) -> None:
    with pytest.raises(ConfigError, match="variances must be two numbers > 0"):
        DeltaBoxCoder(variances)


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
