"""Precision and recall over the score, average precision by the rules of COCO and VOC, the score with the best F1."""

from typing import NamedTuple

import numpy as np

from onestage.evaluation.matching import (
    POSITIVE_IOU,
    Booleans,
    Floats,
    Found,
    Integers,
    Objects,
    Pairs,
    best_overlaps,
    rows_by_class,
)

# Where precision is read. COCOeval's are a linspace; tenths are divided, so that 3 of 10 objects reach 0.3.
RECALLS = {"COCO": np.linspace(0, 1, 101), "VOC07": np.arange(11) / 10}


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


def make_curve(scores: Floats, is_correct: Booleans, num_objects: int) -> Curve:
    """Return the curve of detections in any order; ignored ones left out. scores, is_correct: [n]."""
    order = np.argsort(-scores, kind="stable")  # the order of COCOeval where scores are equal
    correct = np.cumsum(is_correct[order])
    precision = correct / np.arange(1, len(order) + 1)
    return Curve(scores[order], precision, correct / max(num_objects, 1), num_objects)


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


def class_curves(
    scores: Floats, labels: Integers, is_correct: Booleans, is_counted: Booleans, num_objects: Integers
) -> list[Curve]:
    """Return the curve of the counted detections of each class, [K]. num_objects: [K]; the others: [D]."""
    by_class = [rows[is_counted[rows]] for rows in rows_by_class(labels, len(num_objects))]
    return [
        make_curve(scores[rows], is_correct[rows], count)
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
    order = np.argsort(-found.scores, kind="stable")
    candidates = order[(hits & ~is_ignored)[order]]
    _, first = np.unique(nearest[candidates], return_index=True)  # the best detection of each object
    is_correct = np.zeros(len(found.scores), dtype=bool)
    is_correct[candidates[first]] = True
    curves = class_curves(found.scores, found.labels, is_correct, ~is_ignored, objects.count(num_classes))
    return {rule: [average_precision(curve, rule) for curve in curves] for rule in ("VOC07", "VOC10")}
