import pytest
import torch
from torchvision.ops import box_convert, box_iou

from onestage.boxes.matchers import IoUMatcher, assign
from onestage.errors import ConfigError
from onestage.models import SSD160
from onestage.types import BACKGROUND, IGNORE, PADDING, Anchors, Targets


def anchors_of(*boxes_xyxy) -> Anchors:
    boxes = box_convert(torch.tensor(boxes_xyxy, dtype=torch.float32), "xyxy", "cxcywh")
    return Anchors(boxes, torch.ones(len(boxes)), (len(boxes),))


def targets_of(*rows) -> Targets:
    """One image; each row is (x1, y1, x2, y2, label)."""
    table = torch.tensor(rows, dtype=torch.float32)
    return Targets(table[None, :, :4], table[None, :, 4].long())


def test_match_covers_positive_ignored_background_and_forced() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 3], [40, 0, 50, 10], [80, 0, 90, 10])
    targets = targets_of([0, 0, 10, 10, 0], [40, 0, 44, 10, 1])
    # Object 0: IoU 1.0, 0.5, 0.3, 0, 0. Object 1: 0.4 with anchor 3 alone, below every threshold, but its best.
    match = IoUMatcher(positive_iou=0.6, negative_iou=0.45)(targets, anchors)
    assert match.tolist() == [[0, IGNORE, BACKGROUND, 1, BACKGROUND]]


def test_iou_equal_to_the_threshold_is_positive() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 5])
    assert IoUMatcher(0.5, 0.5)(targets_of([0, 0, 10, 10, 0]), anchors).tolist() == [[0, 0]]


def test_anchor_answers_for_the_object_it_overlaps_best() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 7])
    # Object 0: 1.0, 0.8, 0.7; object 1: 0.8, 1.0, 7/8
    targets = targets_of([0, 0, 10, 10, 3], [0, 0, 10, 8, 4])
    assert IoUMatcher()(targets, anchors).tolist() == [[0, 1, 1]]


def test_of_two_objects_with_one_best_anchor_the_better_keeps_it_and_the_other_gets_the_next() -> None:
    anchors = anchors_of([0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 2, 10])
    weak, strong = [0, 0, 10, 3, 0], [0, 0, 10, 4, 1]
    # Anchor 0: IoU 0.3 with the weak, 0.4 with the strong. Anchor 2: 6 / (30 + 20 - 6) and 8 / (40 + 20 - 8), less.
    for rows, expected in [((weak, strong), [1, BACKGROUND, 0]), ((strong, weak), [0, BACKGROUND, 1])]:
        assert IoUMatcher()(targets_of(*rows), anchors).tolist() == [expected]


def test_of_two_equal_objects_the_first_keeps_the_best_anchor() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 3])
    targets = targets_of([0, 0, 10, 10, 0], [0, 0, 10, 10, 1])
    assert IoUMatcher()(targets, anchors).tolist() == [[0, 1]]


def test_an_object_that_loses_twice_is_given_no_anchor() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 2])
    same = [0, 0, 10, 10]
    targets = targets_of([*same, 0], [*same, 1], [*same, 2])
    # Row 0 keeps anchor 0; rows 1 and 2 both turn to anchor 1, and row 2 loses again. Anchor 2: IoU 0.2, background.
    assert IoUMatcher()(targets, anchors).tolist() == [[0, 1, BACKGROUND]]


def test_an_object_that_overlaps_no_anchor_is_given_none() -> None:
    anchors = anchors_of([0, 0, 10, 10], [20, 0, 30, 10])
    assert IoUMatcher()(targets_of([50, 50, 60, 60, 0]), anchors).tolist() == [[BACKGROUND, BACKGROUND]]


def test_padding_and_boxes_without_area_are_never_matched() -> None:
    anchors = anchors_of([0, 0, 10, 10], [20, 0, 30, 10])
    nan = float("nan")
    targets = targets_of(
        [0, 0, 0, 0, PADDING],
        [0, 0, 10, 10, PADDING],  # padding is told by its label, not by its box
        [0, 0, 10, 0, 1],
        [10, 10, 0, 0, 1],
        [30, 0, 20, 10, 1],
        [nan, 0, 10, 10, 1],
    )
    assert IoUMatcher()(targets, anchors).tolist() == [[BACKGROUND, BACKGROUND]]


def test_no_objects_in_the_batch_gives_background_everywhere() -> None:
    anchors = SSD160(1).anchor_grid([(side, side) for side in (20, 10, 5, 3, 1)])
    targets = Targets(torch.zeros(2, 16, 4), torch.full((2, 16), PADDING))
    match = IoUMatcher()(targets, anchors)
    assert match.shape == (2, len(anchors.boxes))
    assert match.dtype == torch.int64
    assert (match == BACKGROUND).all()


def test_anchors_half_covered_by_a_crowd_are_ignored_unless_positive() -> None:
    anchors = anchors_of([0, 0, 10, 10], [95, 0, 105, 10], [94, 0, 104, 10], [150, 0, 160, 10], [300, 0, 310, 10])
    crowd = [100, 0, 200, 100, IGNORE]
    targets = targets_of(crowd, [150, 0, 160, 10, 0])
    # Anchor 1 has exactly half of its area in the crowd, anchor 2 four tenths, anchor 3 all, but it answers for row 1.
    assert IoUMatcher()(targets, anchors).tolist() == [[BACKGROUND, IGNORE, BACKGROUND, 1, BACKGROUND]]


def test_an_anchor_is_assigned_the_label_and_the_box_of_its_object() -> None:
    anchors = anchors_of([0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10])
    targets = targets_of([40, 0, 50, 9, 7], [0, 0, 10, 8, 3], [0, 0, 0, 0, PADDING])
    labels, boxes = assign(IoUMatcher(), targets, anchors)
    assert labels.tolist() == [[3, BACKGROUND, 7]]
    assert boxes[0, [0, 2]].tolist() == [[0, 0, 10, 8], [40, 0, 50, 9]]
    none = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    assert assign(IoUMatcher(), none, anchors)[0].tolist() == [[BACKGROUND] * 3] * 2


def test_batched_match_equals_a_loop_over_images_and_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = SSD160(1).anchor_grid([(side, side) for side in (20, 10, 5, 3, 1)])
    low = torch.rand(6, 16, 2, generator=generator) * 120
    boxes = torch.cat([low, low + 8 + torch.rand(6, 16, 2, generator=generator) * 60], dim=-1)
    labels = torch.where(torch.arange(16) < torch.tensor([0, 1, 2, 5, 11, 16])[:, None], 1, PADDING)
    match = IoUMatcher(0.5, 0.4)(Targets(boxes, labels), anchors)
    for image in range(6):
        assert match[image].tolist() == loop_match(boxes[image][labels[image] >= 0], anchors.boxes)


def loop_match(boxes, anchors) -> list[int]:
    """The same strategy by loops: threshold, then two rounds in which the best claim on an anchor wins."""
    if len(boxes) == 0:
        return [BACKGROUND] * len(anchors)
    iou = box_iou(boxes, box_convert(anchors, "cxcywh", "xyxy"))
    match = [BACKGROUND] * len(anchors)
    for a in range(len(anchors)):
        best = int(iou[:, a].argmax())
        if iou[best, a] >= 0.5:
            match[a] = best
        elif iou[best, a] >= 0.4:
            match[a] = IGNORE
    held: dict[int, int] = {}
    waiting = list(range(len(boxes)))
    for _ in range(2):
        claims: dict[int, list[int]] = {}
        for m in waiting:
            free = iou[m].clone()
            free[list(held)] = 0
            if free.max() > 0:
                claims.setdefault(int(free.argmax()), []).append(m)
        for a, rows in claims.items():
            held[a] = max(rows, key=lambda m: (float(iou[m, a]), -m))
        waiting = [m for m in waiting if m not in held.values()]
    for a, m in held.items():
        match[a] = m
    return match


@pytest.mark.parametrize(("positive", "negative"), [(0.4, 0.5), (0.5, 0.0), (1.5, 0.5), (0.5, -1.0)])
def test_thresholds_out_of_order_are_refused(positive, negative) -> None:
    with pytest.raises(ConfigError, match="_iou"):
        IoUMatcher(positive, negative)
