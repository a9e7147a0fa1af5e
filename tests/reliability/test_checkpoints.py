"""Checkpoint files: damaged, foreign and hostile ones are named and refused; writing leaves whole files."""

import copy
import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from checkpoint_files import changed, contents, write
from command_line import message_of, run
from tiny_training import TinyDetector

from onestage.errors import CheckpointError, ResourceError
from onestage.reliability import checkpoints
from onestage.reliability.checkpoints import (
    AtomicCheckpointIO,
    keep_previous,
    load_weights,
    read_checkpoint,
    require_writable,
    stored_step,
)
from onestage.reliability.resume import newest_checkpoint
from onestage.reliability.runs import take_run_folder
from onestage.training.module import CHECKPOINT_SCHEMA, DetectionModule


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "last.ckpt")


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as stopped:
        read_checkpoint(path)
    assert str(path) in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: b"", "is empty (0 bytes)"),
        (lambda content: content[: len(content) // 2], "is truncated or damaged"),
        (lambda content: content[:-1], "is truncated or damaged"),
        (lambda content: b"<!DOCTYPE html><title>404</title>", "is not a torch checkpoint"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda content: pickle.dumps({"state_dict": {}}), "is not a torch checkpoint"),
    ],
)
def test_damaged_file_is_refused_with_its_problem(checkpoint, damage, problem):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert problem in refused(checkpoint)


@pytest.mark.parametrize("inside", ["", "checkpoints", "version_0/checkpoints"])
def test_folder_given_as_checkpoint_lists_the_checkpoints_in_it(checkpoint, inside):
    folder = checkpoint.parent / "folder"
    (folder / inside).mkdir(parents=True)
    moved = checkpoint.rename(folder / inside / "last.ckpt")
    assert f"{folder} is a folder.\nOther checkpoints there: {moved}" in refused(folder)


def test_fifo_among_checkpoints_does_not_block(checkpoint):
    pipe = checkpoint.with_name("pipe.ckpt")
    os.mkfifo(pipe)
    assert newest_checkpoint(checkpoint.parent).checkpoint == checkpoint
    assert "is not a file" in refused(pipe)


def test_one_flipped_bit_of_a_weight_is_found(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[bytes(content).index(torch.arange(600.0).numpy().tobytes()[64:256])] ^= 1
    checkpoint.write_bytes(content)
    torch.load(checkpoint, weights_only=True)  # torch itself finds nothing
    assert "the checksum of" in refused(checkpoint)


class Payload:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, ("touch canary",)


class Greedy:
    """A pickle of some bytes that allocates 6 GiB when it is read."""

    def __reduce__(self) -> tuple[Callable[[int], Any], tuple[int]]:
        return bytearray, (6 << 30,)


def test_pickle_that_runs_a_command_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "hostile.ckpt", changed("hyper_parameters", Payload()))
    assert "nothing in it was run" in refused(path)
    for protocol in (2, 4):
        (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Payload(), protocol=protocol))
        assert "is not a torch checkpoint" in refused(tmp_path / "old.ckpt")
    assert not Path("canary").exists()
    os.system("touch canary")  # the payload works
    assert Path("canary").exists()


def with_pickle(checkpoint: Path, content: bytes) -> Path:
    hostile = checkpoint.with_name("hostile.ckpt")
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(hostile, "w") as changed_file:
        for member in whole.infolist():
            is_pickle = member.filename.endswith(".pkl")
            changed_file.writestr(member.filename, content if is_pickle else whole.read(member))
    return hostile


def compressed(checkpoint: Path) -> Path:
    bomb = checkpoint.with_name("bomb.ckpt")
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
        packed.writestr("archive/data/999", bytes(5_000_000))
    assert bomb.stat().st_size < 100_000
    return bomb


def repeating(checkpoint: Path) -> Path:
    with zipfile.ZipFile(checkpoint, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for number in range(9):
            again = copy.copy(largest)
            again.filename = f"archive/data/9{number}"
            archive.filelist.append(again)
        archive._didModify = True
    return checkpoint


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: write(path, changed("more", Greedy())), "asks for memory that it does not fill"),
        # 130 MB and a minute
        (lambda path: with_pickle(path, b"\x80\x02](" + b"}" * (2 << 20) + b"e."), "beside its tensors"),
        (compressed, "is compressed"),
        (repeating, "would become"),
    ],
)
def test_file_that_would_take_gigabytes_is_not_loaded(checkpoint, monkeypatch, make, problem):
    path = make(checkpoint)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert stored_step(path) == -1
    assert problem in refused(path)


def test_control_characters_of_a_checkpoint_do_not_reach_the_terminal(checkpoint, capsys):
    path = with_pickle(checkpoint, b"\x80\x02cevil\x1b[31m\nx\n.")
    printed = message_of(capsys, "validate", "--ckpt_path", str(path))
    assert "\x1b" not in printed
    assert "nothing in it was run" in printed


@pytest.mark.parametrize("size", [100_000_000, 10**13])
def test_expanded_tensor_is_refused_before_its_values_are_read(tmp_path, monkeypatch, capsys, size):
    path = write(tmp_path / "hostile.ckpt", changed("state_dict", {"a": torch.zeros(1).expand(size)}))
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: pytest.fail("its values were read"))
    for command in ("validate", "export"):
        assert run(command, "--ckpt_path", str(path)) == 2
        assert f"a tensor of {4 * size:,} bytes as `state_dict.a`, of which 4 are stored" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("more", RECURSIVE, "more than 1,000 values"),
        ("state_dict.a", torch.ones(3).to_sparse(), "sparse, quantized or not on the CPU"),
        ("onestage", [1], "a dictionary as `onestage`"),
        ("onestage.config.model.loss_weights", torch.ones(1), "plain keys and values as `onestage.config`"),
        ("onestage.class_names", ..., "a list of names as `onestage.class_names`"),
        ("onestage.category_ids", 5, "a list of whole numbers as `onestage.category_ids`"),
        ("onestage.image_size", "big", "pixels or nothing as `onestage.image_size`"),
        ("onestage.versions", ["torch"], "versions by package"),
        ("onestage.schema", 99, f"has schema 99; this version of onestage reads schema {CHECKPOINT_SCHEMA}"),
        ("onestage", ..., "was not written by `onestage fit`"),
        ("state_dict", [1, 2], "tensors by name as `state_dict`"),
        ("global_step", ..., "a number of steps as `global_step`"),
    ],
)
def test_entry_of_another_type_is_refused_with_its_place(tmp_path, monkeypatch, place, value, problem):
    monkeypatch.setattr(checkpoints, "MAX_VALUES", 1000)
    assert problem in refused(write(tmp_path / "odd.ckpt", changed(place, value)))


@pytest.fixture(scope="module")
def module() -> DetectionModule:
    return DetectionModule(TinyDetector(num_classes=3))


def weights_of(module: DetectionModule) -> dict[str, Any]:
    saved = changed("onestage.detector", "TinyDetector")
    saved["onestage"]["image_size"] = 64
    saved["state_dict"] = {name: value.clone() for name, value in module.state_dict().items()}
    return saved


@pytest.mark.parametrize(
    ("place", "value", "problems"),
    [
        ("onestage.detector", "RetinaNet", ["RetinaNet", "TinyDetector"]),
        ("onestage.class_names", ["a", "b", "c", "d\x1b[31m"], ["4 classes, the data has 3", "'d\\x1b[31m'"]),
        ("onestage.class_names", ["b", "a", "c"], ["in the same order"]),
        ("state_dict", {}, ["Missing key(s)"]),
        ("state_dict.more", torch.zeros(1), ["Unexpected key(s)"]),
        ("state_dict.more", torch.tensor([torch.nan]), ["NaN or infinite weights in 1 of"]),
    ],
)
def test_weights_of_another_model_are_refused_with_both_values(module, tmp_path, place, value, problems):
    path = write(tmp_path / "other.ckpt", changed(place, value, weights_of(module)))
    with pytest.raises(CheckpointError) as stopped:
        load_weights(module, path, ["a", "b", "c"])
    assert [problem for problem in problems if problem not in str(stopped.value)] == []


def test_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(contents(), path)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(ResourceError, match=r"is full.*MB free(.|\n)*--runs_dir"):
        AtomicCheckpointIO().save_checkpoint(changed("global_step", 6), path)
    assert read_checkpoint(path)["global_step"] == 5
    assert list(tmp_path.iterdir()) == [path]


def test_message_of_torch_for_a_full_disk_is_recognised(tmp_path, monkeypatch):
    text = "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/7"
    monkeypatch.setattr(torch, "save", Mock(side_effect=RuntimeError(text)))
    with pytest.raises(ResourceError, match="full"):
        AtomicCheckpointIO().save_checkpoint(contents(), tmp_path / "last.ckpt")


def test_previous_file_is_kept_under_its_second_name(tmp_path, monkeypatch):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    last.write_bytes(b"one")
    keep_previous(last)
    assert (last.read_bytes(), previous.read_bytes()) == (b"one", b"one")
    last.unlink()
    last.write_bytes(b"two")
    monkeypatch.setattr(Path, "hardlink_to", Mock(side_effect=OSError(errno.EPERM, "no links")))
    keep_previous(last)
    assert (last.read_bytes(), previous.read_bytes()) == (b"two", b"two")


def test_unfinished_files_are_removed_and_others_kept(tmp_path):
    left = tmp_path / "checkpoints" / ".last.ckpt.12345.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    (left.parent / "last.ckpt").write_bytes(b"whole")
    take_run_folder(tmp_path)
    assert [file.name for file in left.parent.iterdir()] == ["last.ckpt"]


def test_folder_in_place_of_the_checkpoint_is_found_at_the_start(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(ResourceError, match=r"last\.ckpt: is a folder"):
        require_writable(tmp_path / "last.ckpt")
