import math

import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, coco_numbers, detections, random_evaluation

from onestage.errors import ConfigError
from onestage.evaluation import voc as average_precision
from onestage.evaluation.coco import CocoEvaluator, in_original_pixels
from onestage.evaluation.voc import METRIC_NAMES, choose_backend
from onestage.types import Detections

BACKENDS = ["faster_coco_eval", "pycocotools"]
HERE, THERE, ELSEWHERE = [10.0, 10.0, 30.0, 30.0], [100.0, 100.0, 120.0, 120.0], [300.0, 300.0, 320.0, 320.0]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def evaluate(annotations, found, backend, **limits):
    evaluator = CocoEvaluator(annotations, backend=backend, **limits)
    evaluator.update(torch.arange(len(found.boxes)), found)
    return evaluator


def test_two_of_three_detections_right_gives_hand_computed_numbers(backend):
    annotations = annotation_set([[HERE, THERE]], [[0, 0]], class_names=["cat"])
    found = detections([[HERE, ELSEWHERE, THERE]], [[0.9, 0.8, 0.7]], [[0, 0, 0]])
    evaluator = evaluate(annotations, found, backend)
    metrics = evaluator.compute()
    # Recall 0 to 0.50: 51 of 101 points with precision 1. Recall 0.51 to 1: 50 points with precision 2/3.
    expected = (51 + 50 * 2 / 3) / 101
    for name in ("mAP", "AP50", "AP75", "mAP_small"):
        assert metrics[name] == pytest.approx(expected, abs=1e-6)
    assert (metrics["AR1"], metrics["AR10"], metrics["AR100"]) == (0.5, 1.0, 1.0)
    assert math.isnan(metrics["mAP_large"]) and math.isnan(metrics["AR_medium"])  # 20 x 20 px is small
    assert evaluator.per_class() == {"cat": pytest.approx(expected, abs=1e-6)}
    assert tuple(metrics) == METRIC_NAMES


def test_detection_on_an_image_without_objects_is_a_false_positive(backend):
    annotations = annotation_set([[HERE], []], [[0], []])
    found = detections([[HERE], [HERE]], [[0.9], [0.95]], [[0], [0]])
    # One wrong detection ranks before the right one: precision 1/2 at every recall.
    assert evaluate(annotations, found, backend).compute()["mAP"] == pytest.approx(0.5)


def test_half_overlap_counts_at_the_first_iou_threshold_only(backend):
    annotations = annotation_set([[[0.0, 0.0, 100.0, 100.0]]], [[1]])
    found = detections([[[0.0, 0.0, 100.0, 52.0]]], [[0.9]], [[1]])  # IoU 0.52: right at 0.50, wrong at 0.55..0.95
    metrics = evaluate(annotations, found, backend).compute()
    assert (metrics["AP50"], metrics["AP75"]) == (1.0, 0.0)
    assert metrics["mAP"] == pytest.approx(0.1)


def test_annotated_area_and_not_the_box_decides_the_size_range(backend):
    annotations = annotation_set([[[0.0, 0.0, 100.0, 100.0]]], [[0]], areas=[[900.0]])  # a thin thing: 900 < 32^2
    found = detections([[[0.0, 0.0, 100.0, 100.0]]], [[0.9]], [[0]])
    metrics = evaluate(annotations, found, backend).compute()
    assert metrics["mAP_small"] == 1.0
    assert math.isnan(metrics["mAP_large"]) and math.isnan(metrics["mAP_medium"])


def test_detection_in_a_crowd_is_neither_right_nor_wrong(backend):
    annotations = annotation_set([[HERE, [200.0, 200.0, 400.0, 400.0]]], [[0, 0]], crowds=[[0, 1]])
    found = detections([[[210.0, 210.0, 230.0, 230.0], HERE]], [[0.9, 0.8]], [[0, 0]])
    assert evaluate(annotations, found, backend).compute()["mAP"] == 1.0


def test_difficult_object_is_neither_found_nor_missed(backend):
    annotations = annotation_set([[HERE, [200.0, 200.0, 400.0, 400.0]]], [[0, 0]], difficult=[[0, 1]])
    missed = detections([[HERE]], [[0.8]], [[0]])
    found = detections([[[200.0, 200.0, 400.0, 400.0], HERE]], [[0.9, 0.8]], [[0, 0]])
    assert evaluate(annotations, missed, backend).compute()["mAP"] == 1.0
    assert evaluate(annotations, found, backend).compute()["mAP"] == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_equal_those_of_pycocotools(backend, seed, capfd):
    annotations, found = random_evaluation(seed)
    expected = coco_numbers(annotations, found)
    by_class = {
        name: coco_numbers(annotations, found, category)["mAP"]
        for name, category in zip(annotations.class_names, annotations.category_ids, strict=True)
    }
    capfd.readouterr()
    evaluator = evaluate(annotations, found, backend)
    assert evaluator.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert evaluator.per_class() == pytest.approx(by_class, abs=1e-6, nan_ok=True)
    assert 0.1 < expected["mAP"] < 0.9
    assert capfd.readouterr().out == ""  # pycocotools talks


def test_mean_of_the_classes_is_the_map(backend):
    annotations, found = random_evaluation(2)
    evaluator = evaluate(annotations, found, backend)
    assert np.nanmean(list(evaluator.per_class().values())) == pytest.approx(evaluator.compute()["mAP"], abs=1e-6)


def test_only_images_that_were_updated_are_evaluated(backend):
    annotations = annotation_set([[HERE], [THERE], [THERE]], [[0], [0], [0]])
    evaluator = CocoEvaluator(annotations, backend=backend)
    evaluator.update(torch.tensor([1]), detections([[THERE]], [[0.9]], [[0]]))
    assert evaluator.compute()["mAP"] == 1.0


def test_repeated_image_counts_once(backend):
    annotations = annotation_set([[HERE], [THERE]], [[0], [0]])
    evaluator = CocoEvaluator(annotations, backend=backend)
    found = detections([[HERE], [ELSEWHERE], [HERE]], [[0.9], [0.95], [0.9]], [[0], [0], [0]])
    evaluator.update(torch.tensor([0, 1, 0]), found)
    evaluator.update(torch.tensor([0]), detections([[HERE]], [[0.9]], [[0]]))
    # Of two objects one is found, after one wrong detection: precision 1/2 up to recall 0.50, then 0.
    assert evaluator.compute()["mAP"] == pytest.approx(51 * 0.5 / 101)
    assert len(evaluator.results()) == 2


def test_numbers_do_not_depend_on_the_order_of_the_batches(backend):
    annotations, found = random_evaluation(3)
    whole = evaluate(annotations, found, backend)
    parts = CocoEvaluator(annotations, backend=backend)
    for indices in torch.randperm(len(annotations), generator=torch.Generator().manual_seed(0)).split(3):
        parts.update(indices, Detections(*(tensor[indices] for tensor in found)))
    assert repr(parts.compute()) == repr(whole.compute())  # repr, because NaN is not equal to itself
    assert parts.results() == whole.results()


def test_best_detections_are_kept_wherever_they_stand(backend):
    annotations = annotation_set([[HERE]], [[0]])
    found = detections([[ELSEWHERE, HERE, THERE]], [[0.3, 0.9, 0.5]], [[0, 0, 0]])
    evaluator = evaluate(annotations, found, backend, max_detections=1)
    assert [record["score"] for record in evaluator.results()] == [0.9]
    assert evaluator.compute()["AR100"] == 1.0


def test_more_than_a_hundred_detections_are_cut_to_the_best_hundred(backend):
    annotations, found = random_evaluation(4, num_images=6, num_detections=130)
    evaluator = evaluate(annotations, found, backend)
    assert len(evaluator.results()) == 6 * 100
    best = found.scores.argsort(dim=1, descending=True, stable=True)[:, :100]
    kept = Detections(
        found.boxes.gather(1, best[..., None].expand(-1, -1, 4)),
        found.scores.gather(1, best),
        found.labels.gather(1, best),
    )
    assert evaluator.compute() == pytest.approx(coco_numbers(annotations, kept), abs=1e-6, nan_ok=True)


def test_no_image_at_all_leaves_every_number_undefined(backend):
    evaluator = CocoEvaluator(annotation_set([[HERE]], [[0]]), backend=backend)
    assert all(math.isnan(value) for value in evaluator.compute().values())
    assert all(math.isnan(value) for value in evaluator.per_class().values())
    assert evaluator.results() == []


def test_images_without_any_object_leave_every_number_undefined(backend):
    annotations = annotation_set([[], []], [[], []])
    evaluator = evaluate(annotations, detections([[HERE], []], [[0.9], []], [[0], []]), backend)
    assert all(math.isnan(value) for value in evaluator.compute().values())


def test_nothing_but_crowds_leaves_every_number_undefined(backend):
    annotations = annotation_set([[HERE]], [[0]], crowds=[[1]])
    evaluator = evaluate(annotations, detections([[THERE]], [[0.9]], [[0]]), backend)
    assert all(math.isnan(value) for value in evaluator.compute().values())


def test_no_detection_at_all_gives_zero_where_there_are_objects(backend):
    annotations = annotation_set([[HERE], []], [[1], []])
    evaluator = evaluate(annotations, detections([[], []], [[], []], [[], []]), backend)
    assert evaluator.compute()["mAP"] == 0.0
    assert evaluator.compute()["AR100"] == 0.0
    by_class = evaluator.per_class()
    assert by_class["dog"] == 0.0 and math.isnan(by_class["cat"]) and math.isnan(by_class["owl"])


def test_class_without_objects_is_undefined_and_left_out_of_the_mean(backend):
    annotations = annotation_set([[HERE]], [[0]])
    evaluator = evaluate(annotations, detections([[HERE, THERE]], [[0.9, 0.8]], [[0, 2]]), backend)
    assert evaluator.compute()["mAP"] == 1.0
    assert math.isnan(evaluator.per_class()["owl"])


def test_results_carry_the_ids_of_the_data_set_and_original_pixels():
    annotations = annotation_set([[], [], [HERE]], [[], [], [2]])
    evaluator = CocoEvaluator(annotations)
    evaluator.update(torch.tensor([2]), detections([[[10.0, 20.5, 30.25, 60.12345]]], [[0.1234567]], [[2]]))
    expected = {"image_id": 30, "category_id": 21, "bbox": [10.0, 20.5, 20.25, 39.623], "score": 0.12346}
    assert evaluator.results() == [{**expected, "file_name": "2.jpg"}]


def test_low_precision_detections_are_widened_before_they_are_packed():
    annotations = annotation_set([[HERE]], [[0]])
    evaluator = CocoEvaluator(annotations)
    found = detections([[[1.0, 2.0, 300.703125, 4.0]]], [[0.5]], [[0]])
    evaluator.update(torch.tensor([0]), found._replace(scores=found.scores.bfloat16()))
    assert evaluator.results()[0]["bbox"][2] == pytest.approx(299.703)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_detection_that_is_not_finite_is_left_out_with_a_warning(bad):
    annotations = annotation_set([[HERE]], [[0]])
    evaluator = CocoEvaluator(annotations)
    with pytest.warns(UserWarning, match=r"1 detections of 0\.jpg"):
        evaluator.update(torch.tensor([0]), detections([[HERE, THERE]], [[0.9, bad]], [[0, 0]]))
    assert evaluator.compute()["mAP"] == 1.0


def test_label_or_index_out_of_range_is_refused():
    evaluator = CocoEvaluator(annotation_set([[HERE]], [[0]]))
    with pytest.raises(ValueError, match=r"labels outside 0\.\.2"):
        evaluator.update(torch.tensor([0]), detections([[HERE]], [[0.9]], [[3]]))
    with pytest.raises(ValueError, match=r"image index 1"):
        evaluator.update(torch.tensor([1]), detections([[HERE]], [[0.9]], [[0]]))


def test_update_after_compute_needs_a_reset():
    evaluator = CocoEvaluator(annotation_set([[HERE]], [[0]]))
    found = detections([[HERE]], [[0.9]], [[0]])
    evaluator.update(torch.tensor([0]), found)
    evaluator.compute()
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        evaluator.update(torch.tensor([0]), found)
    evaluator.reset()
    evaluator.update(torch.tensor([0]), found)
    assert evaluator.compute()["mAP"] == 1.0


@pytest.mark.parametrize("max_detections", [0, 101])
def test_number_of_detections_that_coco_does_not_define_is_refused(max_detections):
    with pytest.raises(ConfigError, match=r"must be 1\.\.100"):
        CocoEvaluator(annotation_set([[]], [[]]), max_detections=max_detections)


def test_backend_falls_back_to_pycocotools_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(average_precision, "find_spec", lambda name: None if "faster" in name else object())
    assert choose_backend("auto") == "pycocotools"
    with pytest.raises(ConfigError, match="pip install faster-coco-eval"):
        choose_backend("faster_coco_eval")
    with pytest.raises(ConfigError, match="'coco'"):
        choose_backend("coco")


def test_boxes_scale_from_the_network_input_to_each_original_image():
    found = detections([[[0.0, 0.0, 300.0, 150.0]], [[30.0, 30.0, 60.0, 60.0]]], [[0.9], [0.8]], [[0], [1]])
    scaled = in_original_pixels(found, 300, torch.tensor([[600, 300], [100, 900]]))  # (height, width)
    assert scaled.boxes[0, 0].tolist() == pytest.approx([0, 0, 300, 300])
    assert scaled.boxes[1, 0].tolist() == pytest.approx([90, 10, 180, 20])
    assert torch.equal(scaled.scores, found.scores)
