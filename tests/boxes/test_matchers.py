import pytest
import torch
from annotation_sets import targets_of
from processes import finish, start
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher, SSDMatcher
from torchvision.ops import box_convert, box_iou

from onestage.boxes import matchers
from onestage.boxes.anchors import AnchorGrid, AnchorShapes, ssd_shapes
from onestage.boxes.cell_matcher import CellMatcher
from onestage.boxes.coders import DeltaBoxCoder
from onestage.boxes.matchers import IoUMatcher, assign
from onestage.boxes.point_matchers import ATSSMatcher, PointMatcher
from onestage.errors import ConfigError
from onestage.types import BACKGROUND, IGNORE, PADDING, Anchors, Targets

GRID = AnchorGrid([AnchorShapes(8, ssd_shapes(16, 32, (2,))), AnchorShapes(16, ssd_shapes(32, 69, (2, 3)))])
SIDES = [(20, 20), (10, 10)]  # 2200 anchors on 160 x 160 px


def anchors_of(*boxes_xyxy) -> Anchors:
    boxes = box_convert(torch.tensor(boxes_xyxy, dtype=torch.float32), "xyxy", "cxcywh")
    return Anchors(boxes, torch.ones(len(boxes)), (len(boxes),))


def random_targets(num_images: int, whole_pixels: bool = False) -> Targets:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(num_images, 16, 2, generator=generator) * 120
    boxes = torch.cat([low, low + 8 + torch.rand(num_images, 16, 2, generator=generator) * 60], dim=-1)
    counts = torch.tensor([0, 1, 2, 5, 11, 16] * 10)[:num_images, None]
    return Targets(boxes.round() if whole_pixels else boxes, torch.where(torch.arange(16) < counts, 1, PADDING))


def test_match_covers_positive_ignored_background_and_forced() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 3], [40, 0, 50, 10], [80, 0, 90, 10])
    targets = targets_of([0, 0, 10, 10, 0], [40, 0, 44, 10, 1])
    # Object 0: IoU 1.0, 0.5, 0.3, 0, 0. Object 1: 0.4 with anchor 3 alone, below every threshold, but its best.
    match = IoUMatcher(positive_iou=0.6, negative_iou=0.45)(targets, anchors)
    assert match.tolist() == [[0, IGNORE, BACKGROUND, 1, BACKGROUND]]
    assert IoUMatcher(0.5, 0.5)(targets, anchors).tolist() == [[0, 0, BACKGROUND, 1, BACKGROUND]]  # 0.5 is positive


def test_an_object_keeps_no_best_anchor_below_the_minimum() -> None:
    anchors = anchors_of([0, 0, 10, 10], [40, 0, 50, 10], [80, 0, 90, 10])
    targets = targets_of([0, 0, 10, 3, 0], [40, 0, 44, 10, 1])  # IoU 0.3 with anchor 0, 0.4 with anchor 1
    for rule in ("one", "ties"):
        match = IoUMatcher(best_anchors=rule, min_best_iou=0.35)(targets, anchors)
        assert match.tolist() == [[BACKGROUND, 1, BACKGROUND]]


def test_object_that_loses_its_best_anchor_twice_gets_none() -> None:
    anchors = anchors_of([0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 2])
    same = [0, 0, 10, 10]
    targets = targets_of([*same, 0], [*same, 1], [*same, 2])
    # Row 0, the first of equal ones, keeps anchor 0; rows 1 and 2 turn to anchor 1, and row 2 loses again.
    assert IoUMatcher()(targets, anchors).tolist() == [[0, 1, BACKGROUND]]


@pytest.mark.parametrize("best_anchors", ["one", "ties"])
def test_padding_empty_and_distant_boxes_are_never_matched_and_half_covered_anchors_ignored(best_anchors) -> None:
    anchors = anchors_of([0, 0, 10, 10], [95, 0, 105, 10], [94, 0, 104, 10], [150, 0, 160, 10], [300, 0, 310, 10])
    targets = targets_of(
        [100, 0, 200, 100, IGNORE],
        [150, 0, 160, 10, 0],
        [0, 0, 0, 0, PADDING],
        [0, 0, 10, 10, PADDING],  # the label says padding, not the box
        [0, 0, 10, 0, 1],
        [10, 10, 0, 0, 1],
        [float("nan"), 0, 10, 10, 1],
        [50, 50, 60, 60, 0],  # overlaps no anchor
    )
    # Anchor 1 has exactly half of its area in the crowd, anchor 2 four tenths, anchor 3 all, but it matches row 1.
    match = IoUMatcher(best_anchors=best_anchors)(targets, anchors)
    assert match.tolist() == [[BACKGROUND, IGNORE, BACKGROUND, 1, BACKGROUND]]


@pytest.mark.parametrize(
    ("matcher", "reference"),
    [
        (IoUMatcher(0.5, 0.4, "ties"), TorchvisionMatcher(0.5, 0.4, allow_low_quality_matches=True)),
        (IoUMatcher(), SSDMatcher(0.5)),
    ],
)
def test_match_of_every_image_equals_torchvision(matcher, reference) -> None:
    whole_pixels = matcher.best_anchors == "ties"  # they make ties
    anchors, targets, num_forced = GRID(SIDES), random_targets(5, whole_pixels), 0
    match = matcher(targets, anchors)
    assert (match[0] == BACKGROUND).all()
    for image in range(1, 5):
        boxes = targets.boxes[image][targets.labels[image] >= 0]
        iou = box_iou(boxes, box_convert(anchors.boxes, "cxcywh", "xyxy"))
        assert len(iou.argmax(dim=1).unique()) == len(boxes) or whole_pixels  # SSDMatcher has no rule for shared ones
        assert torch.equal(match[image], reference(iou))
        num_forced += int(((match[image] >= 0) & (iou.amax(dim=0) < 0.5)).sum())
    assert num_forced > 0


def test_assign_returns_label_and_box_of_the_object() -> None:
    anchors = anchors_of([0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10])
    targets = targets_of([40, 0, 50, 9, 7], [0, 0, 10, 8, 3], [0, 0, 0, 0, PADDING])
    labels, boxes = assign(IoUMatcher(), targets, anchors)
    assert labels.tolist() == [[3, BACKGROUND, 7]]
    assert boxes[0, [0, 2]].tolist() == [[0, 0, 10, 8], [40, 0, 50, 9]]
    no_rows = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
    assert assign(IoUMatcher(), no_rows, anchors)[0].tolist() == [[BACKGROUND] * 3] * 2


@pytest.mark.parametrize("matcher", [IoUMatcher(0.5, 0.4), IoUMatcher(best_anchors="ties"), CellMatcher()])
def test_assign_in_chunks_equals_assign_at_once(matcher, monkeypatch) -> None:
    anchors, targets = GRID(SIDES), random_targets(6)
    predicted = box_convert(anchors.boxes, "cxcywh", "xyxy").expand(6, -1, 4)
    whole = assign(matcher, targets, anchors, predicted)
    sizes = []
    monkeypatch.setattr(matchers, "MAX_PAIRS", 2 * 16 * 2200 + 1)  # two images
    counting = lambda targets, *others: (sizes.append(len(targets.labels)), matcher(targets, *others))[1]  # noqa: E731
    chunked = assign(counting, targets, anchors, predicted)
    assert sizes == [2, 2, 2]
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *[(lambda pair=pair: IoUMatcher(*pair), "_iou must be in") for pair in ((0.4, 0.5), (0.5, 0.0), (1.5, 0.5))],
        (lambda: IoUMatcher(min_best_iou=0.6), "min_best_iou must be in"),
        (lambda: CellMatcher(1.5), r"CellMatcher: ignore_iou must be in \[0, 1\], got 1.5"),
        (lambda: PointMatcher(0), "PointMatcher: radius must be > 0, got 0"),
        (lambda: ATSSMatcher(0), "ATSSMatcher: num_candidates must be >= 1, got 0"),
        (lambda: DeltaBoxCoder((float("nan"), 0.2)), "variances must be two numbers > 0"),
        (lambda: AnchorGrid([AnchorShapes(8, ((1, -1),))]), "anchors must be a stride > 0"),
    ],
)
def test_settings_of_anchors_coders_and_matchers_out_of_range_are_refused(build, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


PEAK = """
import torch
from peak_memory import peak_bytes
from onestage.boxes.anchors import AnchorGrid, AnchorShapes, pyramid_shapes
from onestage.boxes.matchers import IoUMatcher, assign
from onestage.boxes.point_matchers import ATSSMatcher, PointMatcher
from onestage.types import Targets
levels = [AnchorShapes(s, pyramid_shapes(4 * s) if {nine} else ((8 * s, 8 * s),), 0.0) for s in (8, 16, 32, 64, 128)]
anchors = AnchorGrid(levels)([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)])
low = torch.rand({num_images}, 96, 2) * 600
targets = Targets(torch.cat([low, low + 10 + torch.rand({num_images}, 96, 2) * 200], -1), torch.zeros({num_images}, 96).long())
before = peak_bytes()
assign({matcher}, targets, anchors)
print(peak_bytes() - before)
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize("matcher", ["IoUMatcher(0.5, 0.4, 'ties')", "PointMatcher()", "ATSSMatcher()"])
def test_matching_16_images_of_800_x_1344_px_and_96_objects_takes_less_than_a_gigabyte(matcher) -> None:
    child = PEAK.format(matcher=matcher, nine=matcher.startswith("IoU"), num_images=16)
    assert 10e6 < int(finish(start("-c", child))[0]) < 1e9
