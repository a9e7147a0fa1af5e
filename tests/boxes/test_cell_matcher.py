import torch
from annotation_sets import targets_of

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.cell_matcher import CellMatcher
from onestage.boxes.matchers import assign
from onestage.types import BACKGROUND, IGNORE, PADDING

# 2 x 2 cells of 16 px with two shapes, then one of 32 px with one: anchors 0 to 7, and 8.
ANCHORS = AnchorGrid([AnchorShapes(16, ((8, 8), (16, 8))), AnchorShapes(32, ((32, 32),))])([(2, 2), (1, 1)])


def predicted(**boxes) -> torch.Tensor:
    """One box for each anchor, all empty but the named ones."""
    table = torch.zeros(1, 9, 4)
    for name, box in boxes.items():
        table[0, int(name[1:])] = torch.tensor(box, dtype=torch.float32)
    return table


def test_object_matches_the_best_shape_in_the_cell_of_its_centre() -> None:
    # Centre (20, 5): cell (row 0, column 1), anchors 2 and 3, and anchor 8. 15 x 7 fits 16 x 8 best: 105 / 128.
    assert CellMatcher().best_anchors(targets_of([12.5, 1.5, 27.5, 8.5, 1]), ANCHORS).tolist() == [[3]]
    # 25 x 25 fits 32 x 32 best: 625 / 1024.
    assert CellMatcher().best_anchors(targets_of([0, 0, 25, 25, 1]), ANCHORS).tolist() == [[8]]
    # Centre exactly between the cells: the right and lower one, as int(x * w) of darknet.
    assert CellMatcher().best_anchors(targets_of([12, 12, 20, 20, 1]), ANCHORS).tolist() == [[6]]


def test_later_object_keeps_a_shared_anchor_and_useless_rows_match_nothing() -> None:
    targets = targets_of(
        [1, 1, 9, 9, 0],
        [2, 2, 10, 10, 1],
        [20, 20, 28, 28, PADDING],
        [20, 20, 20, 28, 1],
        [float("nan"), 0, 8, 8, 1],
        [40, 40, 48, 48, 1],  # outside the canvas
    )
    assert CellMatcher().best_anchors(targets, ANCHORS).tolist() == [[0, 0, -1, -1, -1, -1]]
    labels, boxes = assign(CellMatcher(), targets, ANCHORS, predicted())
    assert labels.tolist() == [[1] + [BACKGROUND] * 8]
    assert boxes[0, 0].tolist() == [2, 2, 10, 10]


def test_each_object_trains_its_best_shapes_and_keeps_those_that_are_better_for_it() -> None:
    # Both centres lie in cell (0, 0). Shape IoU with 8 x 8, 16 x 8 and 32 x 32: 49/64, 49/128, 49/1024 for the first
    # and 70/106, 98/128, 98/1024 for the second.
    targets = targets_of([1, 1, 8, 8, 0], [1, 1, 15, 8, 1], [0, 0, 8, 8, PADDING])
    matcher = CellMatcher(anchors_per_object=2)
    assert matcher.best_anchors(targets, ANCHORS).tolist() == [[1, 0, -1, 0, 1, -1]]
    labels, boxes = assign(matcher, targets, ANCHORS, predicted())
    assert labels.tolist() == [[0, 1] + [BACKGROUND] * 7]
    assert boxes[0, :2].tolist() == [[1, 1, 8, 8], [1, 1, 15, 8]]
    labels, _ = assign(CellMatcher(anchors_per_object=3), targets_of([1, 1, 8, 8, 0]), ANCHORS, predicted())
    assert labels.tolist() == [[0, 0, *[BACKGROUND] * 6, 0]]


def test_predicted_box_near_an_object_is_ignored_and_one_inside_a_region() -> None:
    targets = targets_of([0, 0, 10, 10, 0], [0, 20, 32, 32, IGNORE])
    boxes = predicted(
        _0=[0, 0, 10, 10],  # of the matched anchor
        _1=[0, 0, 10, 8],  # IoU 0.8
        _2=[0, 0, 10, 7],  # IoU 0.7, which is not more than 0.7
        _4=[0, 18, 4, 22],  # half in the region
        _5=[0, 17, 4, 22],  # two fifths
    )
    labels, _ = assign(CellMatcher(0.7), targets, ANCHORS, boxes)
    assert labels.tolist() == [[0, IGNORE, BACKGROUND, BACKGROUND, IGNORE, *[BACKGROUND] * 4]]
