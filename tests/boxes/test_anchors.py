import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

from onestage.boxes.anchors import SSD160, SSD300_COCO, SSD300_VOC, SSD512_COCO, SSD512_VOC, AnchorLevel, make_anchors


def test_one_level_of_two_cells_gives_hand_computed_boxes_in_order() -> None:
    level = AnchorLevel(side=2, stride=10, size=4, next_size=9, aspect_ratios=(4,))
    boxes, strides = make_anchors([level], image_size=20)
    # Per cell: 4 x 4, sqrt(4 * 9) = 6 square, 4:1 with sides 4 * 2 and 4 / 2, 1:4. Cells: row by row, columns first.
    sizes = [[4.0, 4.0], [6.0, 6.0], [8.0, 2.0], [2.0, 8.0]]
    centres = [[5.0, 5.0], [15.0, 5.0], [5.0, 15.0], [15.0, 15.0]]
    assert_close(boxes, torch.tensor([centre + size for centre in centres for size in sizes]))
    assert strides.tolist() == [10.0] * 16


def test_first_anchors_of_ssd300_match_the_paper() -> None:
    boxes = make_anchors(SSD300_VOC, image_size=300).boxes
    assert_close(boxes[0], torch.tensor([4.0, 4.0, 30.0, 30.0]))
    assert_close(boxes[1], torch.tensor([4.0, 4.0, math.sqrt(1800), math.sqrt(1800)]))
    assert_close(boxes[2], torch.tensor([4.0, 4.0, 30 * math.sqrt(2), 30 / math.sqrt(2)]))
    assert_close(boxes[-4], torch.tensor([150.0, 150.0, 264.0, 264.0]))


@pytest.mark.parametrize(
    ("levels", "image_size", "num_anchors"),
    [
        (SSD300_VOC, 300, 8732),
        (SSD300_COCO, 300, 8732),
        (SSD512_VOC, 512, 24564),
        (SSD512_COCO, 512, 24564),
        (SSD160, 160, 400 * 4 + 100 * 6 + 25 * 6 + 9 * 4 + 4),
    ],
)
def test_tables_have_the_published_number_of_anchors_and_consecutive_sizes(levels, image_size, num_anchors) -> None:
    boxes, strides = make_anchors(levels, image_size)
    assert sum(level.side**2 * level.anchors_per_cell for level in levels) == num_anchors
    assert boxes.shape == (num_anchors, 4)
    assert strides.shape == (num_anchors,)
    assert all(level.next_size == following.size for level, following in itertools.pairwise(levels))
    assert (boxes[:, 2:] <= image_size).all()


def test_sizes_follow_the_rule_of_the_caffe_code() -> None:
    for levels, image_size, first, low, step in [
        (SSD300_VOC, 300, 10, 20, 17),  # step = floor((90 - 20) / 4)
        (SSD300_COCO, 300, 7, 15, 18),
        (SSD512_VOC, 512, 7, 15, 15),
        (SSD512_COCO, 512, 4, 10, 16),
        (SSD160, 160, 10, 20, 23),
    ]:
        percents = [first, *(low + step * k for k in range(len(levels)))]
        expected = [image_size * percent / 100 for percent in percents]
        assert [level.size for level in levels] == pytest.approx(expected[:-1])
        assert levels[-1].next_size == pytest.approx(expected[-1])


def test_coco_anchors_equal_torchvision_in_the_same_order() -> None:
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    maps = [torch.zeros(1, 1, level.side, level.side) for level in SSD300_COCO]
    expected = generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0]
    boxes = make_anchors(SSD300_COCO, image_size=300).boxes
    assert_close(box_convert(boxes, "cxcywh", "xyxy"), expected, atol=1e-4, rtol=0)
