"""Annotation sets and targets made by hand, and random labels of anchors."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onestage.data.annotations import require_few_skipped
from onestage.types import BACKGROUND, IGNORE, AnnotationSet, Targets


def targets_of(*rows: Sequence[float]) -> Targets:
    """One image; each row is (x1, y1, x2, y2, label)."""
    table = torch.tensor(rows, dtype=torch.float32)
    return Targets(table[None, :, :4], table[None, :, 4].long())


def accepted(annotations: AnnotationSet, max_bad_fraction: float = 0.01) -> AnnotationSet:
    """Return a set of which training accepts the boxes and images that were skipped."""
    num_used = len(annotations), len(annotations.boxes)
    require_few_skipped(annotations.source, *num_used, annotations.findings, max_bad_fraction)
    return annotations


def hand_written(labels: Sequence[Sequence[int]], boxes: Sequence[Any], **fields: Any) -> AnnotationSet:
    """A set with boxes[i] and labels[i] in image i. fields: other values of AnnotationSet than the defaults here."""
    flat = np.array([box for image in boxes for box in image], dtype=np.float32).reshape(-1, 4)
    flat_labels = np.array([label for image in labels for label in image], dtype=np.int64)
    names = fields.get("class_names", [f"class {label}" for label in range(flat_labels.max(initial=0) + 1)])
    defaults = {
        "source": "hand-written",
        "image_paths": np.array([f"{row}.jpg" for row in range(len(labels))], dtype=np.str_),
        "image_ids": np.arange(1, len(labels) + 1),
        "sizes": np.full((len(labels), 2), 100, dtype=np.int32),
        "box_offsets": np.cumsum([0, *map(len, labels)]),
        "boxes": flat,
        "labels": flat_labels,
        "areas": np.prod(flat[:, 2:] - flat[:, :2], axis=1),
        "is_crowd": np.zeros(len(flat), dtype=np.bool_),
        "is_difficult": np.zeros(len(flat), dtype=np.bool_),
        "category_ids": tuple(range(1, len(names) + 1)),
    }
    return AnnotationSet(**{**defaults, **fields, "class_names": tuple(names)})


def annotation_set(
    labels_of_image: Sequence[Sequence[int]],
    *,
    num_classes: int | None = None,
    paths: Sequence[Path | str] | None = None,
    crowds: Sequence[int] = (),
) -> AnnotationSet:
    """One image for each list of labels; object t has the box (t, 0, t + 10, 10). crowds: rows of objects."""
    ends = np.cumsum([0, *map(len, labels_of_image)]).tolist()
    boxes = [[[t, 0, t + 10, 10] for t in range(*span)] for span in pairwise(ends)]
    fields: dict[str, Any] = {"source": "hand-made", "is_crowd": np.isin(np.arange(ends[-1]), crowds)}
    if num_classes is not None:
        fields["class_names"] = [f"class {label}" for label in range(num_classes)]
    if paths is not None:
        fields["image_paths"] = np.array(list(map(str, paths)))
    return hand_written(labels_of_image, boxes, **fields)


def random_anchors(num_logits: int, num_classes: int | None = None, dtype: torch.dtype = torch.float32):
    """Return logits [2, 20, C'] of both signs, and labels [2, 20] of every kind."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, num_logits, generator=generator, dtype=dtype) * 3
    labels = torch.randint(-2, num_classes or num_logits, (2, 20), generator=generator)
    assert {BACKGROUND, IGNORE, 0} <= set(labels.flatten().tolist())
    return logits.requires_grad_(), labels
