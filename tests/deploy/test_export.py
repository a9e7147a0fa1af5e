"""Exported weights equal the checkpoint's and are enough to predict with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import message_of, run, run_on
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def exported(best: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    assert run("export", "--ckpt_path", str(best), "--format", "safetensors", "--output", str(folder)) == 0
    return folder / "model.safetensors"


def test_exported_weights_equal_the_checkpoint_bit_for_bit(best, exported):
    saved = torch.load(best, weights_only=True)
    weights = load_file(exported)
    assert weights.keys() == saved["state_dict"].keys()
    assert all(torch.equal(weights[name], saved["state_dict"][name]) for name in weights)
    description = json.loads(exported.with_suffix(".json").read_text())
    assert description["class_names"] == saved["onestage"]["class_names"]
    assert description["detector"] == "SSD128"
    assert exported.stat().st_size < best.stat().st_size / 2  # no optimizer in it


def test_validating_exported_weights_reproduces_the_metrics_of_the_run(trained, exported, tmp_path):
    folders = (trained, run_on(exported, "validate", tmp_path))
    first, again = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert (again["metrics"], again["stage"]) == (first["metrics"], "validate")


@pytest.mark.parametrize("damage", ["truncated", "no description", "another description"])
def test_damaged_export_is_named_with_the_command_that_writes_it(exported, tmp_path, capsys, damage):
    copy = tmp_path / "model.safetensors"
    content = exported.read_bytes()
    copy.write_bytes(content[:1000] if damage == "truncated" else content)
    if damage != "no description":
        description = exported.with_suffix(".json").read_text() if damage == "truncated" else "{}"
        copy.with_suffix(".json").write_text(description)
    message = message_of(capsys, "validate", "--ckpt_path", str(copy))
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
    assert message in message_of(capsys, "export", *options)


def test_default_folder_is_in_the_run_or_beside_the_file(best, tmp_path):
    for place, expected in (("run/checkpoints", "run/export"), ("downloads", "downloads/export")):
        (tmp_path / place).mkdir(parents=True)
        copy = shutil.copy(best, tmp_path / place)
        assert run("export", "--ckpt_path", str(copy)) == 0
        assert (tmp_path / expected / "model.safetensors").is_file()
