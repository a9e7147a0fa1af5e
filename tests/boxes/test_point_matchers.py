import pytest
import torch
from annotation_sets import targets_of
from torchvision.ops import box_convert, box_iou

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.matchers import assign
from onestage.boxes.point_matchers import ATSSMatcher, PointMatcher
from onestage.types import BACKGROUND, IGNORE, PADDING, Targets

# 8 x 8, 4 x 4 and 2 x 2 points on 64 x 64 px, at the corners of the cells, each with a square of 4 strides
ANCHORS = AnchorGrid([AnchorShapes(s, ((4 * s, 4 * s),), 0.0) for s in (8, 16, 32)])([(8, 8), (4, 4), (2, 2)])


def points(match, row: int) -> set[tuple[int, int, int]]:
    """Return (stride, x, y) of the anchors with that match."""
    rows = torch.cat([ANCHORS.strides[:, None], ANCHORS.boxes[:, :2]], dim=1)[match[0] == row]
    return {tuple(map(int, values)) for values in rows}


def test_points_near_the_centre_match_on_the_level_of_their_farthest_edge() -> None:
    # Stride 8: less than 64 px to the farthest edge, and less than 12 px from the centre (24, 24) along both axes.
    found = PointMatcher()(targets_of([4, 10, 44, 38, 0]), ANCHORS)
    assert points(found, 0) == {(8, x, y) for x in (16, 24, 32) for y in (16, 24, 32)}
    assert (found == BACKGROUND).sum() == 84 - 9
    # 72 to 88 px to the left or right edge: stride 16, less than 24 px from the centre (30, 32) and inside the box.
    wide = targets_of([-40, 20, 100, 44, 0])
    assert points(PointMatcher()(wide, ANCHORS), 0) == {(16, x, 32) for x in (16, 32, 48)}
    assert points(PointMatcher(radius=0.5)(wide, ANCHORS), 0) == {(16, 32, 32)}
    large = PointMatcher()(targets_of([-300, -300, 330, 330, 0]), ANCHORS)  # centre 15; the coarsest has no upper limit
    assert points(large, 0) == {(32, x, y) for x in (0, 32) for y in (0, 32)}


@pytest.mark.parametrize("matcher", [PointMatcher(), ATSSMatcher(3)])
def test_padding_empty_boxes_and_regions_match_nothing_and_regions_are_ignored(matcher) -> None:
    rows = [[0, 0, 20, 20, PADDING], [8, 8, 8, 20, 0], [20, 20, 4, 4, 0], [float("nan"), 0, 20, 20, 0]]
    found = matcher(targets_of(*rows, [36, 36, 60, 60, IGNORE]), ANCHORS)
    inside = {(8, x, y) for x in (40, 48, 56) for y in (40, 48, 56)} | {(16, 48, 48)}
    assert points(found, IGNORE) == inside
    assert (found == BACKGROUND).sum() == 84 - 10
    labels, _ = assign(matcher, Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)), ANCHORS)
    assert (labels == BACKGROUND).all()


def test_adaptive_matches_equal_the_papers_algorithm_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(4, 6, 2, generator=generator) * 40
    boxes = torch.cat([low, low + 6 + torch.rand(4, 6, 2, generator=generator) * 30], dim=-1)
    labels = torch.arange(6).expand(4, 6).clone()
    labels[0, 3:], labels[3] = PADDING, PADDING
    found = ATSSMatcher(3)(Targets(boxes, labels), ANCHORS)
    corners = box_convert(ANCHORS.boxes, "cxcywh", "xyxy")
    assert (found >= 0).sum() > 20
    for image in range(4):
        expected, best = [BACKGROUND] * 84, [0.0] * 84
        for row in range(6):
            if labels[image, row] < 0:
                continue
            box, candidates, start = boxes[image, row], [], 0
            centre = (box[:2] + box[2:]) / 2
            for size in (64, 16, 4):
                distance = (ANCHORS.boxes[start : start + size, :2] - centre).square().sum(dim=1)
                candidates += sorted(range(start, start + size), key=lambda a: distance[a - start])[:3]
                start += size
            iou = box_iou(box[None], corners[candidates])[0]
            for a, overlap in zip(candidates, iou.tolist(), strict=True):
                x, y = ANCHORS.boxes[a, :2]
                is_inside = box[0] < x < box[2] and box[1] < y < box[3]
                if overlap >= iou.mean() + iou.std() and is_inside and overlap > best[a]:
                    best[a], expected[a] = overlap, row
        assert found[image].tolist() == expected
