"""Precision and recall over the score, their average precision, and the score with the best F1."""

from typing import NamedTuple

import numpy as np

from onestage.evaluation.matching import Booleans, Floats

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
