"""Every family, from files to results in original pixels, by the real commands; none of them names a family."""

import json
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from command_line import run
from image_sets import noise
from processes import finish, start

pytestmark = pytest.mark.slow
SIDES = [(40, 90), (90, 40), (60, 60)]  # (height, width): wide, tall, square
MOBILENET = {"class_path": "onestage.models.TorchvisionBackbone"}
MOBILENET["init_args"] = {"name": "mobilenet_v3_small", "strides": [8, 16, 32]}
ATSS = {"class_path": "onestage.boxes.point_matchers.ATSSMatcher", "init_args": {"num_candidates": 5}}
FAMILIES = {
    "RetinaNet": {"backbone": MOBILENET, "channels": 16, "tower_convs": 1, "anchor_scale": 2.0},
    "FCOS": {"backbone": MOBILENET, "channels": 64, "tower_convs": 1, "score_threshold": 0.01, "matcher": ATSS},
    "SSDLite320": {},
    "YOLOv2": {"backbone": {"class_path": "onestage.models.Darknet19", "init_args": {"width": 4}}},
    "YOLOv3": {"backbone": {"class_path": "onestage.models.Darknet53", "init_args": {"width": 4}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine bright rectangles on noise, of three aspect ratios."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, 10):
        height, width = SIDES[number % 3]
        pixels = noise(height, width, number) // 4
        pixels[10:30, 8:32] = 255
        cv2.imwrite(str(folder / "images" / f"{number}.png"), pixels)
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        annotations.append({"id": number, "image_id": number, "category_id": 7, "bbox": [8, 10, 24, 20]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "box"}]}
    (folder / "all.json").write_text(json.dumps(content))
    return folder


def config_of(folder: Path, family: str) -> dict:
    source = {"path": str(folder), "train": "all.json", "val": "all.json"}
    source |= {"train_images": "images", "val_images": "images"}
    resize = {"class_path": "onestage.data.ShortestEdge", "init_args": {"shortest": 64, "longest": 128}}
    size = {"image_size": 320} if family == "SSDLite320" else {"resize": resize}
    data = {"source": {"class_path": "onestage.data.COCO", "init_args": source}, **size}
    model = {"detector": {"class_path": f"onestage.models.{family}", "init_args": FAMILIES[family]}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}}
    return {
        "data": {**data, "batch_size": 2, "num_workers": 0, "train_transforms": []},
        "model": {**model, "optimizer": optimizer, "channels_last": False},
        "ema": {"decay": 0.5},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true"},
        "runs_dir": str(folder / "runs"),
    }


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, folder: Path) -> tuple[str, Path, Path]:
    """The family, its configuration and its run, which stopped after one epoch and was resumed."""
    file = folder / f"{request.param}.yaml"
    file.write_text(yaml.safe_dump(config_of(folder, request.param)))
    words = ("fit", "--config", str(file), "--drawn_images", "3")
    assert run(*words, "--trainer.max_epochs", "1") == 0
    assert run(*words, "--resume", "auto") == 0
    return request.param, file, folder / "runs" / request.param / "version_0"


def test_run_resumes_evaluates_draws_and_keeps_the_size_of_its_canvas(trained) -> None:
    family, _, folder = trained
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"].keys() >= {"mAP", "AP50"}
    drawn = [cv2.imread(str(path)).shape[:2] for path in sorted((folder / "predictions").glob("*.jpg"))]
    assert all(height * 40 == width * 90 or height * 90 == width * 40 or height == width for height, width in drawn)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    side = 320 if family == "SSDLite320" else 128
    assert (checkpoint["onestage"]["detector"], checkpoint["onestage"]["image_size"]) == (family, side)
    assert checkpoint["global_step"] == 2 * 4  # nine images in batches of two, the last one dropped


def test_predictions_of_the_shared_weights_lie_inside_every_original_image(trained, tmp_path) -> None:
    _, _, folder = trained
    assert run("export", "--ckpt_path", str(folder / "checkpoints" / "best.ckpt"), "--output", str(tmp_path)) == 0
    words = ("--ckpt_path", str(tmp_path / "model.safetensors"), "--runs_dir", str(tmp_path))
    assert run("predict", *words, "--model.detector.score_threshold=0") == 0
    (file,) = tmp_path.glob("*/version_0/predictions.json")
    records = json.loads(file.read_text())
    assert {record["image_id"] for record in records} == set(range(1, 10))
    for record in records:
        height, width = SIDES[record["image_id"] % 3]
        x, y, w, h = record["bbox"]
        assert -1e-3 <= x <= x + w <= width + 1e-3
        assert -1e-3 <= y <= y + h <= height + 1e-3


def test_validate_losses_doctor_and_anchors_take_the_family(trained, folder, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    family, config, run_folder = trained
    checkpoint = str(run_folder / "checkpoints" / "best.ckpt")
    side = "320" if family == "SSDLite320" else "128"
    assert run("validate", "--ckpt_path", checkpoint) == 0
    assert run("losses", "--ckpt_path", checkpoint, "--config", str(config)) == 0
    size = ("--data.resize=null", f"--data.image_size={side}")
    assert run("fit", "--config", str(config), "--auto_batch", "4", "--trainer.max_epochs", "1", *size) == 0
    assert run("doctor", str(folder), "--detector", family, "--image_size", side) == 0
    capfd.readouterr()
    code = run("anchors", str(folder), "--detector", family, "--image_size", side)
    assert code == (2 if family == "FCOS" else 0)  # its points have no shapes to fit
    assert code == 0 or "Try a detector that takes anchors: --detector RetinaNet" in capfd.readouterr().err


def test_two_processes_train_and_evaluate_like_one(trained, tmp_path) -> None:
    family, config, run_folder = trained
    ddp = ("--trainer.devices=2", "--trainer.strategy=ddp", "--drawn_images=0")
    fit = ("fit", "--config", str(config), "--trainer.max_epochs=1", f"--runs_dir={tmp_path / 'fit'}")
    validate = ("validate", "--ckpt_path", str(run_folder / "checkpoints" / "best.ckpt"))
    for words in (fit, (*validate, f"--runs_dir={tmp_path / 'validate'}")):
        finish(start("-m", "onestage.cli", *words, *ddp))
    checkpoint = torch.load(tmp_path / f"fit/{family}/version_0/checkpoints/last.ckpt", weights_only=True)
    of_one_canvas = 9 if family == "SSDLite320" else 6  # the three tall images do not fill a step of four
    assert checkpoint["global_step"] == of_one_canvas // 4
    assert run(*validate, f"--runs_dir={tmp_path / 'one'}", "--drawn_images=0") == 0
    paths = [tmp_path / name / family / "version_0/results.json" for name in ("one", "validate")]
    one, two = (json.loads(path.read_text())["metrics"] for path in paths)
    assert one == two
