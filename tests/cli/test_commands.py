"""The commands as a user types them, on a small drawn set."""

import csv
import json
import math
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from command_line import run

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


def test_results_and_tables_hold_finite_numbers_by_name(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["stage"] == "validate"
    assert {"mAP", "AP50", "AP75", "mAP_small", "mAP_medium", "mAP_large"} <= results["metrics"].keys()
    assert 0 <= results["metrics"]["mAP"] <= results["metrics"]["AP50"] <= 1
    assert set(results["per_class"]) == set(results["class_names"])
    assert results["seconds"] > 0
    assert results["images_per_second"] == pytest.approx(7 / results["seconds"])
    assert {"classes", "overall", "confusion", "error_types"} <= results.keys()
    best = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["onestage"]
    assert best["score_threshold"] == results["score_threshold"]
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


def test_test_command_with_a_checkpoint_alone_gives_the_numbers_of_the_run(trained, tmp_path, capsys):
    """So does `validate`: tests/deploy/test_export.py."""
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    assert run("test", "--ckpt_path", checkpoint, "--runs_dir", str(tmp_path), "--trainer.accelerator=cpu") == 0
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert last_line == f"results: {tmp_path / 'shapes_ssd' / 'version_0' / 'results.json'}"
    first = json.loads((trained / "results.json").read_text())
    second = json.loads(Path(last_line.removeprefix("results: ")).read_text())
    assert (first["metrics"], second["stage"]) == (second["metrics"], "test")


def test_predict_on_a_folder_writes_images_and_coco_results_in_original_pixels(trained, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    source = sorted((trained / "predictions").glob("*.jpg"))[0]
    image = cv2.resize(cv2.imread(str(source)), (640, 400))
    for name in ("a.jpg", "b.png"):
        cv2.imwrite(str(photos / name), image)
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    options = ["--data.predict_dir", str(photos), "--runs_dir", str(tmp_path / "runs"), "--trainer.accelerator=cpu"]
    assert run("predict", "--ckpt_path", checkpoint, *options) == 0
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert len(list((folder / "predictions").glob("*.jpg"))) == 2
    records = json.loads((folder / "predictions.json").read_text())
    assert records
    saved = torch.load(checkpoint, weights_only=True)["onestage"]
    assert {record["category_id"] for record in records} <= set(saved["category_ids"])
    assert {record["image_id"] for record in records} <= {1, 2}
    right = max(record["bbox"][0] + record["bbox"][2] for record in records)
    assert 160 < right <= 640.001  # not the network's 160 x 160
    assert all(math.isfinite(value) for record in records for value in record["bbox"])


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
    with pytest.warns(UserWarning, match=r"The first classification loss is .* per positive anchor"):
        assert run("fit", *fast_options, *options, "--model.detector.init_args.prior", "0.5") == 0
    assert f"the run: {tmp_path / 'shapes_ssd' / 'version_0'}" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_detector_trains_and_its_checkpoint_loads_uncompiled(fast_options, tmp_path):
    options = ["--model.compile", "true", "--trainer.limit_train_batches", "2", "--runs_dir", str(tmp_path)]
    assert run("fit", *fast_options, *options) == 0
    (best,) = tmp_path.glob("*/*/checkpoints/best.ckpt")
    names = torch.load(best, weights_only=True)["state_dict"]
    assert not [name for name in names if "_orig_mod" in name]
    again = ["--runs_dir", str(tmp_path / "again"), "--model.compile", "false"]
    assert run("validate", "--ckpt_path", str(best), *again) == 0
