import numpy as np
import pytest
from evaluation_data import annotation_set, detections, flat

from onestage.evaluation import matching
from onestage.evaluation.matching import match, overlapping_pairs

HERE, NEAR, ELSEWHERE = [0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 100.0, 80.0], [300.0, 300.0, 320.0, 320.0]


def matched(boxes, labels, found, scores, found_labels, same_class=True, **flags):
    found, objects = flat(annotation_set(boxes, labels, **flags), detections(found, scores, found_labels))
    result = match(found, objects, overlapping_pairs(found, objects), same_class=same_class)
    return result.objects.tolist(), result.is_ignored.tolist()


def test_pairs_have_hand_computed_overlaps_in_any_chunks(monkeypatch):
    found, objects = flat(
        annotation_set([[HERE], [HERE, NEAR]], [[0], [0, 1]]),
        detections([[NEAR, ELSEWHERE], [HERE]], [[0.9, 0.8], [0.7]], [[0, 0], [1]]),
    )
    for size in (1, 2, 1000):
        monkeypatch.setattr(matching, "PAIRS_PER_CHUNK", size)
        pairs = overlapping_pairs(found, objects)
        assert (pairs.found.tolist(), pairs.objects.tolist()) == ([0, 2, 2], [0, 1, 2])
        assert pairs.ious.tolist() == pytest.approx([0.8, 1.0, 0.8])
        assert pairs.covered.tolist() == pytest.approx([1.0, 1.0, 0.8])
        assert pairs.is_same_class.tolist() == [True, False, True]


@pytest.mark.parametrize("found", [[[]], [[HERE]]])
def test_no_object_or_no_detection_gives_no_match(found):
    scores, labels = [[0.9] * len(found[0])], [[0] * len(found[0])]
    assert matched([[]], [[]], found, scores, labels)[0] == [-1] * len(found[0])
    assert np.all(np.array(matched([[HERE]], [[1]], found, scores, labels)[0]) == -1)
