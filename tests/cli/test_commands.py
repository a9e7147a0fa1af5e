"""The commands as a user types them, on a small drawn set."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from broken_files import BROKEN, encoded, tear_huffman_table, write_broken
from command_line import message_of, run, run_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onestage.evaluation.coco import METRIC_NAMES


def test_run_folder_holds_the_documented_files(trained):
    tables, pictures = "config.yaml metrics.csv results.json", "confusion.png pr_curves.png curves.png labels.png"
    expected = {"checkpoints", "predictions", "train_batch.jpg", *tables.split(), *pictures.split()}
    assert expected <= {path.name for path in trained.iterdir()}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list(trained.glob("events.out.tfevents.*")) and not (trained / "hparams.yaml").exists()
    assert len(list((trained / "predictions").glob("*.jpg"))) == 3
    for path in (trained / "checkpoints").iterdir():
        saved = torch.load(path, weights_only=True)["onestage"]
        assert saved["class_names"] and yaml.safe_load(yaml.safe_dump(saved)) == saved  # only primitives


def test_results_and_tables_hold_finite_numbers_by_name(trained, best):
    results = json.loads((trained / "results.json").read_text())
    assert results["stage"] == "validate"
    assert {"mAP", "AP50", "AP75", "mAP_small", "mAP_medium", "mAP_large"} <= results["metrics"].keys()
    assert 0 <= results["metrics"]["mAP"] <= results["metrics"]["AP50"] <= 1
    assert set(results["per_class"]) == set(results["class_names"])
    assert results["seconds"] > 0
    assert results["images_per_second"] == pytest.approx(7 / results["seconds"])
    assert {"classes", "overall", "confusion", "error_types"} <= results.keys()
    saved = torch.load(best, weights_only=True)["onestage"]
    assert saved["score_threshold"] == results["score_threshold"]
    assert torch.__version__.startswith(results["versions"]["torch"])
    header = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/classification_loss", "train/box_loss", "val/mAP", "val/loss"} <= set(header)
    (row,) = csv.DictReader((trained / "epochs.csv").open())
    assert set(METRIC_NAMES) <= {name.removeprefix("val/") for name in row}
    assert (row["epoch"], row["step"]) == ("1", "4") and float(row["train/box_loss"]) > 0 and float(row["lr"]) > 0


def test_saved_config_repeats_the_run_exactly(trained, tmp_path):
    assert run("fit", "--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path)) == 0
    (again,) = tmp_path.glob("shapes_ssd/version_0")
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (trained, again))
    assert first["metrics"] == second["metrics"]
    paths = [folder / "checkpoints" / "best.ckpt" for folder in (trained, again)]
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_test_command_with_a_checkpoint_alone_gives_the_numbers_of_the_run(trained, best, tmp_path, capsys):
    """So does `validate`: tests/deploy/test_export.py."""
    path = run_on(best, "test", tmp_path) / "results.json"
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"results: {path}"
    first, second = (json.loads(file.read_text()) for file in (trained / "results.json", path))
    assert (first["metrics"], second["stage"]) == (second["metrics"], "test")


def test_run_shorter_than_its_validation_interval_without_checkpoints_is_evaluated(fast_options, tmp_path, capsys):
    options = ["--trainer.check_val_every_n_epoch", "5", "--drawn_images", "0", "--trainer.limit_train_batches", "1"]
    options += ["--trainer.enable_checkpointing", "false", "--anchor_statistics", "false", "--runs_dir", str(tmp_path)]
    assert run("fit", *fast_options, *options) == 0
    folder = tmp_path / "shapes_ssd" / "version_0"
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"results: {folder / 'results.json'}"
    assert not list(folder.rglob("*.ckpt"))
    assert "anchors/" not in (folder / "metrics.csv").read_text()


def test_run_without_validation_prints_its_folder_and_a_missing_prior_warns(fast_options, tmp_path, capsys):
    options = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "0", "--runs_dir", str(tmp_path)]
    options += ["--trainer.log_every_n_steps", "0"]  # never
    with pytest.warns(UserWarning, match=r"The first classification loss is .* per positive anchor"):
        assert run("fit", *fast_options, *options, "--model.detector.init_args.prior", "0.5") == 0
    assert f"the run: {tmp_path / 'shapes_ssd' / 'version_0'}" in capsys.readouterr().out


def test_predict_writes_all_good_images_and_names_all_broken_ones(best, tmp_path, capsys):
    photos = tmp_path / "photos"
    for name in ("cam1/0001.jpg", "cam2/0001.jpg", "cam2/one.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(encoded("PNG" if name.endswith("png") else "JPEG"))
    for name in BROKEN:
        write_broken(photos / name)
    options = ("--data.predict_dir", str(photos), "--data.batch_size", "4")
    folder = run_on(best, "predict", tmp_path / "runs", *options, code=3)
    message = capsys.readouterr().err
    assert f"error: {photos}: {len(BROKEN)} of {len(BROKEN) + 3} images cannot be read" in message
    assert "Traceback" not in message
    assert len(list((folder / "predictions").glob("*.jpg"))) == 3
    images = {entry["file_name"]: entry for entry in json.loads((folder / "images.json").read_text())}
    records = json.loads((folder / "predictions.json").read_text())
    good = {"cam1/0001.jpg", "cam2/0001.jpg", "cam2/one.png"}
    assert {name for name, entry in images.items() if "detections" in entry} == good
    regular = {name for name in BROKEN if (photos / name).is_file()}
    assert {name for name, entry in images.items() if "error" in entry} == regular
    for name in good:
        found = [record for record in records if record["file_name"] == name]
        assert len(found) == images[name]["detections"]
        assert {record["image_id"] for record in found} <= {images[name]["id"]}


def test_validate_evaluates_the_others_and_names_the_damaged_image(best, drawn, tmp_path, capsys):
    data = shutil.copytree(drawn, tmp_path / "data")
    tear_huffman_table(data / "JPEGImages" / "000035.jpg")  # of the seven for validation
    folder = run_on(best, "validate", tmp_path, "--data.path", str(data), "--data.source", "null", code=3)
    output = capsys.readouterr()
    assert "1 of 7 images cannot be read" in output.err
    assert "000035.jpg" in output.err
    assert "results: " in output.out
    assert json.loads((folder / "results.json").read_text())["metrics"]["AR100"] is not None


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_every_logged_step_has_anchor_statistics_that_add_up(trained):
    events = EventAccumulator(str(trained)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("anchors/")]
    steps = list(zip(*(events.Scalars(tag) for tag in tags), strict=True))
    assert len(steps) == 4  # of 8 images each
    for step in steps:
        value = {tag: event.value for tag, event in zip(tags, step, strict=True)}
        counts = [value[f"anchors/{name}"] for name in ("positives", "negatives", "ignored")]
        assert sum(counts) == 8 * 1344
        levels = [f"anchors/stride_{stride}/" for stride in (8, 16, 32)]
        for name, total in (("positives", counts[0]), ("negatives", counts[1])):
            assert sum(value[level + name] for level in levels) == total
        shares = [value[f"anchors/loss_of_{part}"] for part in ("positives", "easy_negatives", "hard_negatives")]
        assert sum(shares) == pytest.approx(1, rel=1e-5)
        assert 0 < value["anchors/p_t_of_positives"] < 1
    assert not [name for name in rows_of(trained)[0] if name.startswith("anchors/")]
    assert all(float(row["train/gradient_norm"]) > 0 for row in rows_of(trained) if row["train/loss"])


def test_overflowing_learning_rate_ends_with_code_6_and_a_diagnosis(fast_options, tmp_path, capsys):
    options = ["--model.optimizer.lr", "1e30", "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"]
    options += ["--trainer.precision=32-true", "--runs_dir", str(tmp_path)]
    message = message_of(capsys, "fit", *fast_options, *options, code=6)
    assert "error: training ends at step 4 of epoch 1: loss or gradient was not finite 4 times in a row." in message
    assert "Lower model.optimizer.init_args.lr, or lengthen model.schedule.warmup_steps." in message
    (folder,) = tmp_path.glob("shapes_ssd/version_0")
    assert str(folder / "skipped_steps.json") in message
    diagnosis = json.loads((folder / "skipped_steps.json").read_text())
    (process,) = diagnosis["latest"][-1]["processes"]
    assert len(process["images"]) == 8
    assert Path(process["images"][0]["file"]).is_file()
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)  # of the first epoch's end
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint["state_dict"].values())


def test_losses_command_writes_table_and_plot_of_a_split_and_checks_its_options(trained, best, tmp_path, capsys):
    folder = run_on(best, "losses", tmp_path, "--split", "test")
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"results: {folder / 'losses.csv'}"
    assert [line.split()[0] for line in printed[-6:-1]] == ["0", "0.5", "1", "2", "5"]
    assert (folder / "losses.png").is_file()
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    assert {row["group"] for row in rows} == {"positives", "negatives"}
    assert not (folder / "results.json").exists()
    words = ("losses", "--runs_dir", str(tmp_path))
    assert "gammas" in message_of(capsys, *words, "--ckpt_path", str(best), "--gammas", "[-1]")
    assert "--ckpt_path" in message_of(capsys, *words, "--config", str(trained / "config.yaml"))


@pytest.mark.slow
def test_compiled_detector_trains_and_its_checkpoint_loads_uncompiled(fast_options, tmp_path):
    options = ["--model.compile", "true", "--trainer.limit_train_batches", "2", "--runs_dir", str(tmp_path)]
    assert run("fit", *fast_options, *options) == 0
    (best,) = tmp_path.glob("*/*/checkpoints/best.ckpt")
    names = torch.load(best, weights_only=True)["state_dict"]
    assert not [name for name in names if "_orig_mod" in name]
    again = ["--runs_dir", str(tmp_path / "again"), "--model.compile", "false"]
    assert run("validate", "--ckpt_path", str(best), *again) == 0


# `--trainer.logger` and what a run logs besides metrics

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
    assert {one.step for one in events.Scalars("val/AP/triangle")} == {one.step for one in events.Scalars("val/mAP")}
    logged = events.Scalars("val/mAP")
    assert [one.step for one in logged] == sorted({one.step for one in logged})  # each validation of the training once
    assert events.Scalars("final/mAP")[0].value == max(one.value for one in logged)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert not any("/AP/" in name for name in next(csv.reader((trained / "metrics.csv").open())))


@pytest.mark.slow
def test_user_loggers_are_added_to_the_files_of_the_run_also_on_a_resume(fast_options, tmp_path, monkeypatch, capsys):
    words = ("--trainer.logger", "[CSVLogger, TensorBoardLogger]", "--resume", "auto")
    folder = logged_run(fast_options, tmp_path, monkeypatch, *words)
    own = (folder / "metrics.csv").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["logger"][0]["init_args"]["save_dir"] is None
    logged_run(fast_options, tmp_path, monkeypatch, *words, "--trainer.max_epochs", "2")
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
