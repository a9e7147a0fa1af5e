"""Checkpoints that are damaged, foreign or hostile: named, refused, and never run."""

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from onestage.errors import CheckpointError
from onestage.training.checkpoint_files import config_of, read_checkpoint


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", path)
    return path


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a payload would touch; payloads are run in this folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as stopped:
        read_checkpoint(path)
    assert str(path) in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: b"", "is empty (0 bytes)"),
        (lambda content: content[: len(content) // 2], "is truncated or damaged"),
        (lambda content: content[:-1], "is truncated or damaged"),
        (lambda content: content[:3], "is truncated or damaged"),
        (lambda content: b"<!DOCTYPE html><title>404</title>", "is not a torch checkpoint"),
        (lambda content: bytes(len(content)), "is not a torch checkpoint"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda content: pickle.dumps({"state_dict": {}}), "is not a torch checkpoint"),
    ],
)
def test_row_67_a_file_that_is_no_whole_checkpoint_says_what_it_is(
    checkpoint: Path, damage: Callable[[bytes], bytes], named: str
) -> None:
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert named in refused(checkpoint)


def test_row_68_one_flipped_bit_of_a_weight_is_found(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    largest = max(weights.values(), key=lambda value: value.numel())
    place = bytes(content).index(bytes(largest.untyped_storage())[:256])
    content[place] ^= 1
    checkpoint.write_bytes(content)
    torch.load(checkpoint, weights_only=True)  # torch itself sees nothing
    assert "the checksum of" in refused(checkpoint)


class Payload:
    """What a pickle can make its reader do."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, ("touch canary",)


def test_row_69_a_pickle_that_runs_a_command_is_refused_and_not_run(checkpoint: Path, canary: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "hyper_parameters": Payload()}, checkpoint)
    assert "nothing in it was run" in refused(checkpoint)
    assert not canary.exists()
    os.system("touch canary")  # the payload is one
    assert canary.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_row_69_an_old_pickle_without_an_archive_is_not_even_opened(
    tmp_path: Path, canary: Path, protocol: int
) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    assert "is not a torch checkpoint" in refused(path)
    assert not canary.exists()


HOSTILE = {
    "_instantiator": {"_instantiator": "evil.make", "lr": 1.0},
    "_class_path": {"_class_path": "evil.Model", "init_args": {}},
    "callable": {"act": "os.system"},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_row_69_hyper_parameters_of_a_checkpoint_are_never_looked_at(
    checkpoint: Path, trained: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    """An importable module that touches the canary: neither named in Lightning's key nor in ours is it imported."""
    (canary.parent / "evil.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(canary.parent))
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "hyper_parameters": HOSTILE[kind], "datamodule_hyper_parameters": HOSTILE[kind]}, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(canary.parent / "runs")]
    assert run(command, "--ckpt_path", str(checkpoint), *options) == 0
    assert not canary.exists()


@pytest.mark.parametrize("name", ["evil.Model", "os.system", "torch.hub.load", "builtins.exec", "onestage_evil.Model"])
def test_row_69_a_configuration_inside_a_checkpoint_names_trusted_classes_only(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("evil", "onestage_evil"):
        (canary.parent / f"{module}.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(canary.parent))
    saved = torch.load(checkpoint, weights_only=True)
    saved["onestage"]["config"]["model"]["detector"]["class_path"] = name
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match="If you trust the file"):
        config_of(checkpoint)
    assert run("validate", "--ckpt_path", str(checkpoint)) == 2
    assert not canary.exists()


def test_row_69_a_configuration_of_a_checkpoint_does_not_override_the_command_line_of_fit(
    checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    saved["onestage"]["config"]["model"]["box_loss_weight"] = 77.0
    torch.save({**saved, "hyper_parameters": {"box_loss_weight": 77.0}}, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path), "--model.box_loss_weight", "0.25"]
    assert run("fit", "--resume", str(checkpoint), *options, "--trainer.max_epochs", "2") == 0
    (last,) = tmp_path.glob("*/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["onestage"]["config"]["model"]["box_loss_weight"] == 0.25


def test_row_70_a_compressed_archive_is_refused_before_it_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
        packed.writestr("archive/data/999", bytes(50_000_000))
    assert bomb.stat().st_size < checkpoint.stat().st_size + 1_000_000
    message = refused(bomb)
    assert "is compressed" in message
    assert "would become" in message


def change(saved: dict[str, Any], what: str) -> None:
    weights, ours = saved["state_dict"], saved["onestage"]
    name = next(iter(weights))
    if what == "detector":
        ours["detector"] = "RetinaNet"
    elif what == "image size":
        ours["image_size"] = 512
    elif what == "classes":
        ours["class_names"] = [*ours["class_names"], "seventh"]
    elif what == "missing weight":
        del weights[name]
    elif what == "weight too many":
        weights["detector.extra.weight"] = torch.zeros(1)
    elif what == "shape":
        weights[name] = torch.zeros(3)
    elif what == "not finite":
        weights[name] = torch.full_like(weights[name], float("nan"))
    elif what == "schema":
        ours["schema"] = 99


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("detector", ["RetinaNet", "SSD160"]),
        ("image size", ["512", "160"]),
        ("classes", ["7 classes", "the data has 6", "seventh"]),
        ("missing weight", ["Missing key(s)"]),
        ("weight too many", ["detector.extra.weight"]),
        ("shape", ["size mismatch", "torch.Size([3])"]),
        ("not finite", ["NaN or infinite weights in 1 of"]),
        ("schema", ["schema 99", "reads schema 1"]),
    ],
)
def test_row_71_a_checkpoint_that_does_not_fit_names_what_was_saved_and_what_is_now(
    checkpoint: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    named: list[str],
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    change(saved, what)
    torch.save(saved, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs")]
    assert run("fit", "--resume", str(checkpoint), *options) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert [word for word in named if word not in message] == []


def test_row_71_the_archive_of_another_byte_order_is_an_error_and_no_other_weights(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint) as whole:
        members = {member.filename: whole.read(member) for member in whole.infolist()}
    (order,) = [name for name in members if name.endswith("byteorder")]
    members[order] = struct.pack("3s", b"mid")
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_STORED) as broken:
        for name, content in members.items():
            broken.writestr(name, content)
    assert "cannot be loaded" in refused(checkpoint)
