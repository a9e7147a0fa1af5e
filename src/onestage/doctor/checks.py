"""All checks of a data set, one after the other: what `onestage doctor` reports."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import (
    BOX_EMPTY,
    BOX_NOT_FINITE,
    BOX_OUTSIDE,
    OBJECT_MALFORMED,
    require_few_bad,
    select_images,
    tiny_boxes,
)
from onestage.data.image_headers import check_headers
from onestage.data.layouts import Split, as_finding
from onestage.doctor.coverage import Coverage, DetectorAnchors, about_coverage, measure_coverage
from onestage.doctor.decoding import decode_all
from onestage.doctor.leakage import find_leakage
from onestage.doctor.statistics import (
    ClassRow,
    about_classes,
    about_objects,
    class_table,
    shape_counts,
    stretched_boxes,
)
from onestage.errors import AnnotationError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

BOX_RULES = {rule.name for rule in (BOX_EMPTY, BOX_NOT_FINITE, BOX_OUTSIDE, OBJECT_MALFORMED)}


class Depth(NamedTuple):
    """How far to look."""

    near_copies: bool = True  # whether splits are compared by what their images show
    num_decoders: int = 0  # processes that decode every image whole; 0: none is decoded
    max_bad_fraction: float = 0.01  # that a training would accept, 0..1


class SplitSummary(NamedTuple):
    """The numbers of one split."""

    name: str
    format: str
    source: str
    num_images: int
    num_empty_images: int  # without an object
    num_boxes: int
    num_crowds: int  # boxes that are regions of many objects
    num_difficult: int
    num_classes: int


class Diagnosis(NamedTuple):
    """What is there and what is wrong with it."""

    splits: list[SplitSummary]  # those that could be read
    classes: list[ClassRow]  # of all splits; empty where they differ
    shapes: dict[str, list[int]]  # of the first split's boxes, at the detector's image size
    coverage: Coverage | None  # of the first split's boxes; None where it has none
    anchors: DetectorAnchors
    findings: list[Finding]
    seconds: dict[str, float]  # that each pass took
    num_headers: int

    @property
    def exit_code(self) -> int:
        """Return 3 where something stops a training or is left out of it, else 0."""
        return 3 if any(finding.effect in ("error", "skipped") for finding in self.findings) else 0


def examine(
    splits: Sequence[Split], anchors: DetectorAnchors, depth: Depth
) -> tuple[Diagnosis, dict[str, AnnotationSet]]:
    """Check splits as a training would meet them.

    Args:
        splits: of one data set, the training split first; see `read_splits`.
        anchors: of the detector that is to be trained.
        depth: how far to look.

    Returns:
        What was found, and the splits by name without the images that cannot be used.
    """
    findings = [finding for split in splits for finding in split.findings]
    seconds: dict[str, float] = {}
    usable = _check_images(splits, depth, findings, seconds)
    for name, annotations in usable.items():
        findings += [*about_objects(name, annotations), *tiny_boxes(annotations, anchors.image_size)]
    start = time.perf_counter()
    findings += find_leakage(list(usable.items()), depth.near_copies)
    seconds["leakage"] = time.perf_counter() - start
    first = next(iter(usable.values()), None)
    coverage, shapes = _fit(first, anchors)
    if first is not None:
        findings += about_classes(usable)
        findings += about_coverage(first.source, coverage, sum(shapes["size"]), anchors) if coverage else []
    are_same = len({(part.class_names, part.category_ids) for part in usable.values()}) == 1
    diagnosis = Diagnosis(
        splits=[_summary(split, usable[split.name]) for split in splits if split.name in usable],
        classes=class_table(usable) if are_same else [],
        shapes=shapes,
        coverage=coverage,
        anchors=anchors,
        findings=findings,
        seconds=seconds,
        num_headers=sum(len(split.annotations) for split in splits if split.annotations is not None),
    )
    return diagnosis, usable


def _check_images(
    splits: Sequence[Split], depth: Depth, findings: list[Finding], seconds: dict[str, float]
) -> dict[str, AnnotationSet]:
    """Look at all images; return the splits without those that cannot be used, and add to findings and seconds."""
    usable: dict[str, AnnotationSet] = {}
    start = time.perf_counter()
    for split in splits:
        if split.annotations is not None:
            usable[split.name], found = _usable_images(split.annotations)
            findings += [*found, *_too_many(split.annotations, [*split.findings, *found], depth.max_bad_fraction)]
    seconds["headers"] = time.perf_counter() - start
    if depth.num_decoders:
        start = time.perf_counter()
        torn = decode_all(usable.values(), depth.num_decoders)
        findings += torn
        usable = {name: _without(part, {finding.place for finding in torn}) for name, part in usable.items()}
        seconds["decoding"] = time.perf_counter() - start
    return usable


def _usable_images(annotations: AnnotationSet) -> tuple[AnnotationSet, list[Finding]]:
    """Look at all headers; return the images that can be used, with the sizes that the annotation leaves out."""
    checks = check_headers(annotations)
    found = np.array([(check.height, check.width) for check in checks], dtype=np.int32).reshape(-1, 2)
    sized = replace(annotations, sizes=np.where(annotations.sizes > 0, annotations.sizes, found))
    kept = np.flatnonzero([check.is_usable for check in checks])
    return select_images(sized, kept), [finding for check in checks for finding in check.findings]


def _without(annotations: AnnotationSet, places: set[str]) -> AnnotationSet:
    """Leave out the images of these (printable) paths."""
    is_kept = [printable(str(path)) not in places for path in annotations.image_paths]
    return annotations if all(is_kept) else select_images(annotations, np.flatnonzero(is_kept))


def _too_many(annotations: AnnotationSet, findings: Sequence[Finding], max_bad_fraction: float) -> list[Finding]:
    """Say where a training would not accept that so much is left out."""
    bad = [finding for finding in findings if finding.effect == "skipped"]
    bad_boxes = [finding.line for finding in bad if finding.rule in BOX_RULES]
    bad_images = [finding.line for finding in bad if finding.rule not in BOX_RULES]
    num_left_out = len(set(annotations.skipped) & set(bad_images))  # by the parser: they are not in the set any more
    num_images = len(annotations) + num_left_out
    stops = []
    totals = (("boxes", bad_boxes, len(annotations.boxes) + len(bad_boxes)), ("images", bad_images, num_images))
    for noun, lines, total in totals:
        try:
            require_few_bad(annotations.source, noun, lines, total, max_bad_fraction)
        except AnnotationError as reason:
            text = str(reason)
            stops.append(AnnotationError(f"{text.partition(chr(10))[0]}\n{text.rpartition(chr(10))[2]}"))
    return [as_finding(reason, Path(annotations.source)) for reason in stops]


def _fit(annotations: AnnotationSet | None, anchors: DetectorAnchors) -> tuple[Coverage | None, dict[str, list[int]]]:
    """Measure the boxes of the training split at the size that the detector sees."""
    if annotations is None or annotations.is_crowd.all():  # also where there is none at all
        return None, {}
    is_object = ~annotations.is_crowd
    boxes, labels = stretched_boxes(annotations, anchors.image_size)[is_object], annotations.labels[is_object]
    coverage = measure_coverage(boxes, labels, len(annotations.class_names), anchors)
    return coverage, shape_counts(boxes)


def _summary(split: Split, annotations: AnnotationSet) -> SplitSummary:
    return SplitSummary(
        split.name,
        split.format,
        annotations.source,
        len(annotations),
        int(np.count_nonzero(np.diff(annotations.box_offsets) == 0)),
        len(annotations.boxes),
        int(np.count_nonzero(annotations.is_crowd)),
        int(np.count_nonzero(annotations.is_difficult)),
        len(annotations.class_names),
    )
