"""What a detector's anchors can learn of a set: the overlap of each box with its best anchor. SSD section 2.2."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.boxes.anchors import AnchorShapes, ssd_shapes
from onestage.data.annotations import UNREACHED_BOX
from onestage.doctor.statistics import SIDES, size_bin
from onestage.models.ssd import SSD160, SSD300, SSD512
from onestage.types import Finding

POSITIVE_IOU = 0.5  # that makes an anchor positive
FORCED_SHARE = 0.05  # of boxes that only the forced match can learn; more is worth a warning
SAMPLE = 2_000  # boxes, evenly spaced, of which all positives are counted

Boxes = npt.NDArray[np.float64]


class AnchorLevel(NamedTuple):
    """The anchors of one feature map in SSD's form. Lengths in network-input pixels."""

    side: int  # the feature map has side x side cells
    stride: float  # between neighbouring anchor centres
    size: float  # s_k, side of the square anchor
    next_size: float  # s_(k+1); a second square has side sqrt(s_k * s_(k+1))
    aspect_ratios: tuple[float, ...]  # each r adds r:1 and 1:r

    @property
    def anchors_per_cell(self) -> int:
        """Return 2 squares and, for each aspect ratio, a wide and a tall box."""
        return 2 + 2 * len(self.aspect_ratios)

    @property
    def as_shapes(self) -> AnchorShapes:
        """Return the level as a detector takes it."""
        return AnchorShapes(self.stride, ssd_shapes(self.size, self.next_size, self.aspect_ratios))


def ssd_level(level: AnchorShapes, image_size: int) -> AnchorLevel:
    """Return a level that `ssd_shapes` made in SSD's form."""
    (size, _), (geometric_mean, _), *pairs = level.shapes
    ratios = tuple(round(width / height, 4) for width, height in pairs[::2])
    side = math.ceil(image_size / level.stride - 0.05)
    return AnchorLevel(side, level.stride, size, round(geometric_mean**2 / size, 4), ratios)


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
IMAGE_SIZES = {model.__name__: model.image_size for model in (SSD300, SSD512, SSD160)}
TABLES: dict[tuple[str, str], Table] = {
    (model.__name__, name): tuple(ssd_level(level, model.image_size) for level in levels)
    for model in (SSD300, SSD512, SSD160)
    for name, levels in model.anchor_tables.items()
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
    """Return (width, height) of a cell's anchors, cut to the image's side as `AnchorGrid` does."""
    return np.minimum(np.array(level.as_shapes.shapes, dtype=np.float64), image_size)


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
