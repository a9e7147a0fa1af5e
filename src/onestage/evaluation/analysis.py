"""Analysis of an evaluation: matching, curves, thresholds, confusion of classes, error types, VOC's metric."""

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
MAX_CONFUSED = 1000  # classes; with more there is no matrix, which would take gigabytes
# Where precision is read. COCOeval's are a linspace; tenths are divided, so that 3 of 10 objects reach 0.3.
RECALLS = {"COCO": np.linspace(0, 1, 101), "VOC07": np.arange(11) / 10}
ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")

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
        return Pairs._make(column[mask] for column in self)


class Match(NamedTuple):
    """What became of each detection."""

    objects: Integers  # [D] the object that it found, -1: none
    is_ignored: Booleans  # [D] neither right nor wrong: it lies on an ignored object


class Curve(NamedTuple):
    """The detections of one class with the best score first. Row n: those with a score >= scores[n]."""

    scores: Floats  # [n] falling
    precision: Floats  # [n] in [0, 1]
    recall: Floats  # [n] in [0, 1], rising
    num_objects: int


class OperatingPoint(NamedTuple):
    """What a score threshold gives: detections below it do not count."""

    threshold: float  # NaN without detections
    precision: float  # NaN without detections
    recall: float  # NaN without objects
    f1: float  # 2 TP / (detections + objects)


class ClassAnalysis(NamedTuple):
    """One class; `Analysis.overall` has the same of all classes together."""

    num_objects: int  # without crowds and difficult ones
    ap50: float  # NaN without objects, as all that follows
    best: OperatingPoint  # the highest F1
    precision: list[float]  # [101] interpolated, at the recalls 0, 0.01, ..., 1
    voc07: float  # VOC's AP by 11 points
    voc10: float  # VOC's AP by area


class Analysis(NamedTuple):
    """Why an evaluation has its metrics."""

    overall: ClassAnalysis  # precision, recall and F1 over all detections; APs are means over classes
    classes: list[ClassAnalysis]  # [K]
    confusion: list[list[int]]  # [K + 1][K + 1] object's class, detection's class; the last of both is the background
    error_types: dict[str, float]  # AP50 that each type costs, in [0, 1]

    @property
    def score_threshold(self) -> float | None:
        """The threshold with the best F1 over all detections; None without detections or objects."""
        return None if np.isnan(self.overall.best.threshold) else self.overall.best.threshold


def analyse(found: Found, objects: Objects, num_classes: int) -> Analysis:
    """Analyse the detections of all images."""
    pairs = overlapping_pairs(found, objects)
    matched = match(found, objects, pairs)
    voc = voc_average_precision(found, objects, pairs, num_classes)
    is_correct, is_counted, counts = matched.objects >= 0, ~matched.is_ignored, objects.num_by_class(num_classes)
    classes = []
    curves = class_curves(found, is_correct, is_counted, counts)
    for curve, voc07, voc10 in zip(curves, voc["VOC07"], voc["VOC10"], strict=True):
        precision = interpolated_precision(curve, RECALLS["COCO"]).tolist()
        measures = (average_precision(curve), best_threshold(curve), precision)
        classes.append(ClassAnalysis(curve.num_objects, *measures, voc07, voc10))
    best = best_threshold(make_curve(found.scores[is_counted], is_correct[is_counted], int(counts.sum())))
    with_objects = [one for one in classes if one.num_objects] or classes
    ap50, voc07, voc10 = (float(np.mean([getattr(c, n) for c in with_objects])) for n in ("ap50", "voc07", "voc10"))
    mean_precision = np.mean([one.precision for one in with_objects], axis=0).tolist()
    overall = ClassAnalysis(int(counts.sum()), ap50, best, mean_precision, voc07, voc10)
    confusion = []
    if num_classes <= MAX_CONFUSED:
        confusion = confusion_matrix(found, objects, pairs, num_classes, best.threshold)
    return Analysis(overall, classes, confusion, error_types(found, objects, pairs, matched, num_classes))


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


def make_curve(scores: Floats, is_correct: Booleans, num_objects: int) -> Curve:
    """Return the curve of detections, the best first; ignored ones left out. scores, is_correct: [n]."""
    correct = np.cumsum(is_correct)
    precision = correct / np.arange(1, len(correct) + 1)
    return Curve(scores, precision, correct / max(num_objects, 1), num_objects)


def interpolated_precision(curve: Curve, recalls: Floats) -> Floats:
    """Return the best precision at each recall or above, 0 where the recall is not reached; same shape as `recalls`."""
    highest = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    return np.asarray(highest[np.searchsorted(curve.recall, recalls)])


def average_precision(curve: Curve, rule: str = "COCO") -> float:
    """Return the average precision in [0, 1], NaN without objects.

    rule: `COCO`, mean over 101 recalls; `VOC07`, over 11; `VOC10`, the area under the curve.
    """
    if curve.num_objects == 0:
        return float("nan")
    if rule == "VOC10":
        steps = np.diff(curve.recall, prepend=0.0)
        return float(np.sum(steps * interpolated_precision(curve, curve.recall)))
    return float(interpolated_precision(curve, RECALLS[rule]).mean())


def best_threshold(curve: Curve) -> OperatingPoint:
    """Return the operating point with the highest F1; of equal ones that with the highest score."""
    nan, n = float("nan"), len(curve.scores)
    if n == 0 or curve.num_objects == 0:
        return OperatingPoint(nan, nan, 0.0 if curve.num_objects else nan, 0.0 if curve.num_objects else nan)
    f1 = 2 * curve.recall * curve.num_objects / (np.arange(1, n + 1) + curve.num_objects)
    is_last_of_equals = np.append(np.diff(curve.scores) < 0, True)  # a threshold cannot part equal scores
    best = int(np.argmax(np.where(is_last_of_equals, f1, -1.0)))
    return OperatingPoint(*(float(values[best]) for values in (curve.scores, curve.precision, curve.recall, f1)))


def class_curves(found: Found, is_correct: Booleans, is_counted: Booleans, num_objects: Integers) -> list[Curve]:
    """Return the curve of the counted detections of each class, [K]. is_*: [D]; num_objects: [K]."""
    by_class = [rows[is_counted[rows]] for rows in rows_by_class(found.labels, len(num_objects))]
    return [
        make_curve(found.scores[rows], is_correct[rows], count)
        for rows, count in zip(by_class, num_objects.tolist(), strict=True)
    ]


def voc_average_precision(found: Found, objects: Objects, pairs: Pairs, num_classes: int) -> dict[str, list[float]]:
    """Return the AP of each class, [K] in [0, 1], by the rules VOC07 and VOC10; NaN for a class without objects.

    The matching of VOCevaldet.m (Everingham et al., 2010, section 4.2.2): a detection is compared with the object of
    its class that it overlaps most, even if a better detection has found that one already; COCO's would take a
    second-best object then. It is right at IoU >= 0.5, and ignored if that object is difficult (or a crowd, which VOC
    has not).
    """
    ious, nearest = best_overlaps(pairs.where(pairs.is_same_class), len(found.scores))
    hits = ious >= POSITIVE_IOU
    is_ignored = hits & objects.is_ignored[nearest] if len(objects.labels) else hits
    is_correct = _best_of_each(nearest, hits & ~is_ignored)
    curves = class_curves(found, is_correct, ~is_ignored, objects.num_by_class(num_classes))
    return {rule: [average_precision(curve, rule) for curve in curves] for rule in ("VOC07", "VOC10")}


def confusion_matrix(
    found: Found, objects: Objects, pairs: Pairs, num_classes: int, score_threshold: float
) -> list[list[int]]:
    """Count objects by their class (row) and the class that was detected (column), [K + 1][K + 1].

    Detections with a score >= `score_threshold` are matched at IoU 0.5 whatever their class. The last column counts
    objects that were missed, the last row detections on background; ignored objects count nowhere.
    """
    matched = match(found, objects, pairs, same_class=False)
    shown = (found.scores >= score_threshold) & ~matched.is_ignored
    columns = np.full(len(objects.labels), num_classes)
    hits = shown & (matched.objects >= 0)
    columns[matched.objects[hits]] = found.labels[hits]
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    counted = ~objects.is_ignored
    np.add.at(matrix, (objects.labels[counted], columns[counted]), 1)
    np.add.at(matrix[num_classes], found.labels[shown & ~hits], 1)
    return matrix.tolist()


def error_types(found: Found, objects: Objects, pairs: Pairs, matched: Match, num_classes: int) -> dict[str, float]:
    """Return by how much AP50 would rise if one type of error did not occur, in [0, 1]; NaN without objects.

    A wrong detection has one type, the first that applies (TIDE, arXiv:2008.08115, section 2.2; t_f = 0.5, t_b = 0.1):

    - localisation: 0.1 <= IoU < 0.5 with an object of its class; the oracle moves it onto the object
    - classification: IoU >= 0.5 with an object of another class; the oracle corrects the class
    - duplicate: IoU >= 0.5 with an object of its class that a better detection has found; removed
    - background: IoU < 0.1 with every object; removed
    - both: the rest, 0.1 <= IoU < 0.5 with an object of another class; removed

    A corrected detection of an object that is found already, or by a better corrected one, is removed as a duplicate.
    `missed` are objects that no detection has found and no error of the first two types belongs to; the oracle
    removes them.
    """
    num_objects = objects.num_by_class(num_classes)
    if not num_objects.any():
        return dict.fromkeys(ERROR_TYPES, float("nan"))
    is_correct, kept, num_found = matched.objects >= 0, ~matched.is_ignored, len(found.scores)
    pairs = pairs.where(~objects.is_ignored[pairs.objects])
    own_iou, own = best_overlaps(pairs.where(pairs.is_same_class), num_found)
    other_iou, other = best_overlaps(pairs.where(~pairs.is_same_class), num_found)
    conditions = {
        "localisation": (own_iou >= MIN_OVERLAP) & (own_iou < POSITIVE_IOU),
        "classification": other_iou >= POSITIVE_IOU,
        "duplicate": own_iou >= POSITIVE_IOU,
        "background": (own_iou < MIN_OVERLAP) & (other_iou < MIN_OVERLAP),
    }
    types, rest = {}, kept & ~is_correct
    for name, condition in conditions.items():
        types[name], rest = rest & condition, rest & ~condition
    types["both"] = rest
    corrected = {"classification": other, "localisation": own}
    is_found = np.zeros(len(objects.labels), dtype=bool)
    is_found[matched.objects[is_correct]] = True
    missed = ~(objects.is_ignored | is_found)
    before, gains = _mean_ap(found, is_correct, kept, num_objects), {}
    for name in ERROR_TYPES[:-1]:
        members, labels, correct = types[name], found.labels, is_correct
        if name in corrected:
            targets = corrected[name]
            missed[targets[members]] = False
            fixed = _best_of_each(targets, members & ~is_found[targets])
            labels, correct = np.where(fixed, objects.labels[targets], labels), correct | fixed
        after = _mean_ap(found._replace(labels=labels), correct, kept & (correct | ~members), num_objects)
        gains[name] = after - before
    left = num_objects - np.bincount(objects.labels[missed], minlength=num_classes)
    return {**gains, "missed": _mean_ap(found, is_correct, kept, left) - before}


def _best_of_each(targets: Integers, candidates: Booleans) -> Booleans:
    """Return which detections are the best candidate of their target, [D]."""
    rows = np.flatnonzero(candidates)
    is_best = np.zeros_like(candidates)
    is_best[rows[np.unique(targets[rows], return_index=True)[1]]] = True
    return is_best


def _mean_ap(found: Found, is_correct: Booleans, is_counted: Booleans, num_objects: Integers) -> float:
    """Return AP50 over the classes with objects, of which there is one at the start."""
    curves = class_curves(found, is_correct, is_counted, num_objects)
    values = [average_precision(curve) for curve in curves if curve.num_objects]
    return float(np.mean(values)) if values else 1.0  # nothing is left to find
