"""What a run tells about its loss, and what it does when the loss is not finite, by the commands a user types."""

import csv
import json
from pathlib import Path

import pytest
import torch
from command_line import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


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
    options = ["--model.optimizer.lr", "1e30", "--trainer.max_epochs", "2", "--runs_dir", str(tmp_path)]
    assert run("fit", *fast_options, *options, "--trainer.limit_val_batches", "0", "--trainer.precision=32-true") == 6
    message = capsys.readouterr().err
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


def test_losses_command_writes_table_and_plot_of_a_split_and_checks_its_gammas_and_weights(trained, tmp_path, capsys):
    words = ["--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--runs_dir", str(tmp_path)]
    assert run("losses", *words, "--split", "test", "--trainer.accelerator=cpu") == 0
    (folder,) = tmp_path.glob("shapes_ssd/version_0")
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == f"results: {folder / 'losses.csv'}"
    assert [line.split()[0] for line in printed[-6:-1]] == ["0", "0.5", "1", "2", "5"]
    assert (folder / "losses.png").is_file()
    rows = list(csv.DictReader((folder / "losses.csv").open()))
    assert {row["group"] for row in rows} == {"positives", "negatives"}
    assert not (folder / "results.json").exists()
    assert run("losses", *words, "--trainer.accelerator=cpu", "--gammas", "[-1]") == 2
    assert "gammas" in capsys.readouterr().err
    assert run("losses", "--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path)) == 2
    assert "--ckpt_path" in capsys.readouterr().err
