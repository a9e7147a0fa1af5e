import copy

import torch
from torch.testing import assert_close

from onestage.boxes.anchors import AnchorGrid, AnchorShapes, ssd_shapes

CELLS = AnchorShapes(10, ssd_shapes(4, 9, (4,)))


def test_anchors_of_a_grid_are_ordered_by_row_column_and_shape() -> None:
    # 4 x 4, sqrt(4 * 9) = 6 square, 4:1 with sides 4 * 2 and 4 / 2, 1:4
    assert CELLS.shapes == ((4, 4), (6, 6), (8, 2), (2, 8))
    boxes, strides, level_sizes = AnchorGrid([CELLS, AnchorShapes(20, ((5, 7),), offset=0.0)])([(2, 3), (1, 1)])
    centres = [[5.0, 5.0], [15.0, 5.0], [25.0, 5.0], [5.0, 15.0], [15.0, 15.0], [25.0, 15.0]]
    expected = [[*centre, *shape] for centre in centres for shape in CELLS.shapes]
    assert_close(boxes, torch.tensor([*expected, [0.0, 0.0, 5.0, 7.0]]))
    assert strides.tolist() == [10.0] * 24 + [20.0]
    assert level_sizes == (24, 1)


def test_grid_is_cached_by_size_and_absent_from_the_state_dict() -> None:
    grid = AnchorGrid([CELLS])
    assert grid([(2, 2)]) is grid([(2, 2)])
    assert len(grid([(3, 2)]).boxes) == 24
    assert grid.state_dict() == {}
    assert copy.deepcopy(grid).to("meta")([(2, 2)]).boxes.device.type == "meta"


def test_anchors_made_in_inference_mode_serve_a_later_backward() -> None:
    grid = AnchorGrid([CELLS])
    with torch.inference_mode():
        grid([(2, 2)])
    scale = torch.ones((), requires_grad=True)
    (grid([(2, 2)]).boxes * scale).sum().backward()
    assert scale.grad > 0
