import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from onestage.boxes.geometry import paired_iou, pairwise_overlap, to_original


def test_iou_of_half_covered_boxes_is_one_third_and_of_empty_boxes_zero() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [3.0, 3, 3, 3]])
    others = torch.tensor([[5.0, 0, 15, 10], [3.0, 3, 3, 3]])
    intersection, iou = pairwise_overlap(boxes, others)
    assert intersection.tolist() == [[50, 0], [0, 0]]
    assert_close(iou, torch.tensor([[1 / 3, 0.0], [0.0, 0.0]]))  # 50 / (100 + 100 - 50)
    assert_close(paired_iou(boxes, others), torch.tensor([1 / 3, 0.0]))


def test_pairwise_and_paired_iou_equal_torchvision_for_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 9, 2, generator=generator) * 50
    boxes = torch.cat([low, low + torch.rand(2, 9, 2, generator=generator) * 60], dim=-1)
    iou = pairwise_overlap(boxes, boxes.flip(1))[1]
    for image in range(2):
        assert_close(iou[image], box_iou(boxes[image], boxes[image].flip(0)))
    assert_close(paired_iou(boxes, boxes.flip(1)), iou.diagonal(dim1=1, dim2=2))


def test_to_original_undoes_a_stretch_and_a_letterbox_and_clips() -> None:
    boxes = torch.tensor([[30.0, 60.0, 150.0, 90.0], [-5.0, 0.0, 300.0, 300.0]]).expand(2, 2, 4)
    # 150 x 600 (width x height) stretched to 300 x 300; 600 x 300 at half its size, 75 px below the top
    placements = torch.tensor([[2.0, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 75.0]])
    original = to_original(boxes, placements, torch.tensor([[600, 150], [300, 600]]))  # height, width
    assert original[0].tolist() == [[15, 120, 75, 180], [0, 0, 150, 600]]
    assert original[1].tolist() == [[60, 0, 300, 30], [0, 0, 600, 300]]
