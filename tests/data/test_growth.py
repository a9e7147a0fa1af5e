"""The work that a data set causes grows with its size, not with the square of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from annotation_sets import annotation_set
from layout_files import XML

from onestage.data.annotations import require_known_names, with_nearest
from onestage.data.coco import parse_coco
from onestage.data.layouts import find_splits, read_splits
from onestage.data.splits import assign_parts
from onestage.doctor.anchors import find_anchors
from onestage.doctor.checks import examine
from onestage.doctor.statistics import check_classes, check_objects
from onestage.errors import AnnotationError

MAX_GROWTH = 15  # of the operations, for ten times the input


class CountedName(str):
    """A name that counts how often it is compared."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        CountedName.num_compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def count_operations(work: Callable[[], object]) -> int:
    """Return the number of bytecode instructions of this package, and of comparisons of counted names."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal count
        if "onestage" not in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("difflib.py"):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before, previous = CountedName.num_compared, sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(previous)
    return count + CountedName.num_compared - before


def names(count: int) -> list[str]:
    return [CountedName(f"class {number}") for number in range(count)]


def coco_file(folder: Path, num_classes: int, num_boxes: int, num_images: int) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 80, "width": 80} for n in range(num_images)],
        "annotations": [
            {"id": n + 1, "image_id": n % num_images, "category_id": n % num_classes, "bbox": [n % 60, 0, 9, 9]}
            for n in range(num_boxes)
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(num_classes)],
    }
    for number in range(num_images):
        (folder / f"{number}.jpg").write_bytes(b"never opened")
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def many_classes(size: int, _: Path) -> Callable[[], object]:
    labels = [[n] for n in range(size)]
    sets = {name: annotation_set(labels, num_classes=size) for name in ("train", "val")}
    return lambda: [check_classes(sets), check_objects(sets["train"], 100)]


def classes_to_divide(size: int, _: Path) -> Callable[[], object]:
    whole = annotation_set([[n, (n + 1) % size] for n in range(size)], num_classes=size)
    return lambda: assign_parts(whole, [0.8, 0.2])


def other_classes(size: int, _: Path) -> Callable[[], object]:
    def compare() -> None:
        with pytest.raises(AnnotationError) as caught:
            require_known_names("a.json", names(size), [f"other {n}" for n in range(size)])
        assert len(str(caught.value)) < 5000

    return compare


def nearest_names(size: int, _: Path) -> Callable[[], object]:
    return lambda: with_nearest(names(size), [f"other {n}" for n in range(size)])


def voc_classes(size: int, folder: Path) -> Callable[[], object]:
    root = folder / f"voc{size}"
    for stem in ("a", "b"):
        (root / stem).parent.mkdir(exist_ok=True)
        (root / f"{stem}.jpg").write_bytes(b"never opened")
        start = XML.index("<object>")
        objects = [XML[start : XML.index("</annotation>")].replace("NAME", f"class {n}") for n in range(size)]
        (root / f"{stem}.xml").write_text(XML[:start] + "".join(objects) + "</annotation>")
    return lambda: read_splits(find_splits([root]))


@pytest.mark.parametrize("table", ["classes", "boxes", "images"])
def test_reading_of_coco_grows_with_its_tables(table: str, tmp_path: Path) -> None:
    counts = []
    for size in (20, 200):
        sizes = {"classes": 5, "boxes": 200, "images": 5} | {table: size}
        (tmp_path / str(size)).mkdir()
        file = coco_file(tmp_path / str(size), *sizes.values())
        counts.append(count_operations(lambda file=file: parse_coco(file, file.parent)))
    assert counts[1] <= MAX_GROWTH * counts[0]


@pytest.mark.parametrize("prepare", [many_classes, classes_to_divide, other_classes, nearest_names, voc_classes])
def test_work_grows_with_the_number_of_classes(prepare: Callable, tmp_path: Path) -> None:
    small, large = (count_operations(prepare(size, tmp_path)) for size in (30, 300))
    assert large <= MAX_GROWTH * small


def test_doctor_of_many_classes_grows_with_their_number(tmp_path: Path) -> None:
    anchors, counts = find_anchors("SSD160", "voc"), []
    for size in (30, 300):
        (tmp_path / str(size)).mkdir()
        splits = read_splits(find_splits([coco_file(tmp_path / str(size), size, size, size)]))
        counts.append(count_operations(lambda splits=splits: examine(splits, anchors, near_copies=False)))
    assert counts[1] <= MAX_GROWTH * counts[0]


def test_similar_names_are_found_in_one_pass() -> None:
    sets = {"train": annotation_set([[0, 1, 2, 3, 4]], num_classes=5)}
    renamed = ("traffic light", "Traffic-Light", "bus", "buses", "traffic lights")
    sets["train"].__dict__["class_names"] = renamed
    (finding,) = (finding for finding in check_classes(sets) if finding.rule == "similar class names")
    assert finding.problem == "'traffic light', 'Traffic-Light', 'traffic lights' are 3 classes"
    assert np.array_equal(sets["train"].labels, range(5))
