"""Counts classes, objects and box shapes of the splits of a set, and says what is odd about them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import (
    BOX_REPEATED,
    CLASSES_DIFFER,
    MANY_OBJECTS,
    NO_OBJECT_IMAGES,
    NO_OBJECTS,
    ONE_SPLIT_CLASS,
    RARE_CLASS,
    SIMILAR_NAMES,
    require_objects,
)
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet, Finding

FEW_BOXES = 20  # of a class in the training split; fewer teach and measure little
MAX_DETECTIONS = 200  # what the detectors return for an image at most, unless told otherwise
NUM_NAMED = 8  # classes that a line names
SIDES = (16, 32, 64, 128, 256)  # px; bounds of the sizes by which boxes are counted
RATIOS = (1 / 3, 1 / 1.5, 1.5, 3)  # width / height; bounds of the shapes

Splits = Mapping[str, AnnotationSet]


class ClassRow(NamedTuple):
    """One class of the set."""

    label: int
    category_id: int
    name: str
    num_images: dict[str, int]  # split -> images that hold it
    num_boxes: dict[str, int]  # split -> its boxes, crowds among them


def class_table(splits: Splits) -> list[ClassRow]:
    """Return a row for each class, in label order. All splits have the same classes."""
    first = next(iter(splits.values()))
    num_classes = len(first.class_names)
    images, boxes = {}, {}
    for name, annotations in splits.items():
        image_rows = np.repeat(np.arange(len(annotations)), np.diff(annotations.box_offsets))
        pairs = np.unique(np.stack([image_rows, annotations.labels]), axis=1)
        images[name] = np.bincount(pairs[1], minlength=num_classes)
        boxes[name] = np.bincount(annotations.labels, minlength=num_classes)
    return [
        ClassRow(
            label,
            first.category_ids[label],
            first.class_names[label],
            {name: int(images[name][label]) for name in splits},
            {name: int(boxes[name][label]) for name in splits},
        )
        for label in range(num_classes)
    ]


def about_classes(splits: Splits) -> list[Finding]:
    """Say which classes differ between the splits, are rare, or are written in two ways."""
    sets = list(splits.values())
    tables = {(annotations.class_names, annotations.category_ids) for annotations in sets}
    if len(tables) > 1:
        lines = [
            f"\n  {name}: " + ", ".join(f"{i} {c}" for i, c in zip(s.category_ids, s.class_names, strict=True))
            for name, s in splits.items()
        ]
        return [CLASSES_DIFFER.broken(sets[0].source, f"the splits have different categories:{''.join(lines)}")]
    rows = class_table(splits)
    train = next(iter(splits))
    place = f"{sets[0].source}" if len(sets) == 1 else f"{sets[0].source} and {len(sets) - 1} more"
    missing = [row.name for row in rows if not all(row.num_boxes.values()) and any(row.num_boxes.values())]
    rare = [row.name for row in rows if row.num_boxes[train] < FEW_BOXES and any(row.num_boxes.values())]
    found = []
    if missing and len(sets) > 1:
        problem = f"{len(missing)} of {len(rows)} classes have no box in one of the splits: {_named(missing)}"
        found.append(ONE_SPLIT_CLASS.broken(place, problem, len(missing)))
    if rare:
        problem = f"{len(rare)} of {len(rows)} classes have fewer than {FEW_BOXES} boxes in {train}: {_named(rare)}"
        found.append(RARE_CLASS.broken(place, problem, len(rare)))
    for number, row in enumerate(rows):
        others = [other.name for other in rows[number + 1 :] if _is_same_word(row.name, other.name)]
        found += [SIMILAR_NAMES.broken(place, f"{row.name!r} and {other!r} are two classes") for other in others]
    return found


def about_objects(name: str, annotations: AnnotationSet) -> list[Finding]:
    """Say what is odd about the objects of a split that can all be used."""
    place = annotations.source
    counts = np.diff(annotations.box_offsets)
    found = []
    if name.startswith("train"):
        try:
            require_objects(annotations)
        except AnnotationError as reason:
            found.append(NO_OBJECTS.broken(place, str(reason).partition("\n")[0].removeprefix(f"{place}: ")))
    num_empty = int(np.count_nonzero(counts == 0))
    if num_empty:
        problem = f"{num_empty} of {len(counts)} images have no object"
        found.append(NO_OBJECT_IMAGES.broken(place, problem, num_empty))
    rows = np.repeat(np.arange(len(counts)), counts)
    keys = np.column_stack([rows, annotations.labels, annotations.boxes])
    _, first, num_same = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if len(first) < len(keys):
        path = annotations.image_paths[rows[first[num_same > 1][0]]]
        problem = (
            f"{len(keys) - len(first)} boxes stand in an image twice with the same class, the first in {path!s:.200}"
        )
        found.append(BOX_REPEATED.broken(place, problem, len(keys) - len(first)))
    if len(counts) and counts.max() > MAX_DETECTIONS:
        num_many = int(np.count_nonzero(counts > MAX_DETECTIONS))
        problem = f"{num_many} images have more than {MAX_DETECTIONS} objects, the most {counts.max()}"
        found.append(MANY_OBJECTS.broken(place, problem, num_many))
    return found


def stretched_boxes(annotations: AnnotationSet, image_size: int) -> npt.NDArray[np.float64]:
    """Return the boxes [T, 4] xyxy as they are once each image is a square of side `image_size` px.

    Where the size of an image is not known it counts as that square already.
    """
    sizes = annotations.sizes[:, [1, 0, 1, 0]].repeat(np.diff(annotations.box_offsets), axis=0).astype(np.float64)
    return annotations.boxes.astype(np.float64) * np.where(sizes > 0, image_size / np.maximum(sizes, 1), 1.0)


def size_bin(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return for each box which of the `SIDES` bounds its size, the square root of its area; len(SIDES): none."""
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


def _is_same_word(name: str, other: str) -> bool:
    """Tell whether two names differ in letters' case, spaces, hyphens, or a plural's s alone."""
    first, second = ("".join(c for c in word.casefold() if c.isalnum()) for word in (name, other))
    return first == second or (first.rstrip("s") == second.rstrip("s") and len(first) > 2)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more
