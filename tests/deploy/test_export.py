"""Exported weights equal the checkpoint's and are enough to predict with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    assert run("export", "--ckpt_path", checkpoint, "--format", "safetensors", "--output", str(folder)) == 0
    return folder / "model.safetensors"


def test_exported_weights_equal_the_checkpoint_bit_for_bit(trained, exported):
    saved = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    weights = load_file(exported)
    assert weights.keys() == saved["state_dict"].keys()
    assert all(torch.equal(weights[name], saved["state_dict"][name]) for name in weights)
    description = json.loads(exported.with_suffix(".json").read_text())
    assert description["class_names"] == saved["onestage"]["class_names"]
    assert description["detector"] == "SSD128"
    assert exported.stat().st_size < (trained / "checkpoints" / "best.ckpt").stat().st_size / 2  # no optimizer in it


def test_validating_exported_weights_reproduces_the_metrics_of_the_run(trained, exported, tmp_path):
    options = ["--runs_dir", str(tmp_path), "--trainer.accelerator=cpu"]
    assert run("validate", "--ckpt_path", str(exported), *options) == 0
    (results,) = tmp_path.glob("*/*/results.json")
    first = json.loads((trained / "results.json").read_text())
    again = json.loads(results.read_text())
    assert (again["metrics"], again["stage"]) == (first["metrics"], "validate")


@pytest.mark.parametrize("damage", ["truncated", "no description", "another description"])
def test_damaged_export_is_named_with_the_command_that_writes_it(exported, tmp_path, capsys, damage):
    copy = tmp_path / "model.safetensors"
    content = exported.read_bytes()
    copy.write_bytes(content[:1000] if damage == "truncated" else content)
    if damage != "no description":
        description = exported.with_suffix(".json").read_text() if damage == "truncated" else "{}"
        copy.with_suffix(".json").write_text(description)
    assert run("validate", "--ckpt_path", str(copy)) == 2
    message = capsys.readouterr().err
    assert str(copy.with_suffix("")) in message
    assert "onestage export" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "ckpt_path"),
        (["--ckpt_path", "x.ckpt", "--format", "pickle"], "pickle"),
        (["--ckpt_path", "x"], "does not exist"),
    ],
)
def test_impossible_export_ends_with_one_message(capsys, options, message):
    assert run("export", *options) == 2
    assert message in capsys.readouterr().err


def test_default_folder_is_in_the_run_or_beside_the_file(trained, tmp_path):
    for place, expected in (("run/checkpoints", "run/export"), ("downloads", "downloads/export")):
        (tmp_path / place).mkdir(parents=True)
        copy = shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / place)
        assert run("export", "--ckpt_path", str(copy)) == 0
        assert (tmp_path / expected / "model.safetensors").is_file()
