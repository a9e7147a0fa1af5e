"""The configuration inside a checkpoint is data: no value in it imports or calls anything."""

import json
import sys
from pathlib import Path

import pytest
from checkpoint_files import DETECTOR, SOURCE, changed, contents, write
from command_line import message_of, run

from onestage.errors import CheckpointError
from onestage.reliability.stored_config import config_of, foreign_classes


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that payloads would create: `import evil` and `evil.Model` in every form."""
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil.Model\n")
    (tmp_path / "evil").write_text("class_path: evil.Model\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("evil", None)
    return tmp_path / "canary"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError, match=r"If you trust the file|holds no configuration") as stopped:
        config_of(path)
    return str(stopped.value)


def test_stored_config_keeps_what_evaluation_needs_and_drops_the_rest(tmp_path):
    config = config_of(write(tmp_path / "a.ckpt"))
    assert config["model"].keys() == {"detector", "loss_weights"}
    assert config["data"].keys() == {"source", "image_size", "batch_size", "class_names", "category_ids"}
    assert config["data"]["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("key", ["pretrained", "backbone_weights"])
def test_weights_are_not_downloaded_again(tmp_path, key):
    path = write(tmp_path / "a.ckpt", changed(f"{DETECTOR}.{key}", "torchvision_coco"))
    assert config_of(path)["model"]["detector"]["init_args"][key] is None


BY_HAND = {"class_path": "onestage.losses.ClassWeights", "init_args": {"weights": [1.0, 2.0, 3.0]}}
BY_COUNT = {"class_path": "onestage.losses.EffectiveNumberWeights"}


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], BY_HAND, BY_COUNT])
def test_detector_with_class_weights_is_accepted_with_them(tmp_path, weights):
    loss = {"class_path": "onestage.losses.SigmoidFocalLoss", "init_args": {"class_weights": weights}}
    path = write(tmp_path / "a.ckpt", changed(f"{DETECTOR}.classification_loss", loss))
    kept = config_of(path)["model"]["detector"]["init_args"]["classification_loss"]["init_args"]["class_weights"]
    assert kept == weights


FOREIGN = ["evil.Model", "os.system", "torch.hub.load", "builtins.exec", "onestage_evil.Model", "torch.nn.Linear"]
WRONG_KIND = [
    "onestage.cli.main.main", "onestage.files.atomic_write", "onestage.models.vgg.VGG", "onestage.data.COCO",
    "onestage.losses.focal.F.softplus", "albumentations.HorizontalFlip", "albumentations.from_dict",
]  # fmt: skip


CLASS_PLACES = [
    "onestage.config.model.detector", f"{DETECTOR}.classification_loss", f"{DETECTOR}.box_loss",
    f"{DETECTOR}.backbone", f"{DETECTOR}.anchors", "onestage.config.data", "onestage.config.data.source",
    "onestage.config.data.resize",
]  # fmt: skip
CLASS_TEXTS = [
    "evil.Model", " evil.Model\n", "{class_path: evil.Model}", "class_path: evil.Model\ninit_args: {}\n",
    '{"class_path": "evil.Model"}', "[{class_path: evil.Model}]", "evil.yaml", "evil",
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[("onestage.config.model.detector.class_path", name) for name in FOREIGN + WRONG_KIND],
        *[(place, text) for place in CLASS_PLACES for text in CLASS_TEXTS],  # the parser would import and call it
        ("onestage.config.model.detector.dict_kwargs", {"box_loss": "evil.Model"}),
        ("onestage.config.model.detector.class_path", "onestage.models.SSD160\n"),
        (f"{DETECTOR}.unknown", 1),
        (f"{DETECTOR}.classification_loss.init_args.class_weights", "evil.Model"),
        (f"{DETECTOR}.classification_loss.init_args.alpha", {"class_path": "evil.Model"}),
        (f"{DETECTOR}.box_loss", {"class_path": "onestage.losses.SigmoidFocalLoss"}),
        (f"{DETECTOR}.anchors", [{"class_path": "evil.Model"}]),
        (f"{SOURCE}.path", {"class_path": "evil.Model"}),
        (f"{SOURCE}.num_val", 10**9),
        ("onestage.config.data.image_size", 10**6),
        ("onestage.config.data.batch_size", 10**9),
        ("onestage.class_names", ["x"] * 30_000),
        ("onestage.class_names", ["a", "b", "\x1b[31mred"]),
        ("onestage.config", None),
    ],
)
def test_value_that_fit_does_not_store_is_refused(canary, place, value):
    path = write(canary.with_name("a.ckpt"), changed(place, value))
    message = refused(path)
    if value in FOREIGN + WRONG_KIND and place.endswith("detector.class_path"):
        assert repr(value) in message
        assert run("validate", "--ckpt_path", str(path)) == 2
    assert not canary.exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("onestage.config.model.optimizer", {"class_path": "evil.Model"}),
        ("onestage.config.model", {**contents()["onestage"]["config"]["model"], "detector.class_path": "evil.Model"}),
        ("onestage.config.data.train_transforms", ["evil.Model"]),
        ("onestage.config.trainer", {"callbacks": "evil.Model"}),
        ("hyper_parameters", {"_instantiator": "evil.make", "_class_path": "evil.Model"}),
    ],
)
def test_value_that_only_training_needs_is_not_read(canary, place, value):
    path = write(canary.with_name("a.ckpt"), changed(place, value))
    assert "evil" not in json.dumps(config_of(path))
    assert "num_workers" not in config_of(path)["data"]
    shared = canary.with_name("shared")
    assert run("export", "--ckpt_path", str(path), "--output", str(shared)) == 0
    assert "evil" not in (shared / "model.json").read_text()
    assert not canary.exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "losses", "export"])
def test_no_command_imports_what_a_checkpoint_names(canary, capsys, command):
    saved = changed(f"{DETECTOR}.classification_loss", "{class_path: evil.Model}")
    path = write(canary.with_name("a.ckpt"), saved)
    assert run(command, "--ckpt_path", str(path)) == 2
    problem = "has '{class_path: evil.Model}' as model.detector.init_args.classification_loss"
    assert f"checkpoint {path} {problem}" in capsys.readouterr().err
    assert not canary.exists()


def test_description_beside_exported_weights_is_checked_too(canary, capsys):
    shared = canary.with_name("shared")
    assert run("export", "--ckpt_path", str(write(canary.with_name("a.ckpt"))), "--output", str(shared)) == 0
    description = json.loads((shared / "model.json").read_text())
    description["config"]["model"]["detector"]["init_args"]["box_loss"] = {"class_path": "evil.Model"}
    (shared / "model.json").write_text(json.dumps(description))
    assert "box_loss.class_path" in message_of(capsys, "validate", "--ckpt_path", str(shared / "model.safetensors"))
    assert not canary.exists()


def test_detector_of_the_user_is_exported_with_a_notice_and_not_loaded(canary, capsys):
    path = write(canary.with_name("a.ckpt"), changed("onestage.config.model.detector.class_path", "mine.Detector"))
    assert str(foreign_classes(path)).startswith("it names mine.Detector, not in onestage.models")
    assert run("export", "--ckpt_path", str(path), "--output", str(canary.with_name("shared"))) == 0
    assert "Share the run's config.yaml" in capsys.readouterr().out
    assert "mine.Detector" in refused(path)


def test_text_that_looks_like_a_class_is_kept_where_text_belongs(tmp_path):
    saved = changed(f"{SOURCE}.path", "evil.Model")
    names = ["a: b", "[x]", "{class_path: evil.Model}", "evil.Model", "null", "1", "instances.json"]
    saved["onestage"] |= {"class_names": names, "category_ids": list(range(7))}
    config = config_of(write(tmp_path / "a.ckpt", saved))
    assert config["data"]["class_names"] == names
    assert config["data"]["source"]["init_args"]["path"] == "evil.Model"
    assert foreign_classes(tmp_path / "a.ckpt") is None
