"""An ONNX file is kept only if onnxruntime detects with it what torch detects; the code of the docs reads it."""

import json
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_line import REPOSITORY, run
from tiny_training import TinyDetector

import onestage
from onestage.data import DetectionDataModule, ShortestEdge, Stretch
from onestage.data.resize import Resize
from onestage.deploy import onnx_export
from onestage.deploy.onnx_export import compare, export_onnx
from onestage.deploy.predictor import Predictor
from onestage.errors import ConfigError
from onestage.models import FCOS, Darknet19, Darknet53, RetinaNet, SSDLite320, TorchvisionBackbone, YOLOv2, YOLOv3
from onestage.models.weights import CLASS_OUTPUT
from onestage.training.module import DetectionModule
from onestage.types import Detector


def rows(*detections: tuple[float, float, int]) -> list[np.ndarray]:
    """Return the detections of one image: (left edge of a box of 10 px, score, label)."""
    boxes = np.array([[[left, 0, left + 10, 10] for left, *_ in detections]], np.float32)
    return [boxes, np.array([[row[1] for row in detections]]), np.array([[row[2] for row in detections]])]


def test_largest_differences_are_reported_whatever_the_order() -> None:
    found = rows((5.0, 0.9, 1), (40.0625, 0.9, 1), (0.0, 0.0, -1))
    expected = rows((40.0, 0.9, 1), (5.0, 0.8995, 1), (0.0, 0.0, -1))
    differences = "largest difference: 0.0005 of a score, 0.06 px of a box"
    assert compare(found, expected) == f"compared with torch: 2 detections on 3 drawn images; {differences}"
    assert compare(rows((0.0, 0.0, -1)), rows((0.0, 0.0, -1))).endswith("; nothing was detected")


@pytest.mark.parametrize("other", [(5.0, 0.9, 0), (5.2, 0.9, 1), (5.0, 0.902, 1), (0.0, 0.0, -1)])
def test_another_class_box_or_score_or_a_missing_detection_is_refused(other) -> None:
    with pytest.raises(ConfigError, match=r"[12] of [12] have no counterpart within 0.001 and 0.1 px"):
        compare(rows((5.0, 0.9, 1)), rows(other))


def test_missing_package_is_one_message_with_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r'export --format onnx needs a package .*\nInstall it: pip install "onestage\[export\]"$'
    with pytest.raises(ConfigError, match=message):
        export_onnx(None, Path())


def predictor_of(detector: Detector, resize: Resize) -> Predictor:
    """Return a model with random weights whose scores are far apart: equal ones, all 1, would be chosen by rounding."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, *resize.canvases[0]), dtype=torch.uint8)
    for layer in detector.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the statistics of the first batch
    with torch.no_grad():
        detector.train()(images)
        logits = detector.eval()(images).class_logits
        scale = 8 / (logits.amax() - logits.amin())
        for name, weights in detector.named_parameters():
            weights.mul_(scale if CLASS_OUTPUT.fullmatch(name) and weights.ndim > 1 else 1)
    data = DetectionDataModule(resize=resize, class_names=["a", "b", "c"], category_ids=[1, 2, 3])
    return Predictor(DetectionModule(detector), data, torch.device("cpu"))


MOBILENET = ("mobilenet_v3_small", [8, 16, 32])
SMALL = {"num_classes": 3, "score_threshold": 0.0}
FAMILIES = {
    "SSD": lambda: TinyDetector(**SMALL),
    "SSDLite320": lambda: SSDLite320(**SMALL),
    "RetinaNet": lambda: RetinaNet(**SMALL, backbone=TorchvisionBackbone(*MOBILENET), channels=16, tower_convs=1),
    "FCOS": lambda: FCOS(**SMALL, backbone=TorchvisionBackbone(*MOBILENET), channels=64, tower_convs=1),
    "YOLOv2": lambda: YOLOv2(**SMALL, backbone=Darknet19(width=4)),
    "YOLOv3": lambda: YOLOv3(**SMALL, backbone=Darknet53(width=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_detector_of_every_family_detects_the_same_in_onnxruntime(family, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    detector = FAMILIES[family]()
    canvases = [(64, 128), (128, 64)] if family == "RetinaNet" else [(64, 128)]
    resize = Stretch(detector.image_size) if detector.image_size else ShortestEdge(64, 128, canvases)
    (first, *_) = lines = export_onnx(predictor_of(detector, resize), tmp_path)
    assert len(lines) == len(canvases)
    assert int(re.search(r"compared with torch: (\d+) detections", first)[1]) > 50
    file = tmp_path / ("model_64x128.onnx" if family == "RetinaNet" else "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.type, images.shape) == ("tensor(uint8)", ["batch", 3, *resize.canvases[0]])
    boxes = session.run(["boxes"], {"images": np.zeros((5, *images.shape[1:]), np.uint8)})[0]
    assert boxes.shape == (5, detector.selection.max_detections, 4)


@pytest.mark.slow
def test_file_that_differs_or_cannot_run_is_not_written(tmp_path, monkeypatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_export, "BOX_TOLERANCE", -1)
    for message in (r"detections differ from torch's", "onnxruntime cannot run the model: no"):
        with pytest.raises(ConfigError, match=message):
            export_onnx(predictor_of(TinyDetector(**SMALL), Stretch(64)), tmp_path)
        assert [*tmp_path.iterdir()] == []
        monkeypatch.setattr(onnxruntime, "InferenceSession", Mock(side_effect=RuntimeError("no")))


@pytest.mark.slow
def test_command_writes_a_file_that_the_code_of_the_docs_reads(best, drawn, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert run("export", "--ckpt_path", str(best), "--format", "onnx", "--output", str(tmp_path)) == 0
    assert re.search(r"exported: .*model\.onnx\ncompared with torch: \d+ detections", capsys.readouterr().out)
    photo = sorted(drawn.glob("JPEGImages/*.jpg"))[0]
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    found: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], found)
    expected = onestage.load(best, device="cpu").predict("photo.jpg")
    assert len(expected) > 0
    assert found["names"] == expected.names
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.1)
    described = {"class_names", "category_ids", "canvas", "resize", "score_threshold"}
    assert found["about"].keys() == described
    assert found["about"]["category_ids"] == list(expected.category_ids)
    assert json.dumps(found["about"]["canvas"]) == "[128, 128]"
