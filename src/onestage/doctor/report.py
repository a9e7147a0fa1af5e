"""A diagnosis as text for people and as JSON for machines."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from onestage import __version__
from onestage.data.annotations import grouped
from onestage.doctor.checks import Diagnosis
from onestage.doctor.coverage import POSITIVE_IOU
from onestage.doctor.statistics import RATIOS, SIDES
from onestage.files import printable
from onestage.types import Finding

NUM_SHOWN = 20  # findings of one rule, and nowhere more in the text
NUM_CLASSES_SHOWN = 100
TITLES = {
    "error": "ERROR     stops a training",
    "skipped": "ERROR     left out of a training",
    "warning": "WARNING   training goes on",
    "note": "NOTE      nothing needs to be done",
}


def as_json(diagnosis: Diagnosis, exit_code: int) -> str:
    """Return everything that was found. Numbers that are not there are null."""
    coverage = diagnosis.coverage
    content = {
        "onestage": __version__,
        "exit_code": exit_code,
        "splits": [split._asdict() for split in diagnosis.splits],
        "classes": [row._asdict() for row in diagnosis.classes],
        "box_shapes": {
            "image_size": diagnosis.anchors.image_size,
            "size_bounds": SIDES,
            "ratio_bounds": RATIOS,
            **diagnosis.shapes,
        },
        "coverage": None
        if coverage is None
        else {
            "detector": diagnosis.anchors.detector,
            "image_size": diagnosis.anchors.image_size,
            **{key: _finite(value) for key, value in coverage._asdict().items()},
        },
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "seconds": diagnosis.seconds,
        "num_headers": diagnosis.num_headers,
    }
    return json.dumps(content, indent=1, allow_nan=False)


def as_text(diagnosis: Diagnosis) -> str:
    """Return a page: splits, classes, boxes and anchors, then what was found, the gravest last."""
    lines = [
        *_split_lines(diagnosis),
        *_class_lines(diagnosis),
        *_shape_lines(diagnosis),
        *_coverage_lines(diagnosis),
        *_finding_lines(diagnosis.findings),
        "",
        _time_line(diagnosis),
        _verdict(diagnosis.findings),
    ]
    return "\n".join(printable(line) for line in lines)


def _split_lines(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.splits:
        yield "no split could be read"
        return
    rows: list[tuple[str, ...]] = [
        ("split", "format", "images", "without objects", "boxes", "crowds", "difficult", "classes")
    ]
    for s in diagnosis.splits:
        numbers = (s.num_images, s.num_empty_images, s.num_boxes, s.num_crowds, s.num_difficult, s.num_classes)
        rows.append((printable(s.name), s.format, *map(str, numbers)))
    yield from _aligned(rows, num_left=2)


def _class_lines(diagnosis: Diagnosis) -> Iterator[str]:
    rows = diagnosis.classes
    if not rows:
        return
    names = list(rows[0].num_boxes)
    ids = [row.category_id for row in rows]
    num_gaps = max(ids) - min(ids) + 1 - len(ids)
    gaps = f" with {num_gaps} gaps" if num_gaps else ""
    yield ""
    yield f"boxes (images) of each class; ids {min(ids)}..{max(ids)}{gaps} are mapped to labels 0..{len(ids) - 1}"
    reached = diagnosis.coverage.by_class if diagnosis.coverage else [math.nan] * len(rows)
    table = [("class", "id", *map(printable, names), "reached by anchors")]
    for row, share in list(zip(rows, reached, strict=True))[:NUM_CLASSES_SHOWN]:
        counts = [f"{row.num_boxes[name]} ({row.num_images[name]})" for name in names]
        table.append((printable(row.name), str(row.category_id), *counts, _percent(share)))
    yield from _aligned(table, num_left=1)
    if len(rows) > NUM_CLASSES_SHOWN:
        yield f"  and {len(rows) - NUM_CLASSES_SHOWN} more: see --json"


def _shape_lines(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.shapes:
        return
    yield ""
    side = diagnosis.anchors.image_size
    yield f"boxes of {printable(diagnosis.splits[0].name)} at {side} x {side} px"
    sizes = [f"< {SIDES[0]}", *(f"{a}-{b}" for a, b in pairwise(SIDES)), f">= {SIDES[-1]}"]
    shapes = ["< 1:3", "1:3-1:1.5", "1:1.5-1.5:1", "1.5:1-3:1", ">= 3:1"]
    reached = diagnosis.coverage.by_size if diagnosis.coverage else []
    yield from _aligned(
        [
            ("size, px", *sizes),
            ("boxes", *map(str, diagnosis.shapes["size"])),
            ("reached", *map(_percent, reached)),
        ],
        num_left=1,
    )
    yield from _aligned(
        [("width:height", *shapes), ("boxes", *map(str, diagnosis.shapes["width / height"]))], num_left=1
    )


def _coverage_lines(diagnosis: Diagnosis) -> Iterator[str]:
    coverage = diagnosis.coverage
    if coverage is None:
        return
    yield ""
    yield (
        f"anchors of {diagnosis.anchors.detector}: {_percent(coverage.share)} of the boxes have one with IoU >= "
        f"{POSITIVE_IOU:g} (mean best IoU {coverage.mean_best_iou:.2f}); an object trains "
        f"{coverage.positives_per_object:.1f} anchors; {coverage.num_unreached} boxes are reached by none"
    )


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    groups = list(grouped(findings).items())
    for (effect, rule), members in reversed(groups):
        num_items = sum(member.num_items for member in members)
        yield ""
        yield f"{TITLES[effect]}: {rule} ({num_items})"
        for member in members[:NUM_SHOWN]:
            yield from ("  " + line for line in member.line.split("\n"))
        if len(members) > NUM_SHOWN:
            yield f"  and {len(members) - NUM_SHOWN} more: see --json"
        yield from (f"  -> {line}" for line in dict.fromkeys(member.remedy for member in members[:NUM_SHOWN]))


def _time_line(diagnosis: Diagnosis) -> str:
    seconds = diagnosis.seconds
    parts = [f"{name} {value:.1f} s" for name, value in seconds.items() if name != "headers"]
    rate = diagnosis.num_headers / max(seconds.get("headers", 0.0), 1e-3)
    return ", ".join([f"{diagnosis.num_headers} image headers in {seconds['headers']:.1f} s ({rate:.0f}/s)", *parts])


def _verdict(findings: Sequence[Finding]) -> str:
    counts = {effect: sum(1 for finding in findings if finding.effect == effect) for effect in TITLES}
    errors = counts["error"] + counts["skipped"]
    if not errors and not counts["warning"]:
        return "clean"
    rest = _counted(counts["warning"], "warning") if counts["warning"] else "the rest is clean"
    if counts["error"]:
        rest = "a training would stop"
    return f"{_counted(errors, 'error')} of the data, {rest}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lay out a table: the first columns to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _finite(value: float | list[float]) -> float | list[float | None] | None:
    """Replace NaN, which JSON does not have, by null."""
    if isinstance(value, list):
        return [None if math.isnan(item) else item for item in value]
    return None if math.isnan(value) else value
