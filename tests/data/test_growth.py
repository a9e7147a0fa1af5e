"""The work that a data set causes grows with its size, not with the square of it."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from annotation_sets import annotation_set

from onestage.data.coco import parse_coco
from onestage.data.layouts import find_splits, read_splits
from onestage.data.splits import assign_parts
from onestage.doctor.anchors import find_anchors
from onestage.doctor.checks import examine
from onestage.doctor.statistics import check_classes

MAX_GROWTH = 15  # of the operations, for ten times the input
ANCHORS = find_anchors("SSD160", "voc")


def count_operations(work: Callable[[], object]) -> int:
    """Return the number of bytecode instructions of this package."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal count
        if "onestage" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(previous)
    return count


def coco_file(folder: Path, num_classes: int, num_boxes: int, num_images: int) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 80, "width": 80} for n in range(num_images)],
        "annotations": [
            {"id": n + 1, "image_id": n % num_images, "category_id": n % num_classes, "bbox": [n % 60, 0, 9, 9]}
            for n in range(num_boxes)
        ],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(num_classes)],
    }
    folder.mkdir()
    for number in range(num_images):
        (folder / f"{number}.jpg").write_bytes(b"never opened")
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def reading(table: str, size: int, folder: Path) -> Callable[[], object]:
    file = coco_file(folder, **({"num_classes": 5, "num_boxes": 200, "num_images": 5} | {table: size}))
    return lambda: parse_coco(file, file.parent)


def dividing_many_classes(size: int, _: Path) -> Callable[[], object]:
    whole = annotation_set([[n, (n + 1) % size] for n in range(size)], num_classes=size)
    return lambda: assign_parts(whole, [0.8, 0.2])


def examining_many_classes(size: int, folder: Path) -> Callable[[], object]:
    splits = read_splits(find_splits([coco_file(folder, size, size, size)]))
    return lambda: examine(splits, ANCHORS, near_copies=False)


TABLES = [partial(reading, table) for table in ("num_classes", "num_boxes", "num_images")]


@pytest.mark.parametrize("prepare", [*TABLES, dividing_many_classes, examining_many_classes])
def test_work_grows_with_the_size_of_the_set(prepare, tmp_path) -> None:
    small, large = (count_operations(prepare(size, tmp_path / str(size))) for size in (20, 200))
    assert large <= MAX_GROWTH * small


def test_similar_names_are_one_finding() -> None:
    sets = {"train": annotation_set([[0, 1, 2, 3, 4]], num_classes=5)}
    renamed = ("traffic light", "Traffic-Light", "bus", "buses", "traffic lights")
    sets["train"].__dict__["class_names"] = renamed
    (finding,) = (finding for finding in check_classes(sets) if finding.rule == "similar class names")
    assert finding.problem == "'traffic light', 'Traffic-Light', 'traffic lights' are 3 classes"
