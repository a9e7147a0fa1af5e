"""Annotation sets made by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onestage.types import AnnotationSet


def annotation_set(
    labels_of_image: Sequence[Sequence[int]],
    *,
    num_classes: int | None = None,
    paths: Sequence[Path | str] | None = None,
    crowds: Sequence[int] = (),
) -> AnnotationSet:
    """One image for each list of labels; object t has the box (t, 0, t + 10, 10). crowds: rows of objects."""
    labels = np.array([label for image in labels_of_image for label in image], dtype=np.int64)
    number = len(labels_of_image)
    num_classes = num_classes or int(labels.max(initial=0)) + 1
    left = np.arange(len(labels), dtype=np.float32)
    return AnnotationSet(
        source="hand-made",
        image_paths=np.array([str(path) for path in paths or [f"{row}.jpg" for row in range(number)]]),
        image_ids=np.arange(1, number + 1),
        sizes=np.full((number, 2), 100, dtype=np.int32),
        box_offsets=np.concatenate([[0], np.cumsum([len(image) for image in labels_of_image])]).astype(np.int64),
        boxes=np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1),
        labels=labels,
        areas=np.full(len(labels), 100, dtype=np.float32),
        is_crowd=np.isin(np.arange(len(labels)), crowds),
        is_difficult=np.zeros(len(labels), dtype=np.bool_),
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        category_ids=tuple(range(1, num_classes + 1)),
    )
