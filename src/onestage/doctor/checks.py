"""All checks of a data set, in order."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import FILE, UNREACHED_BOX, require_few_skipped, select_images
from onestage.data.image_headers import check_headers, tiny_boxes
from onestage.data.layouts import Split
from onestage.doctor.anchors import POSITIVE_IOU, Coverage, DetectorAnchors, measure_coverage
from onestage.doctor.decoding import decode_all
from onestage.doctor.leakage import find_leakage
from onestage.doctor.statistics import ClassRow, canvas_boxes, check_classes, check_objects, class_table, shape_counts
from onestage.doctor.usage import check_use
from onestage.errors import AnnotationError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding, JSONDict

MAX_UNREACHED = 0.05  # fraction of boxes with only their forced match; more is worth a warning


class Diagnosis(NamedTuple):
    """Counts and findings of a data set."""

    splits: list[JSONDict]  # the counts of each readable one
    classes: list[ClassRow]  # empty if the splits' classes differ
    shapes: dict[str, list[int]]  # of the first split's boxes, on the detector's canvas
    coverage: Coverage | None  # of the first split's boxes; None without boxes or anchors
    anchors: DetectorAnchors
    findings: list[Finding]
    seconds: dict[str, float]  # per pass
    num_headers: int
    training_command: str = ""  # empty if training would stop

    @property
    def exit_code(self) -> int:
        """Return 3 if something stops training or is skipped by it, else 0."""
        return 3 if any(finding.effect in ("error", "skipped") for finding in self.findings) else 0


def examine(
    splits: Sequence[Split],
    anchors: DetectorAnchors,
    *,
    near_copies: bool = True,
    is_decoded: bool = False,
    max_bad_fraction: float = 0.01,
) -> tuple[Diagnosis, dict[str, AnnotationSet]]:
    """Check splits as training would meet them; return the diagnosis, and the splits without unusable images.

    splits: of one data set, the training split first. near_copies: compare splits by what their images show.
    is_decoded: decode every image completely. max_bad_fraction: that training may skip, in [0, 1].
    """
    findings = [finding for split in splits for finding in split.findings]
    start = time.perf_counter()
    usable = _check_headers(splits, max_bad_fraction, findings)
    seconds = {"headers": time.perf_counter() - start}
    if is_decoded:
        undecodable = decode_all(usable.values())
        findings += undecodable
        places = {finding.place for finding in undecodable}
        for name, part in usable.items():
            is_kept = [printable(str(path)) not in places for path in part.image_paths]
            usable[name] = select_images(part, np.flatnonzero(is_kept))
        seconds["decoding"] = time.perf_counter() - start - sum(seconds.values())
    for name, annotations in usable.items():
        findings += check_objects(annotations, anchors.max_detections, is_training=name == splits[0].name)
        findings += tiny_boxes(annotations, anchors.image_size)
    if all(split.source is splits[0].source for split in splits):
        findings += check_use(splits, usable)
    findings += find_leakage(list(usable.items()), near_copies)
    seconds["leakage"] = time.perf_counter() - start - sum(seconds.values())
    shapes, coverage = _check_anchors(next(iter(usable.values()), None), anchors, findings)
    findings += check_classes(usable)
    diagnosis = Diagnosis(
        splits=[_summarise(split, usable[split.name]) for split in splits if split.name in usable],
        classes=class_table(usable) or [],
        shapes=shapes,
        coverage=coverage,
        anchors=anchors,
        findings=findings,
        seconds=seconds,
        num_headers=sum(len(split.annotations) for split in splits if split.annotations is not None),
    )
    return diagnosis, usable


def _check_headers(
    splits: Sequence[Split], max_bad_fraction: float, findings: list[Finding]
) -> dict[str, AnnotationSet]:
    """Check the headers of all images; return the splits without unusable ones, and extend the findings."""
    usable: dict[str, AnnotationSet] = {}
    for split in splits:
        annotations = split.annotations
        if annotations is None:
            continue
        checks = check_headers(annotations)
        found = [finding for check in checks for finding in check.findings]
        findings += found
        rows = np.flatnonzero([check.is_usable for check in checks])
        source, num_boxes = annotations.source, len(annotations.boxes)
        try:
            require_few_skipped(source, len(rows), num_boxes, [*split.findings, *found], max_bad_fraction)
        except AnnotationError as reason:
            problem, *_, remedy = str(reason).splitlines()  # the findings themselves stand in between
            findings.append(FILE.broken_by(source, AnnotationError(f"{problem}\n{remedy}")))
        sizes = np.array([(check.height, check.width) for check in checks], dtype=np.int32).reshape(-1, 2)
        known = annotations.sizes
        usable[split.name] = select_images(replace(annotations, sizes=np.where(known > 0, known, sizes)), rows)
    return usable


def _check_anchors(
    annotations: AnnotationSet | None, anchors: DetectorAnchors, findings: list[Finding]
) -> tuple[dict[str, list[int]], Coverage | None]:
    """Return shapes and coverage of the training split's boxes, and extend the findings."""
    if annotations is None or annotations.is_crowd.all():  # also true for an empty array
        return {}, None
    boxes, labels = canvas_boxes(annotations, anchors.image_size)
    if not anchors.levels:
        return shape_counts(boxes), None
    coverage = measure_coverage(boxes, labels, len(annotations.class_names), anchors)
    if coverage.num_unreached > MAX_UNREACHED * len(boxes):
        problem = (
            f"{coverage.num_unreached} of {len(boxes)} boxes have no anchor of {anchors.detector} with IoU >= "
            f"{POSITIVE_IOU:g}; each trains one anchor that fits it badly"
        )
        findings.append(UNREACHED_BOX.broken(annotations.source, problem, coverage.num_unreached))
    return shape_counts(boxes), coverage


def _summarise(split: Split, annotations: AnnotationSet) -> JSONDict:
    return {
        "name": split.name,
        "format": split.source.format,
        "source": annotations.source,
        "num_images": len(annotations),
        "num_empty_images": int(np.count_nonzero(np.diff(annotations.box_offsets) == 0)),
        "num_boxes": len(annotations.boxes),
        "num_crowds": int(np.count_nonzero(annotations.is_crowd)),
        "num_difficult": int(np.count_nonzero(annotations.is_difficult)),
        "num_classes": len(annotations.class_names),
    }
