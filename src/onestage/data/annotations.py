"""From parsed columns to an `AnnotationSet`: the checks that every annotation format shares. No file is read here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from onestage.data.rules import BOX_CLIPPED, BOX_EMPTY, BOX_NOT_FINITE, BOX_OUTSIDE, OBJECT_MALFORMED, Rule
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet, Finding

ALWAYS_ALLOWED = 2  # so many bad items stop no run, unless max_bad_fraction is 0: in a set of ten, one is already 10 %
NUM_EXAMPLES = 5  # bad items that an error message quotes
CLIP_NOTICE = 1.0  # px; a box that reaches out further than rounding explains is worth a warning


class ImageColumns(NamedTuple):
    """The images of a split, in the order of the file."""

    paths: Sequence[str]  # N
    ids: npt.NDArray[np.int64]  # [N]
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width); 0, 0 where unknown


class ObjectColumns(NamedTuple):
    """The objects of a split as written in its files: nothing checked, any order."""

    image_rows: npt.NDArray[np.int64]  # [T] row of the image in `ImageColumns`
    boxes: npt.NDArray[np.float64]  # [T, 4] xyxy edges, px
    labels: npt.NDArray[np.int64]  # [T] 0..K-1
    areas: npt.NDArray[np.float64]  # [T] px^2; NaN where the file gives none
    is_crowd: npt.NDArray[np.bool_]  # [T]
    is_difficult: npt.NDArray[np.bool_]  # [T]
    problems: Mapping[int, str]  # row -> rule that the parser saw broken; the row's other values are then not used


def build_annotation_set(
    source: str,
    images: ImageColumns,
    objects: ObjectColumns,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    describe: Callable[[int], str],
    findings: Sequence[Finding] = (),
    max_bad_fraction: float = 0.01,
) -> AnnotationSet:
    """Check every box, clip it to its image, leave out what cannot be an object, and group the rest by image.

    A box is left out when a coordinate is not finite, when it has no width or height, or when it lies outside its
    image. Each gives a line in `AnnotationSet.skipped`. Images without objects stay.

    Args:
        source: file or folder, for messages.
        images: N images; those that were left out are not among them.
        objects: T objects of these images.
        class_names: the K names, in label order.
        category_ids: the data set's own K ids, in label order.
        describe: row of an object -> its file, image, id and values as written, for messages.
        findings: what the parser found; those that are "left out" stand for one image each.
        max_bad_fraction: 0..1; see `require_few_bad`.

    Raises:
        AnnotationError: too many bad boxes or images, or objects of which none can be used.
    """
    num_images = len(images.paths)
    require_images(source, num_images, findings, max_bad_fraction)
    _refuse_fractions(source, objects.boxes)
    boxes, clipped = _clip(source, objects, images.sizes)
    broken_rules = _broken_rules(boxes, objects)
    bad_boxes = [rule.broken(describe(row), problem) for row, (rule, problem) in sorted(broken_rules.items())]
    skipped_objects = [finding.line for finding in bad_boxes]
    require_few_bad(source, "boxes", skipped_objects, len(boxes), max_bad_fraction)

    is_valid = ~np.isin(np.arange(len(boxes)), list(broken_rules))
    if len(boxes) and not is_valid.any():
        _refuse(source, f"none of the {len(boxes)} boxes can be used", skipped_objects, "Correct the boxes.")
    rows = np.flatnonzero(is_valid)
    rows = rows[np.argsort(objects.image_rows[rows], kind="stable")]
    counts = np.bincount(objects.image_rows[rows], minlength=num_images)
    return AnnotationSet(
        source=source,
        image_paths=np.array(images.paths, dtype=np.str_),
        image_ids=images.ids,
        sizes=images.sizes,
        box_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes[rows],
        labels=objects.labels[rows],
        areas=_areas(objects.areas[rows], boxes[rows]),
        is_crowd=objects.is_crowd[rows],
        is_difficult=objects.is_difficult[rows],
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        findings=(*findings, *clipped, *bad_boxes),
    )


def select_images(annotations: AnnotationSet, rows: npt.NDArray[np.int64]) -> AnnotationSet:
    """Return the set of only these images, in this order, with their objects.

    Args:
        annotations: N images.
        rows: [n] of 0..N-1.
    """
    counts = np.diff(annotations.box_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    objects = np.repeat(annotations.box_offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
    return replace(
        annotations,
        image_paths=annotations.image_paths[rows],
        image_ids=annotations.image_ids[rows],
        sizes=annotations.sizes[rows],
        box_offsets=offsets,
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        areas=annotations.areas[objects],
        is_crowd=annotations.is_crowd[objects],
        is_difficult=annotations.is_difficult[objects],
    )


def require_images(source: str, num_images: int, findings: Sequence[Finding], max_bad_fraction: float) -> None:
    """Stop when no image is left, or when too many were left out; see `require_few_bad`.

    Args:
        source: file or folder, for the message.
        num_images: those that are left.
        findings: those that are "left out" stand for one image each.
        max_bad_fraction: 0..1.

    Raises:
        AnnotationError: so it is.
    """
    skipped_images = [finding.line for finding in findings if finding.effect == "left out"]
    require_few_bad(source, "images", skipped_images, num_images + len(skipped_images), max_bad_fraction)
    if not num_images:
        _refuse(source, "none of its images can be used", skipped_images, "Correct them, or data.root.")


def require_few_bad(source: str, noun: str, bad: Sequence[str], total: int, max_bad_fraction: float) -> None:
    """Stop when more than `max_bad_fraction` of all images or boxes would be left out.

    Two bad ones always pass, because in a small set they say nothing about the rest. `max_bad_fraction=0` lets none
    pass.

    Args:
        source: file or folder, for the message.
        noun: what is counted, in the plural.
        bad: one line for each item that would be left out.
        total: all items, good and bad.
        max_bad_fraction: 0..1.

    Raises:
        AnnotationError: too many are bad; it quotes the first few.
    """
    allowed = max(max_bad_fraction * total, ALWAYS_ALLOWED) if max_bad_fraction > 0 else 0
    if len(bad) > allowed + 1e-6:  # 0.29 * 100 is 28.999999999999996
        problem = f"{len(bad)} of {total} {noun} cannot be used; at most {max_bad_fraction:.4g} of them may be left out"
        more = f", or allow more: data.max_bad_fraction: {_next_fraction(len(bad), total)}"
        remedy = f"Correct them{more if len(bad) < total else ''}."
        _refuse(source, problem, bad, remedy)


def require_same_names(source: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Check that a file has exactly the classes that are expected, in any order.

    Raises:
        AnnotationError: a name is in one list only; it gives both lists and the difference.
    """
    if sorted(found) == sorted(expected):
        return
    only_found = sorted(set(found) - set(expected))
    only_expected = sorted(set(expected) - set(found))
    raise AnnotationError(
        f"{source}: the classes differ from those expected; both must hold the same names.\n"
        f"  here:     {', '.join(found)}\n  expected: {', '.join(expected)}\n"
        f"  only here: {', '.join(only_found) or 'none'}; only expected: {', '.join(only_expected) or 'none'}\n"
        "Give every split, and the checkpoint, the same list of classes."
    )


def require_objects(annotations: AnnotationSet) -> AnnotationSet:
    """Return the training set as it is.

    Raises:
        AnnotationError: it holds no object, or nothing but crowds.
    """
    if annotations.is_crowd.all():  # also where there is none at all
        raise AnnotationError(
            f"{annotations.source}: none of its {len(annotations)} training images has an object to learn from; crowds "
            "do not count.\nIs it the annotation file of this data set, and the training split?"
        )
    return annotations


def _refuse_fractions(source: str, boxes: npt.NDArray[np.float64]) -> None:
    """Stop where boxes are shares of their image: as pixels each is too small, and nothing would be trained on."""
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) and boxes.max() <= 1 and (boxes % 1 > 0).any():
        raise AnnotationError(
            f"{source}: all of the {len(boxes)} boxes lie within 0..1, like fractions of the width and height of an "
            "image; they must be in pixels.\nMultiply them by the size of their image."
        )


def _clip(
    source: str, objects: ObjectColumns, sizes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], list[Finding]]:
    """Clip each box to its image where the size is known, else to the left and top edge alone; say how many moved."""
    height_width = sizes[objects.image_rows].astype(np.float64)
    limits = np.where(height_width > 0, height_width, np.inf)[:, [1, 0, 1, 0]]
    clipped = np.clip(objects.boxes, 0.0, limits)  # NaN stays NaN
    with np.errstate(invalid="ignore"):  # inf - inf where the size is unknown
        moved = np.nanmax(np.abs(clipped - objects.boxes), axis=1, initial=0.0)
        overlaps = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    num_far = int(np.count_nonzero(np.isfinite(moved) & (moved > CLIP_NOTICE) & overlaps))
    problem = f"{num_far} of {len(clipped)} boxes reach out of their image and are clipped to it"
    findings = [BOX_CLIPPED.broken(source, problem, num_far)] if num_far else []
    with np.errstate(over="ignore"):  # a coordinate beyond float32 becomes infinite and is left out below
        return clipped.astype(np.float32), findings


def _broken_rules(clipped: npt.NDArray[np.float32], objects: ObjectColumns) -> dict[int, tuple[Rule, str]]:
    """Row of every box that cannot be used -> the rule it breaks, in words."""
    written = objects.boxes
    is_finite = np.all(np.isfinite(written) & np.isfinite(clipped), axis=1).astype(np.bool_)
    has_size = np.all(written[:, 2:] > written[:, :2], axis=1).astype(np.bool_)
    is_inside = np.all(clipped[:, 2:] > clipped[:, :2], axis=1).astype(np.bool_)
    rules: dict[int, tuple[Rule, str]] = {}
    for row in np.flatnonzero(~(is_finite & has_size & is_inside)).tolist():
        if not is_finite[row]:
            rules[row] = BOX_NOT_FINITE, "every coordinate must be a finite number"
        elif not has_size[row]:
            rules[row] = BOX_EMPTY, "width and height must be > 0"
        else:
            rules[row] = BOX_OUTSIDE, "the box must overlap its image"
    return rules | {row: (OBJECT_MALFORMED, problem) for row, problem in objects.problems.items()}


def _areas(areas: npt.NDArray[np.float64], boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Fill in the box's area where the file gives none that an object can have."""
    box_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return np.where(np.isfinite(areas) & (areas > 0), areas, box_areas).astype(np.float32)


def _next_fraction(num_bad: int, total: int) -> float:
    """Return the smallest fraction of two digits that would let `num_bad` of `total` pass."""
    return min(math.ceil(100 * num_bad / max(total, 1)) / 100, 1.0)


def _refuse(source: str, problem: str, lines: Sequence[str], remedy: str) -> NoReturn:
    """Raise an error that quotes the first few lines."""
    examples = "".join(f"\n  {line}" for line in lines[:NUM_EXAMPLES])
    more = f"\n  and {len(lines) - NUM_EXAMPLES} more; see all: onestage doctor" if len(lines) > NUM_EXAMPLES else ""
    raise AnnotationError(f"{source}: {problem}.{examples}{more}\n{remedy}")
