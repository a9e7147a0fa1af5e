"""`--trainer.logger` and what a run logs besides metrics, by the command."""

import csv

import pytest
import yaml
from command_line import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")


def logged_run(fast_options, tmp_path, monkeypatch, *words: str):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["--trainer.limit_train_batches", "1", "--runs_dir", str(tmp_path / "runs")]
    assert run("fit", *fast_options, *options, *words) == 0
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    return folder


def test_tensorboard_has_images_curves_ap_of_each_class_and_final_metrics(trained):
    events = EventAccumulator(str(trained)).Reload()
    tags = events.Tags()
    assert {"pr_curves", "confusion"} < set(tags["images"])
    assert len([tag for tag in tags["images"] if tag.startswith("val/")]) == 3
    assert events.SummaryMetadata("val/all").plugin_data.plugin_name == "pr_curves"
    scalars = set(tags["scalars"])
    assert {"final/mAP", "final/AP50", "val/AP/triangle"} < scalars
    assert events.Scalars("final/mAP")[0].value == events.Scalars("val/mAP")[-1].value
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert not any("/AP/" in name for name in next(csv.reader((trained / "metrics.csv").open())))


@pytest.mark.slow
def test_user_loggers_are_added_to_the_files_of_the_run_also_on_a_resume(fast_options, tmp_path, monkeypatch, capsys):
    words = ("--trainer.logger", "[CSVLogger, TensorBoardLogger]", "--resume", "auto")
    folder = logged_run(fast_options, tmp_path, monkeypatch, *words)
    own = (folder / "metrics.csv").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"][0]["init_args"]["save_dir"] is None
    logged_run(fast_options, tmp_path, monkeypatch, *words)
    assert f"continuing {folder} from last.ckpt" in "".join(capsys.readouterr())
    assert (folder / "metrics.csv").read_text().startswith(own.splitlines()[0])
    places = [folder / "lightning_logs" / f"version_{version}" for version in range(4)]
    assert all((places[version] / "metrics.csv").is_file() for version in (0, 2))
    assert all(list(places[version].glob("events.*")) for version in (1, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of SQLAlchemy
def test_mlflow_gets_everything_in_a_database_of_the_run(fast_options, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='pip install "onestage[mlflow]"')
    folder = logged_run(fast_options, tmp_path, monkeypatch, "--trainer.logger", "MLFlowLogger")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("onestage").experiment_id])
    assert (found.info.run_name, found.info.status) == ("shapes_ssd/version_0", "FINISHED")
    assert found.data.params["model/detector/class_path"] == "onestage.models.SSD128"
    assert {"val/mAP", "train/loss"} < set(found.data.metrics)
    assert any(f"val/AP/{name}" in found.data.metrics for name in CLASSES)
    files = folder / "mlartifacts" / found.info.run_id / "artifacts"
    assert (files / "best.ckpt").read_bytes() == (folder / "checkpoints" / "best.ckpt").read_bytes()
    assert (files / "report.html").is_file()
    assert {"pr_curves.png", "confusion.png"} < {path.name for path in (files / "images").iterdir()}


@pytest.mark.slow
def test_wandb_gets_everything_in_the_folder_of_the_run(fast_options, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason='pip install "onestage[wandb]"')
    folder = logged_run(fast_options, tmp_path, monkeypatch, "--trainer.logger", "WandbLogger")
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()  # of protobuf, in which text is plain
    names = ("shapes_ssd/version_0", "onestage.models.SSD128", "val/mAP", "val/AP/", "report.html")
    for text in (*names, f"best-{log.stem[4:]}"):
        assert text.encode() in content, text
    pictures = {path.name.partition("_")[0] for path in log.parent.glob("files/media/images/*.png")}
    assert {"confusion", "pr"} <= pictures
    assert "Run history" not in capsys.readouterr().err
