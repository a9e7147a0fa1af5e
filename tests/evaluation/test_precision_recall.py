"""Precision, recall and average precision by every rule, and the matches that they count."""

import math

import numpy as np
import pytest
from evaluation_data import annotation_set, detections, flat, random_evaluation

from onestage.evaluation import analysis
from onestage.evaluation.analysis import (
    average_precision,
    best_threshold,
    make_curve,
    overlapping_pairs,
    voc_average_precision,
)


def curve(*correct, num_objects, scores=None):
    scores = np.linspace(0.9, 0.1, len(correct)) if scores is None else np.array(scores)
    return make_curve(scores, np.array(correct, dtype=bool), num_objects)


# Right, wrong, right, wrong, three objects: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3.
FOUR = curve(1, 0, 1, 0, num_objects=3)


def test_precision_at_a_recall_is_read_without_rounding_errors():
    # Three of ten objects: recall 3/10 is reached exactly.
    assert average_precision(curve(1, 1, 1, num_objects=10), "VOC07") == pytest.approx(4 / 11)


def test_best_threshold_has_the_highest_f1():
    # F1 = 2 TP / (detections + objects): 2/4, 2/5, 4/6, 4/7.
    best = best_threshold(FOUR)
    assert best.f1 == pytest.approx(2 / 3)
    assert (best.precision, best.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert best.threshold == FOUR.scores[2]


def test_threshold_does_not_part_equal_scores():
    # The right one comes first in the list; a threshold at 0.5 keeps both: F1 2/3 and not 1.
    assert best_threshold(curve(1, 0, num_objects=1, scores=[0.5, 0.5])).f1 == pytest.approx(2 / 3)


def test_undefined_values_are_nan_and_nothing_found_is_zero():
    assert math.isnan(average_precision(curve(0, num_objects=0)))
    nothing = best_threshold(curve(num_objects=3))
    assert average_precision(curve(num_objects=3)) == 0
    assert (nothing.f1, nothing.recall) == (0, 0) and math.isnan(nothing.threshold)
    assert math.isnan(best_threshold(curve(0, num_objects=0)).f1)


HERE, NEAR, THERE = [0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 100.0, 80.0], [200.0, 200.0, 300.0, 300.0]


def voc(annotations, found):
    table, objects = flat(annotations, found)
    return voc_average_precision(table, objects, overlapping_pairs(table, objects), len(annotations.class_names))


def reference(annotations, found, label, points):
    """VOCevaldet.m, line by line."""
    taken, num_objects, rows = set(), 0, []
    for image in range(len(annotations)):
        objects = range(*annotations.objects(image).indices(len(annotations.labels)))
        members = [row for row in objects if annotations.labels[row] == label]
        num_objects += sum(not (annotations.is_difficult[row] or annotations.is_crowd[row]) for row in members)
        for box, score, found_label in zip(*(column[image].numpy() for column in found), strict=True):
            if found_label == label:
                rows.append((score, box, members))
    correct = []
    for _, box, members in sorted(rows, key=lambda row: -row[0]):
        best, nearest = 0.0, None
        for row in members:
            other = annotations.boxes[row]
            width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
            if width > 0 and height > 0:
                union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - width * height
                if width * height / union > best:
                    best, nearest = width * height / union, row
        if best >= 0.5:
            if annotations.is_difficult[nearest] or annotations.is_crowd[nearest]:
                continue
            correct.append(nearest not in taken)
            taken.add(nearest)
        else:
            correct.append(False)
    true = np.cumsum(correct)
    recall, precision = true / num_objects, true / np.arange(1, len(correct) + 1)
    if points:
        at = [precision[recall >= t - 1e-12].max(initial=0) for t in np.linspace(0, 1, 11)]
        return float(np.mean(at))
    recall, precision = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    for index in range(len(precision) - 2, -1, -1):
        precision[index] = max(precision[index], precision[index + 1])
    changes = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[changes + 1] - recall[changes]) * precision[changes + 1]))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_sets_equal_the_development_kit(seed):
    annotations, found = random_evaluation(seed)
    values = voc(annotations, found)
    for rule in ("VOC07", "VOC10"):
        expected = [reference(annotations, found, label, rule == "VOC07") for label in range(5)]
        assert values[rule] == pytest.approx(expected, abs=1e-6)
    assert 0.1 < np.mean(values["VOC10"]) < 0.9


def test_class_without_objects_is_undefined_and_one_without_detections_zero():
    values = voc(annotation_set([[HERE]], [[1]]), detections([[HERE]], [[0.9]], [[0]]))["VOC10"]
    assert math.isnan(values[0]) and values[1] == 0 and math.isnan(values[2])


def test_pairs_have_hand_computed_overlaps_in_any_chunks(monkeypatch):
    found, objects = flat(
        annotation_set([[HERE], [HERE, NEAR]], [[0], [0, 1]]),
        detections([[NEAR, THERE], [HERE]], [[0.9, 0.8], [0.7]], [[0, 0], [1]]),
    )
    for size in (1, 2, 1000):
        monkeypatch.setattr(analysis, "PAIRS_PER_CHUNK", size)
        pairs = overlapping_pairs(found, objects)
        assert (pairs.found.tolist(), pairs.objects.tolist()) == ([0, 2, 2], [0, 1, 2])
        assert pairs.ious.tolist() == pytest.approx([0.8, 1.0, 0.8])
        assert pairs.covered.tolist() == pytest.approx([1.0, 1.0, 0.8])
        assert pairs.is_same_class.tolist() == [True, False, True]
