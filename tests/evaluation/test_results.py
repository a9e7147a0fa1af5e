import json

import pytest
from evaluation_data import annotation_set, detections, flat

from onestage.evaluation.analysis import analyse
from onestage.evaluation.results import format_table, write_results

HERE, THERE = [0.0, 0.0, 100.0, 100.0], [200.0, 200.0, 300.0, 300.0]
# One cat found at 0.75, then something wrong; no Füchsin.
ANALYSIS = analyse(*flat(annotation_set([[HERE]], [[0]]), detections([[HERE, THERE]], [[0.75, 0.5]], [[0, 0]])), 2)
METRICS = {"mAP": 0.25, "AP50": 0.5, "AP75": float("nan")}
PER_CLASS = {"cat": 0.25, "Füchsin": float("nan")}


def test_results_have_null_for_undefined_metrics(tmp_path):
    path = tmp_path / "run" / "results.json"
    arguments = {"metrics": METRICS, "per_class": PER_CLASS, "class_names": ["cat", "Füchsin"], "analysis": ANALYSIS}
    write_results(path, stage="validate", seconds=2.0, images_per_second=50.0, **arguments)
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
