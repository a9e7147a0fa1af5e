"""RetinaNet with aspect-preserving input, from files to results in original pixels, by the real command."""

import json
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from command_line import run
from image_sets import noise

pytestmark = pytest.mark.slow
SIDES = [(40, 90), (90, 40), (60, 60)]  # (height, width): wide, tall, square


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine bright rectangles on noise, of three aspect ratios, and a configuration."""
    folder = tmp_path_factory.mktemp("retinanet")
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
    backbone = {"class_path": "onestage.models.TorchvisionBackbone"}
    backbone["init_args"] = {"name": "mobilenet_v3_small", "strides": [8, 16, 32]}
    arguments = {"backbone": backbone, "channels": 16, "tower_convs": 1, "anchor_scale": 2.0}
    source = {"path": str(folder), "train": "all.json", "val": "all.json"}
    config = {
        "data": {
            "source": {
                "class_path": "onestage.data.COCO",
                "init_args": source | {"train_images": "images", "val_images": "images"},
            },
            "resize": {"class_path": "onestage.data.ShortestEdge", "init_args": {"shortest": 64, "longest": 128}},
            "batch_size": 2,
            "num_workers": 0,
            "train_transforms": [],
        },
        "model": {
            "detector": {"class_path": "onestage.models.RetinaNet", "init_args": arguments},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}},
            "channels_last": False,
        },
        "ema": {"decay": 0.5},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true"},
        "runs_dir": str(folder / "runs"),
    }
    (folder / "retinanet.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    assert run("fit", "--config", str(folder / "retinanet.yaml"), "--drawn_images", "3") == 0
    return folder / "runs" / "retinanet" / "version_0"


def test_run_evaluates_draws_and_keeps_the_size_of_its_canvas(trained: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert results["metrics"].keys() >= {"mAP", "AP50"}
    drawn = [cv2.imread(str(path)).shape[:2] for path in sorted((trained / "predictions").glob("*.jpg"))]
    assert all(height * 40 == width * 90 or height * 90 == width * 40 or height == width for height, width in drawn)
    saved = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["onestage"]
    assert (saved["detector"], saved["image_size"]) == ("RetinaNet", 128)


def test_predictions_of_the_shared_weights_lie_inside_every_original_image(trained: Path, tmp_path: Path) -> None:
    assert run("export", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--output", str(tmp_path)) == 0
    weights = str(tmp_path / "model.safetensors")
    assert (
        run("predict", "--ckpt_path", weights, "--runs_dir", str(tmp_path), "--model.detector.score_threshold=0") == 0
    )
    (file,) = tmp_path.glob("*/version_0/predictions.json")
    records = json.loads(file.read_text())
    assert {record["image_id"] for record in records} == set(range(1, 10))
    for record in records:
        height, width = SIDES[record["image_id"] % 3]
        x, y, w, h = record["bbox"]
        assert -1e-3 <= x <= x + w <= width + 1e-3
        assert -1e-3 <= y <= y + h <= height + 1e-3


@pytest.mark.parametrize(
    "words",
    [
        ("losses", "--ckpt_path", "CHECKPOINT", "--config", "CONFIG"),
        ("fit", "--config", "CONFIG", "--auto_batch", "4", "--data.resize=null", "--data.image_size=64"),
        ("doctor", "DATA", "--detector", "RetinaNet", "--image_size", "128"),
        ("anchors", "DATA", "--detector", "RetinaNet", "--image_size", "128"),
    ],
    ids=lambda words: words[0],
)
def test_other_commands_take_retinanet(words, trained: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"CHECKPOINT": trained / "checkpoints" / "best.ckpt", "CONFIG": folder / "retinanet.yaml"}
    assert run(*(str(names.get(word, folder if word == "DATA" else word)) for word in words)) == 0
