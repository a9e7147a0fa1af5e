"""The snippets of docs/python.md: load, predict, evaluate, train, and plain Lightning."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from command_line import REPOSITORY, run, run_on
from PIL import Image
from tiny_training import TinyDetector, quiet_trainer

import onestage
from onestage.data import COCO, Letterbox, Shapes, Stretch, from_datasets
from onestage.deploy.predictor import to_rgb
from onestage.errors import CheckpointError, ConfigError, ImageError
from onestage.training.module import DetectionModule

FP32 = "--trainer.precision=32-true"  # what the Python door takes


@pytest.fixture(scope="module")
def model(best: Path) -> onestage.Predictor:
    return onestage.load(best, device="cpu")


@pytest.fixture(scope="module")
def photo(drawn: Path) -> Path:
    return sorted((drawn / "JPEGImages").glob("*.jpg"))[-1]


def samples(count: int, first_label: int = 0) -> list[Any]:
    """Return (image, target) pairs of torchvision's convention: noise with one bright box each."""
    random = np.random.default_rng(count)
    found = []
    for index in range(count):
        image = random.integers(0, 60, (64, 80, 3), dtype=np.uint8)
        image[20:50, 10:40, index % 3] = 255
        target = {"boxes": torch.tensor([[10.0, 20, 40, 50]]), "labels": torch.tensor([index % 2 + first_label])}
        found.append((Image.fromarray(image), target))
    return found


def test_predict_takes_path_pil_array_and_lists_of_them(model, photo):
    image = Image.open(photo).convert("RGB")
    pixels = np.asarray(image)
    found = model.predict(image, score=0.01)
    assert len(found) > 0
    assert found.boxes.shape == (len(found), 4)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()
    assert found.names == [model.class_names[label] for label in found.labels]
    height, width = pixels.shape[:2]
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [width, height, width, height]).all()
    small = image.resize((50, 70))
    several = model.predict([pixels, small, str(photo), photo], score=0.01, batch_size=3)
    for other in (several[0], several[2], several[3]):
        np.testing.assert_allclose(other.boxes, found.boxes, atol=1e-3)
    assert (several[1].boxes <= [50, 70, 50, 70]).all()
    assert model.predict([]) == []
    assert len(model.predict(image, score=1.0)) == 0


def test_predict_equals_the_command(model, best, photo, tmp_path):
    folder = run_on(best, "predict", tmp_path, "--data.predict_dir", str(photo), FP32)
    written = json.loads((folder / "predictions.json").read_text())
    records = model.predict(photo, score=0.0).to_coco(image_id=1)[: len(written)]
    assert [record["category_id"] for record in records] == [record["category_id"] for record in written]
    for key in ("bbox", "score"):
        expected = np.array([record[key] for record in written])
        np.testing.assert_allclose(np.array([record[key] for record in records]), expected, atol=2e-3)


def test_detections_are_drawn_and_converted(model, photo, tmp_path, monkeypatch):
    found = model.predict(photo, score=0.01)
    found.draw(photo).save(tmp_path / "out.jpg")
    assert min(Image.open(tmp_path / "out.jpg").size) >= 300
    record = found.to_coco(image_id=7)[0]
    x1, y1, x2, y2 = found.boxes[0].tolist()
    assert record["image_id"] == 7
    assert record["category_id"] == model.category_ids[found.labels[0]]
    assert record["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()
    package = ModuleType("supervision")
    package.Detections = lambda **arguments: arguments
    monkeypatch.setitem(sys.modules, "supervision", package)
    arguments = found.to_supervision()
    assert arguments["xyxy"].shape == (len(found), 4)
    assert arguments["data"]["class_name"].tolist() == found.names


def test_evaluate_gives_the_numbers_of_the_command(model, best, drawn, tmp_path):
    results = json.loads((run_on(best, "validate", tmp_path, FP32) / "results.json").read_text())
    coco, score = COCO(drawn, train_images="JPEGImages", val_images="JPEGImages"), model.score_threshold
    model.module.score_threshold = 0.99  # as of another evaluation
    for source in (coco, Shapes(drawn, num_train=32, num_val=7)):
        metrics = model.evaluate(source, num_workers=0)
        for found, expected in ((metrics, results["metrics"]), (metrics.per_class, results["per_class"])):
            numbers = {name: float("nan") if value is None else value for name, value in expected.items()}
            assert dict(found) == pytest.approx(numbers, abs=1e-6, nan_ok=True)
    assert model.score_threshold == score  # that of the checkpoint


def test_safetensors_and_lightnings_own_verb_load_the_same_weights(model, best, tmp_path):
    assert run("export", "--ckpt_path", str(best), "--output", str(tmp_path)) == 0
    for module in (
        onestage.load(tmp_path / "model.safetensors", device="cpu").module,
        DetectionModule.load_from_checkpoint(best),
        DetectionModule.load_from_checkpoint(best, weights_only=True, strict=False),
        DetectionModule.load_from_checkpoint(best, detector=type(model.module.detector)(6), weights_only=True),
    ):
        weights = module.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.module.state_dict().items())


def test_training_by_plain_lightning_on_torch_data_sets(tmp_path):
    data = from_datasets(samples(4), samples(2), class_names=["cat", "dog"], image_size=64, batch_size=2, num_workers=0)
    module = DetectionModule(TinyDetector(num_classes=2))
    trainer = quiet_trainer(pl.Trainer, tmp_path, max_epochs=1, limit_val_batches=1.0, enable_checkpointing=True)
    trainer.fit(module, datamodule=data)
    assert "mAP" in module.metrics
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    model = onestage.load(checkpoint, detector=TinyDetector(num_classes=2), device="cpu")
    assert model.class_names == ("cat", "dog")
    assert isinstance(model.data.resize, Stretch)
    with pytest.raises(CheckpointError, match="holds no configuration"):
        onestage.load(checkpoint)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"got uint8 of shape \(4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "got torch.uint8"),
        ("missing.jpg", "missing.jpg"),
    ],
)
def test_other_images_are_refused_with_a_remedy(image, message):
    with pytest.raises(ImageError, match=rf"{message}[^\n]*\n\w"):
        to_rgb(image)


def test_pil_images_become_upright_rgb():
    image = Image.new("L", (4, 2), 7)
    assert to_rgb(image).tolist() == [[[7, 7, 7]] * 4] * 2
    image.getexif()[0x0112] = 6  # to be turned by 90 degrees
    assert to_rgb(image).shape == (4, 2, 3)


def test_train_is_fit_with_the_given_data(tmp_path):
    data = from_datasets(
        samples(4), samples(3), class_names=["cat", "dog"], image_size=256, batch_size=4, num_workers=0,
        resize=Letterbox(256),
    )  # fmt: skip
    config = REPOSITORY / "configs" / "shapes_ssd.yaml"
    result = onestage.train(
        config, data=data, max_epochs=np.int64(1), check_val_every_n_epoch=1, runs_dir=tmp_path, accelerator="cpu",
        drawn_images=1, channels_last=False, enable_progress_bar=False, logger="CSVLogger",
        optimizer=torch.optim.Adam,
    )  # fmt: skip
    assert result.folder == tmp_path / "shapes_ssd" / "version_0"
    assert (result.folder / "lightning_logs" / "version_0" / "metrics.csv").is_file()  # beside the run's own
    assert 0 <= result.metrics["mAP"] <= 1
    model = onestage.load(result.checkpoint, device="cpu")
    assert model.class_names == ("cat", "dog")
    assert isinstance(model.data.resize, Letterbox)  # of the data module, not of the configuration
    with pytest.raises(ConfigError, match="batch_size conflicts with a data module"):
        onestage.train(config, data=data, batch_size=2)
    with pytest.raises(ConfigError, match=r"EarlyStopping is an object, .*\nGive ..class_path"):
        onestage.train(config, data=data, callbacks=[pl.callbacks.EarlyStopping("val/mAP")])
    with pytest.raises(ConfigError, match="unknown key --epochs"):
        onestage.train(config, data=data, epochs=2)


@pytest.mark.slow
def test_the_examples_of_the_docs_run(best, drawn, photo, tmp_path, monkeypatch):
    checkpoint = tmp_path / "runs" / "shapes_ssd" / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(best)
    for name, target in {"mine": drawn, "photo.jpg": photo, "configs": REPOSITORY / "configs"}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["run"].folder == Path("runs/shapes_ssd/version_2")
    assert (tmp_path / "out.jpg").is_file()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((REPOSITORY / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["run"].metrics["mAP"] > 0.02
