"""What a detector's anchors can learn of a set: the overlap of each box with its best anchor. SSD section 2.2."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.boxes.anchors import (
    SSD160,
    SSD300_COCO,
    SSD300_VOC,
    SSD512_COCO,
    SSD512_VOC,
    AnchorLevel,
    anchors_of_cell,
)
from onestage.data.annotations import UNREACHED_BOX
from onestage.doctor.statistics import SIDES, size_bin
from onestage.types import Finding

POSITIVE_IOU = 0.5  # that makes an anchor positive
FORCED_SHARE = 0.05  # of boxes that only the forced match can learn; more is worth a warning
SAMPLE = 2_000  # boxes, evenly spaced, of which all positives are counted

Boxes = npt.NDArray[np.float64]
Table = Sequence[AnchorLevel]


class DetectorAnchors(NamedTuple):
    """What coverage depends on."""

    detector: str  # class name, such as SSD300
    image_size: int  # px
    levels: Table


class Coverage(NamedTuple):
    """How well the anchors fit a set's boxes."""

    share: float  # of boxes whose best anchor has IoU >= 0.5
    mean_best_iou: float
    by_size: list[float]  # the share of each bin of `SIDES`; NaN where there is no box
    by_class: list[float]  # the share of each label; NaN where there is no box
    positives_per_object: float  # anchors that one object trains, the forced match included
    num_unreached: int  # boxes whose best anchor has less: one forced match is all that they have


# The published tables by detector and data set; tests/data/test_coverage.py holds them against the models.
IMAGE_SIZES = {"SSD300": 300, "SSD512": 512, "SSD160": 160}
TABLES: dict[tuple[str, str], Table] = {
    ("SSD300", "voc"): SSD300_VOC,
    ("SSD300", "coco"): SSD300_COCO,
    ("SSD512", "voc"): SSD512_VOC,
    ("SSD512", "coco"): SSD512_COCO,
    ("SSD160", "voc"): SSD160,
    ("SSD160", "coco"): SSD160,
}


def measure_coverage(
    boxes: Boxes, labels: npt.NDArray[np.int64], num_classes: int, anchors: DetectorAnchors
) -> Coverage:
    """Measure how well anchors fit.

    Args:
        boxes: [T, 4] xyxy in pixels of the network's input; T >= 1.
        labels: [T] 0..K-1.
        num_classes: K.
        anchors: the detector's.
    """
    best = best_overlaps(boxes, anchors)
    is_reached = best >= POSITIVE_IOU
    rows = np.unique(np.linspace(0, len(boxes) - 1, min(len(boxes), SAMPLE)).round().astype(np.int64))
    return Coverage(
        share=float(is_reached.mean()),
        mean_best_iou=float(best.mean()),
        by_size=_shares(is_reached, size_bin(boxes), len(SIDES) + 1),
        by_class=_shares(is_reached, labels, num_classes),
        positives_per_object=float(np.maximum(count_positives(boxes[rows], anchors), 1).mean()),
        num_unreached=int(np.count_nonzero(~is_reached)),
    )


def best_overlaps(boxes: Boxes, anchors: DetectorAnchors) -> npt.NDArray[np.float64]:
    """Return the IoU of each box with its best anchor, [T].

    Of the anchors of one shape and level the one whose centre is nearest overlaps most, since the overlap along each
    axis only falls with the distance; so one anchor of each shape is enough.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    best = np.zeros(len(boxes))
    for level in anchors.levels:
        cells = np.clip(np.round(centres / level.stride - 0.5), 0, level.side - 1)
        nearest = (cells + 0.5) * level.stride
        for shape in _shapes(level, anchors.image_size):
            overlap = _overlap(boxes[:, :2], boxes[:, 2:], nearest, shape).prod(axis=1)
            np.maximum(best, overlap / (_areas(boxes) + shape.prod() - overlap), out=best)
    return best


def count_positives(boxes: Boxes, anchors: DetectorAnchors) -> npt.NDArray[np.int64]:
    """Return how many anchors have IoU >= 0.5 with each box, [T]. Time and memory grow with T times all anchors."""
    counts = np.zeros(len(boxes), dtype=np.int64)
    areas = _areas(boxes)[:, None, None]
    for level in anchors.levels:
        centres = ((np.arange(level.side, dtype=np.float64) + 0.5) * level.stride)[:, None]  # [side, 1]
        for shape in _shapes(level, anchors.image_size):
            along = _overlap(boxes[:, None, :2], boxes[:, None, 2:], centres, shape)  # [T, side, 2]
            overlap = along[:, None, :, 0] * along[:, :, None, 1]  # [T, rows, columns]
            counts += np.count_nonzero(overlap >= POSITIVE_IOU * (areas + shape.prod() - overlap), axis=(1, 2))
    return counts


def about_coverage(source: str, coverage: Coverage, num_boxes: int, anchors: DetectorAnchors) -> list[Finding]:
    """Say how many boxes no anchor reaches, where they are not few."""
    if coverage.num_unreached <= FORCED_SHARE * num_boxes:
        return []
    problem = (
        f"{coverage.num_unreached} of {num_boxes} boxes overlap no anchor of {anchors.detector} by {POSITIVE_IOU:g}; "
        "each trains one anchor that fits it badly"
    )
    return [UNREACHED_BOX.broken(source, problem, coverage.num_unreached)]


def _shapes(level: AnchorLevel, image_size: int) -> Boxes:
    """Return (width, height) of a cell's anchors, cut to the image's side as `make_anchors` does."""
    return np.minimum(np.array(anchors_of_cell(level), dtype=np.float64), image_size)


def _overlap(low: Boxes, high: Boxes, centres: Boxes, shape: Boxes) -> Boxes:
    """Return the overlap along x and y, px, of boxes from low to high with anchors of one shape."""
    overlap = np.minimum(high, centres + shape / 2) - np.maximum(low, centres - shape / 2)
    return np.asarray(np.maximum(overlap, 0.0), dtype=np.float64)


def _areas(boxes: Boxes) -> npt.NDArray[np.float64]:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))


def _shares(is_reached: npt.NDArray[np.bool_], group: npt.NDArray[np.int64], num_groups: int) -> list[float]:
    """Return the share of true values in each group; NaN in an empty one."""
    totals = np.bincount(group, minlength=num_groups)
    reached = np.bincount(group, weights=is_reached, minlength=num_groups)
    return [float(r / t) if t else float("nan") for r, t in zip(reached, totals, strict=True)]
