"""Anchor tables as YAML that a training takes as it is, and the command that proposes one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from onestage.boxes.anchors import AnchorShapes
from onestage.doctor.anchors import propose_anchors
from onestage.doctor.coverage import (
    IMAGE_SIZES,
    TABLES,
    AnchorLevel,
    Coverage,
    DetectorAnchors,
    measure_coverage,
    ssd_level,
)
from onestage.doctor.statistics import stretched_boxes
from onestage.errors import ConfigError, DataError
from onestage.files import printable, read_file
from onestage.types import AnnotationSet

MAX_TABLE_BYTES = 1 << 20


def find_anchors(detector: str, table: str) -> DetectorAnchors:
    """Return a detector's anchors.

    Args:
        detector: one of `IMAGE_SIZES`.
        table: voc, coco, or the path of a YAML file that `onestage anchors` wrote.

    Raises:
        ConfigError: there is no such table, or the file is none.
    """
    if (detector, table) in TABLES:
        return DetectorAnchors(detector, IMAGE_SIZES[detector], TABLES[detector, table])
    if not table.endswith((".yaml", ".yml")):
        raise ConfigError(f"--anchors is {table!r}; it must be voc, coco, or a YAML file.\nSee: onestage doctor --help")
    try:
        content = read_file(
            Path(table), DataError, "a YAML file of `onestage anchors`", "Correct --anchors.", MAX_TABLE_BYTES
        )
    except DataError as reason:
        raise ConfigError(str(reason)) from None
    return DetectorAnchors(detector, IMAGE_SIZES[detector], _levels(table, content, detector))


def write_yaml(anchors: DetectorAnchors) -> str:
    """Return the table as a part of a configuration: `onestage fit --config ... --config FILE`."""
    rows = ""
    for level in anchors.levels:
        shapes = ", ".join(f"[{width:.4f}, {height:.4f}]" for width, height in level.as_shapes.shapes)
        rows += f"        - {{stride: {level.stride:g}, shapes: [{shapes}]}}\n"
    head = f"model:\n  detector:\n    class_path: onestage.models.{anchors.detector}\n    init_args:\n      anchors:\n"
    return head + rows


def compare_anchors(annotations: AnnotationSet, before: DetectorAnchors) -> tuple[DetectorAnchors, Coverage, Coverage]:
    """Propose a table for the boxes of a split; return it, and the coverage before and after.

    Raises:
        DataError: the split holds no box.
    """
    is_object = ~annotations.is_crowd
    boxes = stretched_boxes(annotations, before.image_size)[is_object]
    if not len(boxes):
        raise DataError(f"{annotations.source}: holds no object to fit anchors to.\nGive the training split.")
    after = before._replace(levels=propose_anchors(boxes, before))
    labels, num_classes = annotations.labels[is_object], len(annotations.class_names)
    old, new = (measure_coverage(boxes, labels, num_classes, anchors) for anchors in (before, after))
    return after, old, new


def comment(source: str, num_boxes: int, before: Coverage, after: Coverage) -> str:
    """Return coverage before and after as comment lines of YAML."""
    lines = [f"# {num_boxes} boxes of {printable(source)}"]
    for name, coverage in (("before", before), ("after", after)):
        lines.append(
            f"# {name}: {100 * coverage.share:.1f} % of the boxes have an anchor with IoU >= 0.5, mean best IoU "
            f"{coverage.mean_best_iou:.3f}, {coverage.positives_per_object:.1f} anchors per object"
        )
    return "\n".join(lines) + "\n"


def _levels(file: str, content: bytes, detector: str) -> tuple[AnchorLevel, ...]:
    """Read the rows of a table, and see that they are for this detector."""
    remedy = "Give a file that `onestage anchors` wrote for this detector."
    try:
        rows = yaml.safe_load(content)
        for key in ("model", "detector", "init_args", "anchors"):
            rows = rows[key]
        levels = tuple(_level(row, IMAGE_SIZES[detector]) for row in rows)
    except (yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError) as reason:
        problem = f"is no anchor table ({type(reason).__name__}: {str(reason).partition(chr(10))[0][:100]})"
        raise ConfigError(f"{printable(file)}: {problem}.\n{remedy}") from None
    maps = [(level.side, level.stride) for level in TABLES[detector, "voc"]]
    if [(level.side, level.stride) for level in levels] != maps:
        problem = f"its levels are not those of {detector}, whose (side, stride) are {maps}"
        raise ConfigError(f"{printable(file)}: {problem}.\n{remedy}")
    return levels


def _level(row: Mapping[str, object], image_size: int) -> AnchorLevel:
    """Return one row. Raises ValueError for what cannot be one."""
    shapes = row["shapes"]
    if not isinstance(shapes, list):
        raise ValueError("shapes is no list")
    stride = float(str(row["stride"]))
    pairs = tuple((float(str(width)), float(str(height))) for width, height in shapes)
    numbers = [stride, *(side for pair in pairs for side in pair)]
    if not (np.isfinite(numbers).all() and min(numbers) > 0):
        raise ValueError("a number is not positive")
    return ssd_level(AnchorShapes(stride, pairs), image_size)
