import math

import numpy as np
import pytest

from onestage.evaluation.precision_recall import average_precision, best_threshold, make_curve


def curve(*correct, num_objects, scores=None):
    scores = np.linspace(0.9, 0.1, len(correct)) if scores is None else np.array(scores)
    return make_curve(scores, np.array(correct, dtype=bool), num_objects)


# Right, wrong, right, wrong, three objects: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3.
FOUR = curve(1, 0, 1, 0, num_objects=3)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Recalls 0 to 0.3: precision 1; 0.4 to 0.6: 2/3; 0.7 to 1: not reached.
        ("VOC07", (4 * 1 + 3 * 2 / 3) / 11),
        # 1/3 of the recall at precision 1, 1/3 at 2/3.
        ("VOC10", 1 / 3 + 1 / 3 * 2 / 3),
        # Recalls 0 to 0.33: 34 points with 1; 0.34 to 0.66: 33 points with 2/3.
        ("COCO", (34 + 33 * 2 / 3) / 101),
    ],
)
def test_four_detections_give_hand_computed_average_precision(rule, expected):
    assert average_precision(FOUR, rule) == pytest.approx(expected)


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
