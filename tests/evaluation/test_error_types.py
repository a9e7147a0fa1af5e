import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, coco_objects, detections, flat, random_evaluation

from onestage.evaluation.error_types import ERROR_TYPES, error_types
from onestage.evaluation.matching import match, overlapping_pairs

HERE, THERE, NOWHERE = [0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 300.0, 300.0], [400.0, 400.0, 500.0, 500.0]
SHIFTED = [0.0, 0.0, 100.0, 40.0]  # IoU 0.4 with HERE


def errors(annotations, found):
    table, objects = flat(annotations, found)
    pairs = overlapping_pairs(table, objects)
    matched = match(table, objects, pairs)
    return error_types(table, objects, pairs, matched, len(annotations.class_names))


@pytest.mark.parametrize(
    ("box", "label", "kind", "gain"),
    [
        # One object; a wrong detection with score 0.9 before the right one: AP50 1/2, without it 1.
        (NOWHERE, 0, "background", 0.5),
        (SHIFTED, 1, "both", 0.0),  # the wrong detection is of a class without objects, which has no AP
    ],
)
def test_wrong_detection_before_the_right_one_costs_its_type(box, label, kind, gain):
    annotations = annotation_set([[HERE]], [[0]])
    found = detections([[box, HERE]], [[0.9, 0.8]], [[label, 0]])
    assert errors(annotations, found) == {**dict.fromkeys(ERROR_TYPES, 0.0), kind: pytest.approx(gain)}


def test_shifted_box_and_wrong_class_are_corrected_and_their_objects_are_not_missed():
    annotations = annotation_set([[HERE, THERE], [HERE]], [[0, 1], [1]])
    found = detections([[SHIFTED, THERE], []], [[0.9, 0.8], []], [[0, 0], []])
    # AP is 0 for both classes. Localisation: class 0 gets AP 1 (mean 0.5). Classification: class 1 finds one of two
    # objects: 51 of 101 recalls, divided by two classes. Missed: only the object of the second image.
    values = errors(annotations, found)
    assert values["localisation"] == pytest.approx(0.5)
    assert values["classification"] == pytest.approx(51 / 101 / 2)
    assert values["duplicate"] == values["background"] == values["both"] == values["missed"] == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_sets_equal_a_second_implementation(seed):
    hotcoco = pytest.importorskip("hotcoco")
    annotations, found = random_evaluation(seed, crowd_rate=0.0)
    found = found._replace(scores=found.scores + 1e-3 * torch.rand(found.scores.shape))  # without ties
    truth = hotcoco.COCO()
    dataset, records = coco_objects(annotations, found)
    truth.dataset = dataset
    truth.createIndex()
    evaluation = hotcoco.COCOeval(truth, truth.load_res(records), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    theirs, ours = evaluation.tide_errors(), errors(annotations, found)
    names = dict(zip(ERROR_TYPES, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))
    assert ours == pytest.approx({name: theirs["delta_ap"][short] for name, short in names.items()}, abs=1e-6)
    assert np.all(np.array(list(ours.values())) >= 0)
