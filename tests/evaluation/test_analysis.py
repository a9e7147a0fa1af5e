"""Thresholds, confusions and types of errors, by hand and against second implementations; and how they are written."""

import json
import math

import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, coco_numbers, coco_objects, detections, flat, random_evaluation

from onestage.evaluation.analysis import ERROR_TYPES, analyse
from onestage.evaluation.coco import Evaluation
from onestage.evaluation.results import format_table, write_results

HERE, THERE, NOWHERE = [0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 300.0, 300.0], [400.0, 400.0, 500.0, 500.0]


def analysis(annotations, found):
    return analyse(*flat(annotations, found), len(annotations.class_names))


def test_confusion_matrix_counts_a_case_that_fits_on_a_page():
    annotations = annotation_set([[HERE, THERE], [HERE, THERE]], [[0, 1], [0, 2]], crowds=[[0, 0], [0, 1]])
    found = detections([[HERE, THERE, NOWHERE], [HERE, THERE]], [[0.9, 0.8, 0.7], [0.1, 0.9]], [[0, 0, 2], [0, 1]])
    result = analysis(annotations, found)
    # Best F1 over all: 0.9 finds one of three (2/4), 0.8 adds a wrong class, 0.7 background, 0.1 the second cat (4/7).
    assert result.score_threshold == pytest.approx(0.1)
    # rows: cat, dog, owl, background; columns: the same. The crowd and the detection on it count nowhere.
    assert result.confusion == [[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_detections_below_the_threshold_leave_their_objects_missed():
    annotations = annotation_set([[HERE], [HERE]], [[0], [0]])
    found = detections([[HERE, *[NOWHERE] * 5], [HERE]], [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.3]], [[0] * 6, [0]])
    result = analysis(annotations, found)
    # F1 at 0.9 is 2/3; with the five wrong ones and the second right one it is 4/9.
    assert result.score_threshold == pytest.approx(0.9)
    assert result.confusion[0] == [1, 0, 0, 1]
    cat = result.classes[0]
    assert (cat.best.precision, cat.best.recall, cat.best.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (cat.num_objects, result.overall.num_objects) == (2, 2)


def test_ap50_of_each_class_equals_that_of_pycocotools(capfd):
    annotations, found = random_evaluation(0, num_images=14, num_classes=3)
    result = analysis(annotations, found)
    for one, category in zip(result.classes, annotations.category_ids, strict=True):
        assert one.ap50 == pytest.approx(coco_numbers(annotations, found, category)["AP50"], abs=1e-6)
        assert np.mean(one.precision) == pytest.approx(one.ap50)
    assert result.overall.ap50 == pytest.approx(coco_numbers(annotations, found)["AP50"], abs=1e-6)


def hotcoco_evaluation(annotations, found):
    hotcoco = pytest.importorskip("hotcoco")
    truth = hotcoco.COCO()
    truth.dataset, records = coco_objects(annotations, found)
    truth.createIndex()
    return hotcoco.COCOeval(truth, truth.load_res(records), "bbox")


@pytest.mark.parametrize("seed", [0, 1])
def test_confusion_matrix_equals_a_second_implementation(seed):
    annotations, found = random_evaluation(seed, crowd_rate=0.0)
    evaluation, result = hotcoco_evaluation(annotations, found), analysis(annotations, found)
    theirs = evaluation.confusion_matrix(iou_thr=0.5, max_det=1000, min_score=result.score_threshold)
    assert result.confusion == np.asarray(theirs["matrix"]).tolist()


def test_evaluation_without_objects_or_detections_has_no_threshold():
    nothing = analysis(annotation_set([[]], [[]]), detections([[]], [[]], [[]]))
    assert nothing.score_threshold is None and math.isnan(nothing.overall.ap50)
    assert math.isnan(nothing.error_types["missed"])
    missed = analysis(annotation_set([[HERE]], [[0]]), detections([[]], [[]], [[]]))
    assert missed.score_threshold is None and missed.overall.ap50 == 0 and missed.error_types["missed"] == 1
    assert missed.confusion[0] == [0, 0, 0, 1]
    assert np.sum(analysis(annotation_set([[]], [[]]), detections([[HERE]], [[0.9]], [[0]])).confusion) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap50_lost_by_each_type_of_error_equals_a_second_implementation(seed):
    annotations, found = random_evaluation(seed, crowd_rate=0.0)
    found = found._replace(scores=found.scores + 1e-3 * torch.rand(found.scores.shape))  # without ties
    evaluation = hotcoco_evaluation(annotations, found)
    evaluation.evaluate()
    evaluation.accumulate()
    theirs, ours = evaluation.tide_errors(), analysis(annotations, found).error_types
    names = dict(zip(ERROR_TYPES, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))
    assert ours == pytest.approx({name: theirs["delta_ap"][short] for name, short in names.items()}, abs=1e-6)
    assert np.all(np.array(list(ours.values())) >= 0)


# One cat found at 0.75, then something wrong; no Füchsin.
ANALYSIS = analyse(*flat(annotation_set([[HERE]], [[0]]), detections([[HERE, THERE]], [[0.75, 0.5]], [[0, 0]])), 2)
METRICS = {"mAP": 0.25, "AP50": 0.5, "AP75": float("nan")}
PER_CLASS = {"cat": 0.25, "Füchsin": float("nan")}


def test_results_have_null_for_undefined_metrics(tmp_path):
    path = tmp_path / "run" / "results.json"
    evaluation = Evaluation({}, PER_CLASS, ANALYSIS)
    write_results(path, "validate", METRICS, evaluation, seconds=2.0, num_images=100)
    text = path.read_text(encoding="utf-8")
    assert '"confusion": [\n    [1, 0, 0],\n    [0, 0, 0],\n' in text  # a list of numbers takes one line
    results = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert results["metrics"] == {"mAP": 0.25, "AP50": 0.5, "AP75": None}
    assert results["per_class"] == {"cat": 0.25, "Füchsin": None}
    assert results["class_names"] == ["cat", "Füchsin"]
    cat, fox = results["classes"]["cat"], results["classes"]["Füchsin"]
    assert (cat["precision"], cat["recall"], cat["f1"], cat["threshold"], cat["num_objects"]) == (1, 1, 1, 0.75, 1)
    assert (cat["AP50"], cat["VOC07"], cat["VOC10"], fox["AP50"], fox["f1"]) == (1, 1, 1, None, None)
    assert (results["score_threshold"], results["confusion"]) == (0.75, [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert results["error_types"]["background"] == 0  # it comes after the last object
    assert (results["stage"], results["seconds"], results["images_per_second"]) == ("validate", 2.0, 50.0)
    assert {"python", "torch", "torchvision", "torchmetrics", "hotcoco"} <= set(results["versions"])
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_table_shows_percent_and_each_class_at_its_best_score_and_the_errors():
    lines = format_table(METRICS, PER_CLASS, ANALYSIS).splitlines()
    assert lines[0].split() == ["mAP", "25.0", "AP50", "50.0", "AP75", "-"]
    assert lines[-6].split() == ["class", "AP", "AP50", "prec.", "recall", "F1", "score", "objects"]
    assert lines[-5].split() == ["cat", "25.0", "100.0", "100.0", "100.0", "100.0", "0.75", "1"]
    assert lines[-4].split() == ["Füchsin", "-", "-", "-", "-", "-", "-", "0"]
    assert lines[-1].startswith("AP50 lost by error: classification 0.0, localisation 0.0")
