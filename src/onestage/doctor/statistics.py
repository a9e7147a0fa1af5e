"""Classes, objects and box shapes of a data set."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import onestage.data.annotations as rules
from onestage.data.annotations import require_objects, shortened
from onestage.errors import AnnotationError
from onestage.evaluation.analysis import MAX_DETECTIONS
from onestage.types import AnnotationSet, Finding

FEW_BOXES = 20  # of a class in the training split; fewer teach and measure little
SIDES = (16, 32, 64, 128, 256)  # px; bounds of the size bins
RATIOS = (1 / 3, 1 / 1.5, 1.5, 3)  # width / height; bounds of the shape bins


class ClassRow(NamedTuple):
    """The counts of a class by split."""

    label: int
    category_id: int
    name: str
    num_images: dict[str, int]  # with the class
    num_boxes: dict[str, int]  # with crowds


def class_table(splits: Mapping[str, AnnotationSet]) -> list[ClassRow] | None:
    """Return a row for each class, in label order; None if the splits do not have the same classes."""
    tables = {(annotations.category_ids, annotations.class_names) for annotations in splits.values()}
    if len(tables) != 1:
        return None
    classes = enumerate(zip(*tables.pop(), strict=True))
    table = [ClassRow(label, category_id, name, {}, {}) for label, (category_id, name) in classes]
    for name, annotations in splits.items():
        pairs = np.unique(annotations.image_rows * len(table) + annotations.labels)
        num_images = np.bincount(pairs % max(len(table), 1), minlength=len(table)).tolist()
        num_boxes = np.bincount(annotations.labels, minlength=len(table)).tolist()
        for row in table:
            row.num_images[name], row.num_boxes[name] = num_images[row.label], num_boxes[row.label]
    return table


def check_classes(splits: Mapping[str, AnnotationSet]) -> list[Finding]:
    """Find classes that differ between the splits, are rare, or are written in two ways."""
    if not splits:
        return []
    (train, first), *others = splits.items()
    rows = class_table(splits)
    if rows is None:
        lines = [
            f"\n  {name}: " + shortened([f"{i} {c}" for i, c in zip(s.category_ids, s.class_names, strict=True)], 100)
            for name, s in splits.items()
        ]
        return [rules.CLASSES_DIFFER.broken(first.source, f"the splits have different categories:{''.join(lines)}")]
    place = f"{first.source} and {len(others)} more" if others else first.source
    used = [row for row in rows if any(row.num_boxes.values())]
    missing = [row.name for row in used if not all(row.num_boxes.values())]  # empty for a single split
    rare = [row.name for row in used if row.num_boxes[train] < FEW_BOXES]
    problem = f"of {len(rows)} classes have no box in one of the splits: {shortened(missing)}"
    found = rules.ONE_SPLIT_CLASS.counted(place, f"{len(missing)} {problem}", len(missing))
    problem = f"of {len(rows)} classes have fewer than {FEW_BOXES} boxes in {train}: {shortened(rare)}"
    found += rules.RARE_CLASS.counted(place, f"{len(rare)} {problem}", len(rare))
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(_word(row.name), []).append(repr(row.name))
    for names in (names for names in alike.values() if len(names) > 1):
        found.append(rules.SIMILAR_NAMES.broken(place, f"{shortened(names)} are {len(names)} classes", len(names)))
    return found


def check_objects(annotations: AnnotationSet, max_detections: int, is_training: bool = False) -> list[Finding]:
    """Find what is unusual about the usable objects of a split. max_detections: of the detector, per image."""
    place, counts = annotations.source, np.diff(annotations.box_offsets)
    found: list[Finding] = []
    if is_training:
        try:
            require_objects(annotations)
        except AnnotationError as reason:
            found.append(rules.NO_OBJECTS.broken(place, str(reason).partition("\n")[0].removeprefix(f"{place}: ")))
    num_empty = int(np.count_nonzero(counts == 0))
    found += rules.NO_OBJECT_IMAGES.counted(place, f"{num_empty} of {len(counts)} images have no object", num_empty)
    rows = annotations.image_rows
    keys = np.column_stack([rows, annotations.labels, annotations.boxes])  # [T, 6]
    order = np.lexsort(keys.T)  # stable: of equal ones the first stays the first
    repeated = order[1:][(keys[order[1:]] == keys[order[:-1]]).all(axis=1)]
    if len(repeated):
        path = annotations.image_paths[rows[repeated.min()]]
        problem = f"{len(repeated)} boxes repeat a box and class of their image, the first in {path!s:.200}"
        found.append(rules.BOX_REPEATED.broken(place, problem, len(repeated)))
    limit = min(max_detections, MAX_DETECTIONS)
    num_many = int(np.count_nonzero(counts > limit))
    problem = f"{num_many} images have more than {limit} objects, the maximum is {counts.max(initial=0)}"
    return found + rules.MANY_OBJECTS.counted(place, problem, num_many)


def canvas_boxes(annotations: AnnotationSet, image_size: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return boxes [T, 4] xyxy and labels [T] of the objects, without crowds, on a square canvas of `image_size` px.

    Images are stretched to it; those of unknown size count as that.
    """
    sizes = annotations.sizes[:, [1, 0, 1, 0]].repeat(np.diff(annotations.box_offsets), axis=0).astype(np.float64)
    boxes = annotations.boxes.astype(np.float64) * np.where(sizes > 0, image_size / np.maximum(sizes, 1), 1.0)
    return boxes[~annotations.is_crowd], annotations.labels[~annotations.is_crowd]


def size_bin(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the bin of `SIDES`, in [0, len(SIDES)], of the square root of each box's area."""
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    return np.asarray(np.searchsorted(SIDES, sides, side="right"), dtype=np.int64)


def shape_counts(boxes: npt.NDArray[np.float64]) -> dict[str, list[int]]:
    """Count boxes [T, 4] by size and by width / height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    shapes = np.searchsorted(RATIOS, sides[:, 0] / sides[:, 1], side="right")
    return {
        "size": np.bincount(size_bin(boxes), minlength=len(SIDES) + 1).tolist(),
        "width / height": np.bincount(shapes, minlength=len(RATIOS) + 1).tolist(),
    }


def _word(name: str) -> str:
    """Return a name without what may differ between two ways to write it: case, spaces, hyphens, a plural's s."""
    word = "".join(sign for sign in name.casefold() if sign.isalnum()) or name
    return word.rstrip("s") or word if len(word) > 2 else word
