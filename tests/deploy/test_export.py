"""Weights that are exported are those of the checkpoint, and are enough to predict with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file

from onestage.deploy.export import _default_folder


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    assert run("export", "--ckpt_path", checkpoint, "--format", "safetensors", "--output", str(folder)) == 0
    return folder / "model.safetensors"


def test_exported_weights_are_those_of_the_checkpoint_bit_for_bit(trained: Path, exported: Path) -> None:
    saved = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    weights = load_file(exported)
    assert weights.keys() == saved["state_dict"].keys()
    assert all(torch.equal(weights[name], saved["state_dict"][name]) for name in weights)
    description = json.loads(exported.with_suffix(".json").read_text())
    assert description["class_names"] == saved["onestage"]["class_names"]
    assert description["detector"] == "SSD160"
    assert exported.stat().st_size < (trained / "checkpoints" / "best.ckpt").stat().st_size / 2  # no optimizer in it


def test_exported_weights_validate_to_the_numbers_of_the_run(trained: Path, exported: Path, tmp_path: Path) -> None:
    options = ["--runs_dir", str(tmp_path), "--trainer.accelerator=cpu"]
    assert run("validate", "--ckpt_path", str(exported), *options) == 0
    (results,) = tmp_path.glob("*/*/results.json")
    first = json.loads((trained / "results.json").read_text())
    assert json.loads(results.read_text())["metrics"] == first["metrics"]


@pytest.mark.parametrize("damage", ["truncated", "no description", "another description"])
def test_exported_weights_that_are_damaged_are_named(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
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
    ("options", "named"),
    [([], "--ckpt_path"), (["--ckpt_path", "x.ckpt", "--format", "pickle"], "pickle"), (["--ckpt_path", "x"], "exist")],
)
def test_an_export_that_cannot_be_says_why(capsys: pytest.CaptureFixture[str], options: list[str], named: str) -> None:
    assert run("export", *options) == 2
    assert named in capsys.readouterr().err


def test_an_export_goes_into_the_run_or_where_there_is_none_beside_the_file(trained: Path, tmp_path: Path) -> None:
    for file in ("run/checkpoints/best.ckpt", "downloads/best.ckpt"):
        copy = tmp_path / file
        copy.parent.mkdir(parents=True)
        shutil.copy(trained / "checkpoints" / "best.ckpt", copy)
        assert run("export", "--ckpt_path", str(copy)) == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert written == ["downloads/export/model.safetensors", "run/export/model.safetensors"]


def test_a_file_in_the_root_folder_has_a_default_folder_too() -> None:
    assert _default_folder(Path("/best.ckpt")) == Path("/export")


def test_exporting_an_unreadable_path_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("export", "--ckpt_path", str(tmp_path / ("x" * 300))) == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err
