import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, coco_numbers, detections, random_evaluation
from processes import finish, start

from onestage.evaluation import coco
from onestage.evaluation.coco import BACKENDS, CocoEvaluator, choose_backend
from onestage.types import Detections

HERE, THERE, ELSEWHERE = [10.0, 10.0, 30.0, 30.0], [100.0, 100.0, 120.0, 120.0], [300.0, 300.0, 320.0, 320.0]
LARGE = [200.0, 200.0, 400.0, 400.0]


def evaluate(annotations, found, backend="auto"):
    evaluator = CocoEvaluator(annotations, backend)
    evaluator.update(torch.arange(len(found.boxes)), found)
    return evaluator


@pytest.mark.parametrize("flag", ["crowds", "difficult"])
@pytest.mark.parametrize("boxes", [[HERE], [LARGE, HERE], [[210.0, 210.0, 390.0, 390.0], HERE]])
def test_crowd_and_difficult_objects_are_neither_found_nor_missed(flag, boxes):
    annotations = annotation_set([[HERE, LARGE]], [[0, 0]], **{flag: [[0, 1]]})
    found = detections([boxes], [[0.9, 0.8][-len(boxes) :]], [[0] * len(boxes)])
    assert evaluate(annotations, found).evaluation().metrics["mAP"] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_of_every_backend_equal_those_of_pycocotools(seed, backend, capfd):
    pytest.importorskip(backend)
    annotations, found = random_evaluation(seed, num_images=20, num_classes=3)
    expected = coco_numbers(annotations, found)
    by_class = {
        name: coco_numbers(annotations, found, category)["mAP"]
        for name, category in zip(annotations.class_names, annotations.category_ids, strict=True)
    }
    capfd.readouterr()
    evaluator = evaluate(annotations, found, backend)
    assert evaluator.evaluation().metrics == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert evaluator.evaluation().per_class == pytest.approx(by_class, abs=1e-6, nan_ok=True)
    assert np.nanmean(list(evaluator.evaluation().per_class.values())) == pytest.approx(expected["mAP"], abs=1e-6)
    assert 0.1 < expected["mAP"] < 0.9
    assert capfd.readouterr().out == ""  # pycocotools prints
    of_06 = detections([[[0.0, 0.0, 20.0, 6.0]]], [[0.9]], [[0]])  # IoU 0.6: three of the ten thresholds, not two
    metrics = evaluate(annotation_set([[[0.0, 0.0, 20.0, 10.0]]], [[0]]), of_06, backend).evaluation().metrics
    assert metrics["mAP"] == pytest.approx(0.3)


def test_hotcoco_is_not_used_without_its_threads(monkeypatch):
    monkeypatch.setattr(coco, "_hotcoco_processes", {os.getpid()})
    assert choose_backend("hotcoco") == "hotcoco"
    monkeypatch.setattr(coco, "_hotcoco_processes", {os.getpid() + 1})  # as after a fork
    assert choose_backend("auto") == choose_backend("hotcoco") == "faster_coco_eval"


def test_repeated_image_counts_once_and_a_missing_one_not_at_all():
    evaluator = CocoEvaluator(annotation_set([[HERE], [THERE], [THERE]], [[0], [0], [0]]))
    found = detections([[HERE], [ELSEWHERE], [HERE]], [[0.9], [0.95], [0.9]], [[0], [0], [0]])
    evaluator.update(torch.tensor([0, 1, 0]), found)
    evaluator.update(torch.tensor([0]), detections([[HERE]], [[0.9]], [[0]]))
    # The third image was never passed.
    # Of two objects one is found, after one wrong detection: precision 1/2 up to recall 0.50, then 0.
    assert evaluator.evaluation().metrics["mAP"] == pytest.approx(51 * 0.5 / 101)
    assert len(evaluator.results(Path())) == 2


def test_metrics_count_the_best_hundred_detections_of_an_image_and_results_hold_all():
    annotations, found = random_evaluation(4, num_images=6, num_detections=130)
    evaluator = evaluate(annotations, found)
    assert len(evaluator.results(Path())) == 6 * 130
    best = found.scores.argsort(dim=1, descending=True, stable=True)[:, :100]
    kept = Detections(*(column[torch.arange(6)[:, None], best] for column in found))
    assert evaluator.evaluation().metrics == pytest.approx(coco_numbers(annotations, kept), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("objects", "crowds", "found"),
    [
        ([[HERE]], None, []),  # no image evaluated
        ([[], []], None, [[HERE], []]),  # images without objects
        ([[HERE]], [[1]], [[THERE]]),  # nothing but crowds
    ],
)
def test_metrics_without_objects_to_find_are_nan(objects, crowds, found):
    annotations = annotation_set(objects, [[0] * len(boxes) for boxes in objects], crowds=crowds)
    evaluator = CocoEvaluator(annotations)
    if found:
        scores, labels = [[0.9] * len(boxes) for boxes in found], [[0] * len(boxes) for boxes in found]
        evaluator.update(torch.arange(len(found)), detections(found, scores, labels))
    assert all(math.isnan(value) for value in evaluator.evaluation().metrics.values())
    assert all(math.isnan(value) for value in evaluator.evaluation().per_class.values())


def test_no_detections_give_zero_for_classes_with_objects_and_nan_for_others():
    annotations = annotation_set([[HERE], []], [[1], []])
    evaluator = evaluate(annotations, detections([[], []], [[], []], [[], []]))
    assert (evaluator.evaluation().metrics["mAP"], evaluator.evaluation().metrics["AR100"]) == (0.0, 0.0)
    assert repr(evaluator.evaluation().per_class) == "{'cat': nan, 'dog': 0.0, 'owl': nan}"


def test_results_have_ids_of_data_set_and_original_pixels():
    annotations = annotation_set([[], [], [HERE]], [[], [], [2]])
    evaluator = CocoEvaluator(annotations)
    found = detections([[[10.0, 20.5, 30.25, 60.12345]]], [[0.1234567]], [[2]])
    evaluator.update(torch.tensor([2]), found)
    expected = {"image_id": 30, "category_id": 21, "bbox": [10.0, 20.5, 20.25, 39.623], "score": 0.12346}
    assert evaluator.results(Path()) == [{**expected, "file_name": "2.jpg"}]
    assert evaluator.images(Path()) == [{"id": 30, "file_name": "2.jpg", "detections": 1}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_detection_is_dropped_with_warning(bad):
    evaluator = CocoEvaluator(annotation_set([[HERE]], [[0]]))
    with pytest.warns(UserWarning, match=r"1 detections of 0\.jpg"):
        evaluator.update(torch.tensor([0]), detections([[HERE, THERE]], [[0.9, bad]], [[0, 0]]))
    assert evaluator.evaluation().metrics["mAP"] == 1.0


def test_crowded_images_are_warned_of_and_results_name_images_relative_to_a_root():
    annotations = annotation_set([[HERE] * 101, [HERE]], [[0] * 101, [0]])
    evaluator = CocoEvaluator(annotations)
    evaluator.update(torch.tensor([0, 1]), detections([[HERE], [HERE]], [[0.9], [0.9]], [[0], [0]]))
    with pytest.warns(UserWarning, match="1 of 2 images have more than 100 objects, up to 101"):
        evaluator.evaluation()
    elsewhere = evaluator.results(Path("/nowhere"))[0]["file_name"]
    assert elsewhere == Path("0.jpg").absolute().as_posix()


@pytest.mark.slow
def test_process_that_was_forked_after_an_evaluation_can_evaluate():
    finish(start("-c", FORK))


FORK = """
import os
import torch
from evaluation_data import random_evaluation
from onestage.evaluation.coco import CocoEvaluator
torch.set_num_threads(1)

def evaluate():
    annotations, found = random_evaluation(0)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(torch.arange(len(found.boxes)), found)
    return evaluator.evaluation().metrics

before = evaluate()
child = os.fork()
if child == 0:
    os._exit(0 if all(abs(value - before[name]) < 1e-6 or value != value for name, value in evaluate().items()) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
