"""A diagnosis as text for people and as JSON for programs."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from onestage import __version__
from onestage.data.annotations import grouped
from onestage.doctor.anchors import POSITIVE_IOU
from onestage.doctor.checks import Diagnosis
from onestage.doctor.statistics import RATIOS, SIDES
from onestage.evaluation.results import to_json
from onestage.files import printable
from onestage.types import Finding

NUM_SHOWN = 20  # findings per rule in the text
NUM_CLASSES_SHOWN = 100
TITLES = {
    "error": "ERROR     stops training, or the test of a test split",
    "skipped": "ERROR     skipped by training",
    "warning": "WARNING   training continues",
    "note": "NOTE      nothing needs to be done",
}


def as_json(diagnosis: Diagnosis, exit_code: int) -> str:
    """Return everything that was found. NaN becomes null."""
    anchors, coverage = diagnosis.anchors, diagnosis.coverage
    measured = coverage and {"detector": anchors.detector, "image_size": anchors.image_size, **coverage._asdict()}
    content = {
        "onestage": __version__,
        "exit_code": exit_code,
        "splits": diagnosis.splits,
        "classes": [row._asdict() for row in diagnosis.classes],
        "box_shapes": {
            "image_size": anchors.image_size, "size_bounds": SIDES, "ratio_bounds": RATIOS, **diagnosis.shapes
        },
        "coverage": json.loads(to_json(measured)),
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "seconds": diagnosis.seconds,
        "num_headers": diagnosis.num_headers,
        "training_command": diagnosis.training_command,
    }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False)


def as_text(diagnosis: Diagnosis) -> str:
    """Return a page: splits, classes, boxes and anchors, then the findings, the most severe last."""
    blocks = [_split_lines(diagnosis), _class_lines(diagnosis), _shape_lines(diagnosis), _anchor_lines(diagnosis)]
    blocks += [_finding_lines(*group) for group in reversed(grouped(diagnosis.findings).items())]
    texts = ("\n".join(map(printable, block)) for block in [*blocks, _summary_lines(diagnosis)])
    return "\n\n".join(filter(None, texts))


def _split_lines(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.splits:
        yield "no split could be read"
        return
    rows = [["split", "format", "images", "without objects", "boxes", "crowds", "difficult", "classes"]]
    for split in diagnosis.splits:
        counts = [str(value) for key, value in split.items() if key.startswith("num_")]
        rows.append([printable(split["name"]), split["format"], *counts])
    yield from _aligned(rows, num_left=2)


def _class_lines(diagnosis: Diagnosis) -> Iterator[str]:
    rows = diagnosis.classes
    if not rows:
        return
    ids = [row.category_id for row in rows]
    num_gaps = max(ids) - min(ids) + 1 - len(ids)
    gaps = f" with {num_gaps} gaps" if num_gaps else ""
    yield f"boxes (images) of each class; ids {min(ids)}..{max(ids)}{gaps} are mapped to labels 0..{len(ids) - 1}"
    reached = diagnosis.coverage.by_class if diagnosis.coverage else [math.nan] * len(rows)
    table = [["class", "id", *map(printable, rows[0].num_boxes), "reached by anchors"]]
    for row, share in list(zip(rows, reached, strict=True))[:NUM_CLASSES_SHOWN]:
        counts = [f"{row.num_boxes[name]} ({row.num_images[name]})" for name in row.num_boxes]
        table.append([printable(row.name), str(row.category_id), *counts, _percent(share)])
    yield from _aligned(table, num_left=1)
    if len(rows) > NUM_CLASSES_SHOWN:
        yield f"  and {len(rows) - NUM_CLASSES_SHOWN} more: see --json"


def _shape_lines(diagnosis: Diagnosis) -> Iterator[str]:
    shapes, coverage, side = diagnosis.shapes, diagnosis.coverage, diagnosis.anchors.image_size
    if not shapes:
        return
    yield f"boxes of {printable(diagnosis.splits[0]['name'])} at {side} x {side} px"
    sizes = [f"< {SIDES[0]}", *(f"{a}-{b}" for a, b in pairwise(SIDES)), f">= {SIDES[-1]}"]
    reached = [["reached", *map(_percent, coverage.by_size)]] if coverage else []
    yield from _aligned([["size, px", *sizes], ["boxes", *map(str, shapes["size"])], *reached], num_left=1)
    ratios = ["width:height", "< 1:3", "1:3-1:1.5", "1:1.5-1.5:1", "1.5:1-3:1", ">= 3:1"]
    yield from _aligned([ratios, ["boxes", *map(str, shapes["width / height"])]], num_left=1)


def _anchor_lines(diagnosis: Diagnosis) -> Iterator[str]:
    if coverage := diagnosis.coverage:
        yield (
            f"anchors of {diagnosis.anchors.detector}: {_percent(coverage.share)} of the boxes have one with IoU >= "
            f"{POSITIVE_IOU:g} (mean best IoU {coverage.mean_best_iou:.2f}); an object trains "
            f"{coverage.positives_per_object:.1f} anchors; {coverage.num_unreached} boxes are reached by none"
        )


def _finding_lines(kind: tuple[str, str], members: Sequence[Finding]) -> Iterator[str]:
    yield f"{TITLES[kind[0]]}: {kind[1]} ({sum(member.num_items for member in members)})"
    for member in members[:NUM_SHOWN]:
        yield from ("  " + line for line in member.line.split("\n"))
    if len(members) > NUM_SHOWN:
        yield f"  and {len(members) - NUM_SHOWN} more: see --json"
    yield from (f"  -> {line}" for line in dict.fromkeys(member.remedy for member in members[:NUM_SHOWN]))


def _summary_lines(diagnosis: Diagnosis) -> Iterator[str]:
    num_headers, seconds = diagnosis.num_headers, diagnosis.seconds
    parts = [f"{name} {value:.1f} s" for name, value in seconds.items() if name != "headers"]
    rate = num_headers / max(seconds["headers"], 1e-3)
    yield ", ".join([f"{num_headers} image headers in {seconds['headers']:.1f} s ({rate:.0f}/s)", *parts])
    counts = {effect: sum(finding.effect == effect for finding in diagnosis.findings) for effect in TITLES}
    num_errors, num_warnings = counts["error"] + counts["skipped"], counts["warning"]
    rest = "the rest is clean" if not num_warnings else f"{num_warnings} warning{'s' * (num_warnings > 1)}"
    if counts["error"]:
        rest = "training would stop"
    if diagnosis.training_command:
        yield f"to train on it: {diagnosis.training_command}"
    errors = f"{num_errors} error{'s' * (num_errors != 1)} in the data"
    yield f"{errors}, {rest}" if num_errors or num_warnings else "clean"


def _aligned(rows: Sequence[Sequence[str]], num_left: int) -> Iterator[str]:
    """Yield the lines of a table, with the first columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:num_left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[num_left:], widths[num_left:], strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"
