"""Proposes a table of anchors for a set of boxes: k-means on their shapes, then SSD's form of sizes and ratios."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onestage.doctor.coverage import POSITIVE_IOU, AnchorLevel, Boxes, DetectorAnchors, best_overlaps

NUM_CLUSTERS = 24
NUM_ROUNDS = 100  # of k-means, at most
SAMPLE = 4_000  # boxes, drawn with a fixed seed, from which the table is made; all of them measure it
STEPS = (1.25, 1.1, 1.04)  # factors by which a size or ratio is tried larger and smaller
MIN_RATIO, MAX_RATIO = 1.2, 6.0  # of an anchor's sides; a square is there already
MIN_SIZE = 4.0  # px, of the smallest anchor: half the finest stride
MIN_GAIN = 1e-4  # of the fitness that a change must bring
MEAN_WEIGHT = 0.2  # of the mean overlap against the share of boxes that are reached, when tables are compared


def propose_anchors(boxes: Boxes, anchors: DetectorAnchors, seed: int = 0) -> tuple[AnchorLevel, ...]:
    """Return a table for the same feature maps, with as many anchors in each cell, that fits the boxes better.

    YOLOv2 (arXiv:1612.08242, section 2) clusters the shapes of boxes with 1 - IoU as distance. SSD gives each feature
    map one size, the next map's size, and ratios; so the clusters are dealt to the maps by size, and what a map takes
    from its clusters is then moved in small steps as long as more boxes are reached. The result is never worse than
    the table it started from, measured on the sample.

    Args:
        boxes: [T, 4] xyxy in pixels of the network's input; T >= 1.
        anchors: the detector's; its feature maps and the number of its ratios are kept.
        seed: of the sample and of the clusters' start.
    """
    generator = np.random.default_rng(seed)
    sample = boxes if len(boxes) <= SAMPLE else boxes[generator.choice(len(boxes), SAMPLE, replace=False)]
    shapes, weights = cluster_shapes(sample[:, 2:] - sample[:, :2], NUM_CLUSTERS, generator)
    started = [_table_of_clusters(shapes, weights, anchors), [_numbers(level) for level in anchors.levels]]
    improved = [_improve(table, sample, anchors) for table in started]
    best = max(improved, key=lambda table: _fitness(table, sample, anchors))
    return _levels(best, anchors)


def cluster_shapes(
    sides: npt.NDArray[np.float64], num_clusters: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return k-means centres (width, height), [k, 2] px, small ones first, and the share of boxes of each, [k].

    The distance is 1 - IoU of two boxes with the same centre; a centre is the median of its boxes.

    Args:
        sides: [T, 2] width and height of the boxes, px, > 0.
        num_clusters: k, at most; no more than there are different shapes.
        generator: draws the boxes that the centres start at.
    """
    centres = _first_centres(np.unique(sides, axis=0), num_clusters, generator)
    owner = np.full(len(sides), -1)
    for _ in range(NUM_ROUNDS):
        nearest = _shape_iou(sides, centres).argmax(axis=1)
        if (nearest == owner).all():
            break
        owner = nearest
        centres = np.array(
            [np.median(sides[owner == k], axis=0) if (owner == k).any() else centres[k] for k in range(len(centres))]
        )
    shares = np.bincount(owner, minlength=len(centres)) / len(sides)
    order = np.argsort(centres.prod(axis=1))
    return centres[order], shares[order]


def _first_centres(
    different: npt.NDArray[np.float64], num_clusters: int, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Draw centres one by one, far from those before: with chances as the distance squared (k-means++)."""
    chosen = [int(generator.integers(len(different)))]
    distance = np.full(len(different), np.inf)
    while len(chosen) < min(num_clusters, len(different)):
        distance = np.minimum(distance, 1 - _shape_iou(different, different[chosen[-1:]])[:, 0])
        chances = distance.clip(min=0) ** 2
        if not chances.sum() > 0:
            break
        chosen.append(int(generator.choice(len(different), p=chances / chances.sum())))
    return different[chosen]


def _shape_iou(sides: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the IoU of boxes with one centre, [T, k]."""
    overlap = np.minimum(sides[:, None], centres).prod(axis=2)
    return np.asarray(overlap / (sides.prod(axis=1)[:, None] + centres.prod(axis=1) - overlap))


# A table in the making: for each level [size, ratio, ...], and one last [next_size].
Numbers = list[list[float]]


def _numbers(level: AnchorLevel) -> list[float]:
    return [float(level.size), *map(float, level.aspect_ratios)]


def _table_of_clusters(
    shapes: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], anchors: DetectorAnchors
) -> Numbers:
    """Deal the clusters to the levels, as many boxes to each level as it has anchors, and read off size and ratios."""
    sizes = np.sqrt(shapes.prod(axis=1))
    capacity = np.cumsum([level.anchors_per_cell for level in anchors.levels])
    middle = np.cumsum(weights) - weights / 2
    owner = np.searchsorted(capacity / capacity[-1], middle)
    table: Numbers = []
    smallest = 0.0
    for number, level in enumerate(anchors.levels):
        mine = owner == number
        wanted = float(np.average(sizes[mine], weights=weights[mine])) if weights[mine].sum() > 0 else level.size
        # Cells farther apart than the anchor is wide would leave boxes between them; and sizes rise with the levels.
        size = min(max(wanted, smallest * STEPS[1], min(level.stride, anchors.image_size / 2)), anchors.image_size)
        smallest = size
        ratios = np.maximum(shapes[mine, 0] / shapes[mine, 1], shapes[mine, 1] / shapes[mine, 0])
        num_ratios = len(level.aspect_ratios)
        if mine.any() and num_ratios:
            places = (np.arange(num_ratios) + 0.5) / num_ratios
            own = np.quantile(ratios, places).clip(MIN_RATIO, MAX_RATIO).tolist()
        else:
            own = list(map(float, level.aspect_ratios))
        table.append([size, *own])
    return table


def _levels(table: Numbers, anchors: DetectorAnchors) -> tuple[AnchorLevel, ...]:
    """Return the table in SSD's form. The last next_size goes as far beyond the last size as that one does."""
    sizes = [round(row[0], 2) for row in table]
    last = sizes[-1] * sizes[-1] / sizes[-2] if len(sizes) > 1 else sizes[-1] * math.sqrt(2)
    following = [*sizes[1:], round(min(last, 1.1 * anchors.image_size), 2)]
    return tuple(
        AnchorLevel(level.side, level.stride, size, next_size, tuple(round(ratio, 2) for ratio in row[1:]))
        for level, row, size, next_size in zip(anchors.levels, table, sizes, following, strict=True)
    )


def _fitness(table: Numbers, boxes: Boxes, anchors: DetectorAnchors) -> float:
    """Return the share of boxes reached, and a little of the mean overlap, which leads on where the share is flat."""
    best = best_overlaps(boxes, anchors._replace(levels=_levels(table, anchors)))
    return float((best >= POSITIVE_IOU).mean() + MEAN_WEIGHT * best.mean())


def _improve(table: Numbers, boxes: Boxes, anchors: DetectorAnchors) -> Numbers:
    """Change one number at a time by a step, for as long as that helps."""
    fitness = _fitness(table, boxes, anchors)
    for step in STEPS:
        is_better = True
        while is_better:
            is_better = False
            for row, column, factor in _moves(table, step):
                changed = [list(numbers) for numbers in table]
                changed[row][column] *= factor
                new_fitness = _fitness(changed, boxes, anchors) if _is_allowed(changed, anchors.image_size) else 0.0
                if new_fitness > fitness + MIN_GAIN:
                    table, fitness, is_better = changed, new_fitness, True
    return table


def _moves(table: Numbers, step: float) -> Iterator[tuple[int, int, float]]:
    """Yield place and factor of every change to try."""
    for row, numbers in enumerate(table):
        for column in range(len(numbers)):
            yield row, column, step
            yield row, column, 1 / step


def _is_allowed(table: Sequence[Sequence[float]], image_size: int) -> bool:
    sizes = [row[0] for row in table]
    ratios = [ratio for row in table for ratio in row[1:]]
    return (
        all(small < large for small, large in pairwise(sizes))
        and sizes[0] >= MIN_SIZE
        and sizes[-1] <= image_size
        and all(MIN_RATIO <= ratio <= MAX_RATIO for ratio in ratios)
    )
