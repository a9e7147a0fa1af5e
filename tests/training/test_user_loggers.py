"""What the loggers of the user are given, with stand-ins for the services."""

import json
import logging
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, WandbLogger
from PIL import Image

from onestage.errors import ConfigError
from onestage.training import loggers
from onestage.training.loggers import ended_with_the_command, log_file, log_image, start_loggers

LOGGERS = "lightning.pytorch.loggers."
ID = "0" * 32


class Recorded:
    """Note every call of any method."""

    def __init__(self) -> None:
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def stand_in(kind: type[Logger]) -> Logger:
    """Return a logger of a kind without its service."""

    class StandIn(kind):
        version, run_id, name, log_dir, save_dir, experiment = ID, ID, "any", None, None, Recorded()

        def __init__(self) -> None:
            pass

        def log_metrics(self, metrics, step=None) -> None:
            raise OSError("server away")

        log_image = log_hyperparams = save = finalize = after_save_checkpoint = log_metrics

    return StandIn()


def started(kind: str, folder, **init_args):
    """Return the arguments that a logger is made of, and the logger."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, made = SimpleNamespace(class_path=LOGGERS + kind, init_args=dict(init_args)), []
    begun = start_loggers([spec], folder, lambda spec: made.append(spec) or stand_in(getattr(loggers, kind)))
    return made[0].init_args, begun[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "COMET_PROJECT_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    loggers._warned.clear()
    return tmp_path / "shapes_ssd" / "version_3"


def test_trackers_get_folder_project_and_name_of_the_run_and_its_id_on_a_resume(folder):
    name, place = "shapes_ssd/version_3", str(folder)
    wandb = {"save_dir": place, "name": name, "project": "onestage", "version": None}
    assert started("WandbLogger", folder, save_dir=".", name=None)[0] == wandb
    assert started("WandbLogger", folder)[0]["version"] == ID  # the second start in this folder continues
    comet = {"offline_directory": place, "name": name, "project": "onestage", "experiment_key": None}
    assert started("CometLogger", folder)[0] == comet
    mlflow = started("MLFlowLogger", folder, save_dir="./mlruns", experiment_name="lightning_logs")[0]
    assert (mlflow["run_name"], mlflow["experiment_name"]) == (name, "onestage")
    assert mlflow["tracking_uri"] == f"sqlite:///{folder}/mlflow.db"
    assert mlflow["artifact_location"] == (folder / "mlartifacts").as_uri()


def test_what_the_user_has_set_stays(folder, monkeypatch):
    given = {"name": "mine", "project": "birds", "save_dir": "logs", "version": "abc"}
    assert started("WandbLogger", folder, **given)[0] == given
    monkeypatch.setenv("WANDB_PROJECT", "cats")
    assert started("WandbLogger", folder)[0]["project"] == "cats"
    server = {"tracking_uri": "http://localhost:5000"}
    assert "artifact_location" not in started("MLFlowLogger", folder, **server)[0]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("WandbLogger", ModuleNotFoundError("wandb"), r'not installed.\nInstall it: pip install "onestage\[wandb\]"$'),
        ("MLFlowLogger", ModuleNotFoundError("mlflow"), r'pip install "onestage\[mlflow\]"$'),
        ("WandbLogger", RuntimeError("No API key\nlong story"), r"cannot start: No API key\nRun `wandb login` once"),
    ],
)
def test_logger_that_cannot_start_is_one_message_with_a_remedy(folder, kind, error, message):
    with pytest.raises(ConfigError, match=message):
        start_loggers([SimpleNamespace(class_path=LOGGERS + kind, init_args={})], folder, Mock(side_effect=error))


def test_logger_that_would_write_over_the_run_is_refused(folder):
    spec = SimpleNamespace(class_path=LOGGERS + "CSVLogger", init_args={"name": "", "version": ""})
    with pytest.raises(ConfigError, match=r"would overwrite the run's own files in .*\nLeave out its save_dir"):
        start_loggers([spec], folder, lambda spec: CSVLogger(**spec.init_args))


def test_logger_that_fails_after_the_start_warns_once_and_the_run_continues(folder, caplog):
    logger = started("WandbLogger", folder)[1]
    with caplog.at_level(logging.WARNING, logger="onestage.training.loggers"):
        logger.log_metrics({"a": 1.0}, 1)
        logger.save()
    assert caplog.messages == ["WandbLogger cannot be written (server away); the run continues without."]
    assert json.loads((folder / "loggers.json").read_text()) == {f"0 {LOGGERS}WandbLogger": ID}


def test_pictures_files_and_the_end_reach_comet_and_mlflow(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)
    comet, mlflow, wandb = stand_in(CometLogger), stand_in(MLFlowLogger), stand_in(WandbLogger)
    for logger in (comet, mlflow):
        log_image(logger, "val/a", file, 7)
        log_file(logger, file)
    with pytest.raises(KeyError), ended_with_the_command([comet, mlflow, wandb]):
        raise KeyError
    path = str(file)
    assert comet.experiment.calls == [("log_image", path, "val/a", 7), ("log_asset", path, "a.png"), ("end",)]
    assert mlflow.experiment.calls == [("log_artifact", ID, path, "images"), ("log_artifact", ID, path)]
    assert wandb.experiment.calls == [("finish", 1)]  # the exit code
