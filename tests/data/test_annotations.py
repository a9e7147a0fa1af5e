"""Boxes that are checked, clipped and skipped, whatever format they come from."""

import numpy as np
import pytest

from onestage.data.annotations import (
    BOX_CLIPPED,
    IMAGE_MISSING,
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
)
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet


def build(
    boxes: list[list[float]],
    image_rows: list[int] | None = None,
    sizes: list[tuple[int, int]] | None = None,
    areas: list[float] | None = None,
    problems: dict[int, str] | None = None,
    **options: object,
) -> AnnotationSet:
    """Images a.jpg, b.jpg ... of 100 x 200 px (height x width), all objects in the first unless said otherwise."""
    image_rows = [0] * len(boxes) if image_rows is None else image_rows
    sizes = [(100, 200)] * (max(image_rows, default=0) + 1) if sizes is None else sizes
    images = ImageColumns(
        paths=[f"{chr(97 + n)}.jpg" for n in range(len(sizes))],
        ids=np.arange(10, 10 + len(sizes), dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
    )
    objects = ObjectColumns(
        image_rows=np.array(image_rows, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int64) % 2,
        areas=None if areas is None else np.array(areas, dtype=np.float64),
        problems=problems or {},
    )
    return build_annotation_set(
        "set.json",
        images,
        objects,
        ("cat", "dog"),
        (3, 7),
        describe=lambda row: f"object {row} {boxes[row]}",
        **options,
    )


def test_a_box_that_reaches_out_is_clipped_to_its_image() -> None:
    annotations = build([[-5, -5, 300, 50], [150, 50, 250, 150]])
    assert annotations.boxes.tolist() == [[0, 0, 200, 50], [150, 50, 200, 100]]
    assert annotations.areas.tolist() == [10000, 2500]
    (finding,) = annotations.findings
    assert (finding.rule, finding.num_items) == (BOX_CLIPPED.name, 2)
    assert "2 of 2 boxes" in finding.problem
    unknown_size = build([[-5, 2, 3000, 50], [0, 0, 1e300, 10]], sizes=[(0, 0)])
    assert unknown_size.boxes.tolist() == [[0, 2, 3000, 50]]
    assert "finite" in unknown_size.skipped[0]  # beyond float32


@pytest.mark.parametrize(
    ("box", "rule"),
    [
        ([10, 10, 10, 20], "must be > 0"),
        ([10, 10, 20, 5], "must be > 0"),
        ([200, 0, 210, 10], "must overlap"),
        ([-20, 0, -10, 10], "must overlap"),
        ([0, 0, float("nan"), 10], "finite"),
        ([0, 0, float("inf"), 10], "finite"),
    ],
)
def test_a_box_that_cannot_be_an_object_is_left_out_and_named(box: list[float], rule: str) -> None:
    annotations = build([[0, 0, 10, 10], box])
    assert annotations.boxes.tolist() == [[0, 0, 10, 10]]
    (line,) = annotations.skipped
    assert line.startswith(f"object 1 {box}: ")
    assert rule in line


@pytest.mark.parametrize(
    ("num_good", "num_bad", "fraction", "passes"),
    [
        (8, 2, 0.01, True),  # two always may
        (7, 3, 0.01, False),
        (297, 3, 0.01, True),  # 1 % of 300
        (296, 4, 0.01, False),
        (6, 4, 0.4, True),
        (9, 1, 0.0, False),  # 0 means none
    ],
)
def test_too_many_bad_boxes_are_an_error(num_good: int, num_bad: int, fraction: float, passes: bool) -> None:
    boxes = [[0.0, 0, 10, 10]] * num_good + [[5.0, 5, 5, 9]] * num_bad
    if passes:
        assert len(build(boxes, max_bad_fraction=fraction).skipped) == num_bad
        return
    with pytest.raises(AnnotationError, match=r"set\.json.* boxes cannot be used(.|\n)*data\.max_bad_fraction: 0\.\d"):
        build(boxes, max_bad_fraction=fraction)


def test_the_error_quotes_the_first_five_and_a_fraction_that_lets_them_pass() -> None:
    boxes = [[0.0, 0, 10, 10]] * 93 + [[5.0, 5, 5, 9]] * 7
    with pytest.raises(AnnotationError) as caught:
        build(boxes)
    text = str(caught.value)
    assert text.count("object 9") == 5  # 93..97
    assert "and 2 more" in text
    assert "data.max_bad_fraction: 0.07" in text
    assert len(build(boxes, max_bad_fraction=0.07).skipped) == 7


def test_no_usable_box_or_image_is_an_error() -> None:
    with pytest.raises(AnnotationError, match="none of its 1 boxes"):
        build([[1, 1, 1, 1]])
    with pytest.raises(AnnotationError, match="none of its 1 images"):
        build([], sizes=[], findings=[IMAGE_MISSING.broken("a.jpg", "is missing")])
