"""Every shipped configuration parses, and builds the data module and the detector it names."""

import re
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Checkpoint

from onestage.cli.commands import DetectionCLI
from onestage.losses import ClassificationLoss
from onestage.reliability.add_on import Reliability
from onestage.training.ema import ExponentialMovingAverage
from onestage.types import DetectionData, Detector

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OVERLAYS = [CONFIGS / "quick.yaml", *sorted((CONFIGS / "compare").glob("*.yaml"))]  # each is laid over an experiment
EXPERIMENTS = sorted({*CONFIGS.glob("*.yaml")} - {*OVERLAYS, CONFIGS / "trainer.yaml"})
LOSSES = OVERLAYS[1:]


class Built(DetectionCLI):
    """The command line up to the point where Lightning would start."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(options: list[str], tmp_path: Path, command: str = "fit") -> Built:
    options = [*options, "--runs_dir", str(tmp_path / "runs"), "--trainer.accelerator", "cpu"]
    return Built(command, [*options, "--model.channels_last", "false"], Reliability(), None)  # auto would time it


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_builds_without_its_data_or_weights(config, tmp_path) -> None:
    offline = tmp_path / config.name
    offline.write_text(config.read_text().replace(", weights: IMAGENET1K_V1", ""))
    options = ["--config", str(offline), '--data.class_names=["a","b","c"]', "--data.category_ids=[1,5,7]"]
    if "backbone_weights" in config.read_text():
        options.append("--model.detector.backbone_weights=null")  # no network in a test
    with torch.device("meta"):  # 62 million random numbers take seconds
        built = build(options, tmp_path)
    assert isinstance(built.model.detector, Detector)
    assert isinstance(built.datamodule, DetectionData)
    assert built.model.detector.num_classes == 3
    for canvas in built.datamodule.canvases:
        built.model.detector.require_canvas(canvas)
    assert built.run_folder.parent.name == config.stem


@pytest.mark.parametrize("loss", LOSSES, ids=lambda path: path.stem)
def test_every_loss_overlay_names_all_arguments_and_builds_over_an_experiment(loss, tmp_path) -> None:
    written = yaml.safe_load(loss.read_text())["model"]["detector"]["init_args"]["classification_loss"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ClassificationLoss, "loss")
    built = parser.instantiate(parser.parse_object({"loss": written})).loss
    if loss.stem == "mining":  # one of them over an experiment
        options = ["--config", str(CONFIGS / "shapes_ssd.yaml"), "--config", str(loss)]
        built = build(options, tmp_path).model.detector.classification_loss
    assert f"onestage.losses.{type(built).__name__}" == written["class_path"]
    assert written["init_args"].keys() == signature(type(built)).parameters.keys()
    for name, value in written["init_args"].items():
        if name != "class_weights":
            assert getattr(built, name) == value
    assert (built.class_weights is None) == (written["init_args"]["class_weights"] is None)


@pytest.mark.parametrize("config", EXPERIMENTS + OVERLAYS, ids=lambda path: path.stem)
def test_every_config_header_has_its_command(config) -> None:
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 2
    command = rf"# onestage fit --config.*configs/{re.escape(str(config.relative_to(CONFIGS)))}"
    assert any(re.search(command, line) for line in header)


def test_every_command_reads_the_shared_configuration(tmp_path) -> None:
    shared = yaml.safe_load((CONFIGS / "trainer.yaml").read_text())
    built = build(["--config", str(CONFIGS / "shapes_ssd.yaml")], tmp_path, "predict")  # `fit` too, see above
    assert built.settings.trainer.gradient_clip_val == shared["trainer"]["gradient_clip_val"]
    assert built.settings.seed_everything == shared["seed_everything"]


def test_keys_can_be_overridden_on_the_command_line_and_the_average_precedes_every_checkpoint(tmp_path) -> None:
    typed = {
        "model.detector.prior": 0.02, "model.detector.classification_loss.gamma": 1.5, "model.optimizer.lr": 0.5,
        "model.schedule.warmup_steps": 3, "data.batch_size": 5, "trainer.max_epochs": 2, "seed_everything": 7,
        "best_checkpoint.monitor": "val/AP50", "experiment": "mine", "ema.decay": 0.99,
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in typed.items()]
    built = build(["--config", str(CONFIGS / "shapes_ssd.yaml"), *options], tmp_path)
    assert built.model.detector.classification_loss.gamma == 1.5
    assert built.model.schedule.warmup_steps == 3
    assert (built.datamodule.batch_size, built.datamodule.seed) == (5, 7)
    assert built.trainer.max_epochs == 2
    assert built.run_folder.parent.name == "mine"
    assert any(getattr(callback, "monitor", None) == "val/AP50" for callback in built.trainer.callbacks)
    kinds = [type(callback) for callback in built.trainer.callbacks]
    average = kinds.index(ExponentialMovingAverage)
    assert built.trainer.callbacks[average].decay == 0.99
    checkpoints = [position for position, kind in enumerate(kinds) if issubclass(kind, Checkpoint)]
    assert len(checkpoints) >= 2 and average < min(checkpoints)  # which save the average


def test_limit_of_one_batch_is_not_all_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(DetectionCLI, "instantiate_classes", lambda self: None)
    typed = {"limit_train_batches": 1, "limit_val_batches": 1.0, "overfit_batches": 0.5, "val_check_interval": 1}
    options = [f"--trainer.{key}={value}" for key, value in typed.items()]
    settings = build(["--config", str(CONFIGS / "shapes_ssd.yaml"), *options], tmp_path).settings.trainer
    assert [type(settings[key]) for key in typed] == [*map(type, typed.values())]
