"""Detections and objects of many images as flat arrays, and COCO's greedy matching of the two."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from onestage.boxes.geometry import pairwise_overlap

MIN_OVERLAP = 0.1  # of a pair: the lowest threshold of any analysis, TIDE's t_b
POSITIVE_IOU = 0.5  # of COCO's AP50, of VOC and TIDE's t_f
# Of an image, across all classes: COCO's definition of its metrics (cocodataset.org/#detection-eval). pycocotools
# leaves the cut to whoever writes the results, and takes as many of each class.
MAX_DETECTIONS = 100
PAIRS_PER_CHUNK = 1_000_000  # bounds the memory: 100 MB

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class Objects(NamedTuple):
    """The ground truth of N images, in the order of the images."""

    images: Integers  # [T] position of the image, 0..N-1, ascending
    boxes: npt.NDArray[np.float32]  # [T, 4] xyxy px
    labels: Integers  # [T] 0..K-1
    areas: npt.NDArray[np.float32]  # [T] px^2
    is_ignored: Booleans  # [T] neither found nor missed: crowds and difficult objects

    def num_by_class(self, num_classes: int) -> Integers:
        """Return the number of objects of each class, [K], without ignored ones."""
        return np.bincount(self.labels[~self.is_ignored], minlength=num_classes)


class Found(NamedTuple):
    """The detections of N images, the best score first."""

    images: Integers  # [D] position of the image, 0..N-1
    boxes: npt.NDArray[np.float32]  # [D, 4] xyxy px
    scores: npt.NDArray[np.float32]  # [D] falling
    labels: Integers  # [D] 0..K-1


class Pairs(NamedTuple):
    """Detections and objects of one image that overlap by at least MIN_OVERLAP, whatever their classes."""

    found: Integers  # [P] rows of Found
    objects: Integers  # [P] rows of Objects
    ious: Floats  # [P] float64
    covered: Floats  # [P] float64: share of the detection inside the object, COCO's overlap with a crowd
    is_same_class: Booleans  # [P]

    def where(self, mask: Booleans) -> "Pairs":
        """Return the pairs of a mask [P]."""
        found, objects, ious, covered, is_same_class = self
        return Pairs(found[mask], objects[mask], ious[mask], covered[mask], is_same_class[mask])


class Match(NamedTuple):
    """What became of each detection."""

    objects: Integers  # [D] the object that it found, -1: none
    is_ignored: Booleans  # [D] neither right nor wrong: it lies on an ignored object


def overlapping_pairs(found: Found, objects: Objects) -> Pairs:
    """Return the overlapping pairs of all images; memory is bounded by chunks."""
    num_images = 1 + max(found.images.max(initial=-1), objects.images.max(initial=-1))
    per_image = np.bincount(objects.images, minlength=num_images)
    first = np.cumsum(per_image) - per_image  # the first object of each image
    counts = per_image[found.images]  # candidates of each detection, [D]
    ends = np.cumsum(counts)
    parts = []
    for part in np.split(np.arange(len(counts)), np.searchsorted(ends, np.arange(0, ends[-1:].sum(), PAIRS_PER_CHUNK))):
        num, repeated = counts[part], np.repeat(part, counts[part])
        others = np.repeat(first[found.images[part]] - np.cumsum(num) + num, num) + np.arange(len(repeated))
        rows, columns = found.boxes.take(repeated, axis=0), objects.boxes.take(others, axis=0)
        overlaps = (rows[:, :2] < columns[:, 2:]) & (columns[:, :2] < rows[:, 2:])  # along x and y
        touching = np.flatnonzero(overlaps[:, 0] & overlaps[:, 1])  # few: most are apart
        repeated, others = repeated[touching], others[touching]
        boxes, gt_boxes = (torch.from_numpy(values[touching]).double()[:, None] for values in (rows, columns))
        intersection, iou = (values[:, 0, 0].numpy() for values in pairwise_overlap(boxes, gt_boxes))
        areas = (boxes[:, 0, 2:] - boxes[:, 0, :2]).prod(dim=1).numpy()
        covered = intersection / np.maximum(areas, np.finfo(np.float64).tiny)
        same = found.labels[repeated] == objects.labels[others]
        pairs = Pairs(repeated, others, iou, covered, same)
        parts.append(pairs.where(np.maximum(iou, covered * objects.is_ignored[others]) >= MIN_OVERLAP))
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def match(found: Found, objects: Objects, pairs: Pairs, *, same_class: bool = True, iou: float = POSITIVE_IOU) -> Match:
    """Match as COCOeval does: the best detection first, each takes the free object with the highest IoU.

    All images and classes advance together, one detection of each per round, so there are at most as many rounds as an
    image has detections.

    same_class: match within each class; False: across the classes, for a confusion matrix. iou: least overlap.
    """
    if same_class:
        pairs = pairs.where(pairs.is_same_class)
    is_ignored = np.zeros(len(found.scores), dtype=bool)
    on_ignored = objects.is_ignored[pairs.objects]
    is_ignored[pairs.found[on_ignored & (pairs.covered >= iou)]] = True
    pairs = pairs.where(~on_ignored & (pairs.ious >= iou))

    groups = found.images * (1 + found.labels.max(initial=0)) + found.labels if same_class else found.images
    by_group = np.argsort(groups, kind="stable")
    ranks = np.empty_like(groups)  # of each detection in its group; 0 is the best
    ranks[by_group] = np.arange(len(groups)) - np.searchsorted(groups[by_group], groups[by_group])
    ranks = ranks[pairs.found]
    order = np.lexsort((-pairs.objects, -pairs.ious, ranks))  # COCOeval takes the last of equal objects
    rounds = np.split(order, np.flatnonzero(np.diff(ranks[order])) + 1)
    matched, is_taken = np.full(len(found.scores), -1), np.zeros(len(objects.labels), dtype=bool)
    for rows in rounds:
        free = rows[~is_taken[pairs.objects[rows]]]
        detections, best = np.unique(pairs.found[free], return_index=True)
        matched[detections] = pairs.objects[free[best]]
        is_taken[matched[detections]] = True
    return Match(matched, is_ignored & (matched < 0))


def rows_by_class(labels: Integers, num_classes: int) -> list[Integers]:
    """Return the rows of each class, [K], in one pass: a mask for each class would cost D x K. labels: [D] 0..K-1."""
    order = np.argsort(labels.astype(np.int16 if num_classes < 2**15 else np.int64), kind="stable")  # radix sort
    return np.split(order, np.searchsorted(labels[order], np.arange(1, num_classes)))


def best_overlaps(pairs: Pairs, num_found: int) -> tuple[Floats, Integers]:
    """Return the highest IoU of each detection, [D], 0 without a pair, and its object, [D], -1; the first of equals."""
    ious, objects = np.zeros(num_found), np.full(num_found, -1)
    order = np.lexsort((-pairs.objects, pairs.ious))  # of several assignments to one place the last one stays
    ious[pairs.found[order]], objects[pairs.found[order]] = pairs.ious[order], pairs.objects[order]
    return ious, objects
