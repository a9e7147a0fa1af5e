"""Resumed runs in another folder, with other data, and with another configuration."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from command_line import message_of

from onestage.reliability.checkpoints import read_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.filterwarnings("ignore:Checkpoint directory")]


def step(file: Path) -> int:
    return int(read_checkpoint(file)["global_step"])


def killed_at(where: str, count: int, command: list[str]) -> None:
    assert tiny_run.end_of_broken(command, where, count, "SIGKILL") == -signal.SIGKILL


def load_with_best_state(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint and, inside it, the state of BestCheckpoint."""
    checkpoint = torch.load(file, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint"))
    return checkpoint, state


@pytest.mark.parametrize(("where", "count"), [("replace", 4), ("step", 1)])
def test_kill_before_the_first_save_loses_no_step(where, count, stopped, drawn, uninterrupted, tmp_path, capsys):
    """Before best.ckpt has its name (the third rename, after the write test and last.ckpt), or after."""
    killed_at(where, count, tiny_run.words(drawn, tmp_path, "--resume", str(stopped)))
    (folder,) = tmp_path.glob("tiny/version_*")
    files = {file.name: step(file) for file in (folder / "checkpoints").glob("*.ckpt")}
    assert files == ({"last.ckpt": 12} if where == "replace" else {"last.ckpt": 12, "best.ckpt": 8})
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto")) == 0
    assert "the optimizer takes" not in capsys.readouterr().err
    assert list(tmp_path.glob("tiny/version_*")) == [folder]
    assert list(folder.rglob("*.tmp")) == []
    whole, resumed = tiny_run.final_state(uninterrupted()), tiny_run.final_state(folder)
    # Killed before best.ckpt was copied, the run no longer knows the best weights so far.
    lost = ("callbacks", *(("best", "metrics", "per_class") if where == "replace" else ()))
    assert tiny_run.differences({**whole, **dict.fromkeys(lost)}, {**resumed, **dict.fromkeys(lost)}) == []


def test_moved_run_knows_its_best_checkpoint(stopped, drawn, tmp_path):
    moved = tmp_path / "moved" / "tiny" / "version_0"
    shutil.copytree(stopped, moved)
    checkpoint, before = load_with_best_state(moved / "checkpoints" / "last.ckpt")
    before["best_model_path"] = "/where/it/was/best.ckpt"
    torch.save(checkpoint, moved / "checkpoints" / "last.ckpt")
    killed_at("step", 2, tiny_run.words(drawn, tmp_path / "moved", "--resume", "auto"))
    _, after = load_with_best_state(moved / "checkpoints" / "last.ckpt")
    assert after["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert after["best_model_score"] == before["best_model_score"]


@pytest.mark.parametrize("named", ["another file", "a file with the name", "no file", "a number"])
def test_checkpoint_copies_no_file_but_a_best_checkpoint_beside_it(named, stopped, drawn, tmp_path):
    (tmp_path / "secret").mkdir()
    for name in ("id_rsa", "best.ckpt"):
        (tmp_path / "secret" / name).write_text("PRIVATE KEY")
    hostile = tmp_path / "hostile" / "last.ckpt"
    hostile.parent.mkdir()
    checkpoint, state = load_with_best_state(stopped / "checkpoints" / "last.ckpt")
    paths = {
        "another file": str(tmp_path / "secret" / "id_rsa"),
        "a file with the name": str(tmp_path / "secret" / "best.ckpt"),
        "no file": str(hostile.with_name("best.ckpt")),
        "a number": 7,
    }
    state["best_model_path"] = paths[named]
    torch.save(checkpoint, hostile)
    killed_at("step", 1, tiny_run.words(drawn, tmp_path / "runs", "--resume", str(hostile)))
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert [file for file in files if b"PRIVATE KEY" in file.read_bytes()] == []
    assert [file.name for file in files if file.suffix == ".ckpt"] == ["last.ckpt"]


def test_file_called_best_that_is_no_checkpoint_is_not_copied(stopped, drawn, tmp_path, capsys):
    beside = tmp_path / "beside"
    beside.mkdir()
    os.link(stopped / "checkpoints" / "last.ckpt", beside / "last.ckpt")
    (beside / "best.ckpt").write_text("PRIVATE KEY")
    words = tiny_run.words(drawn, tmp_path / "runs", "--resume", str(beside / "last.ckpt"))
    assert tiny_run.onestage(*words, "--trainer.max_steps", "13") == 0
    assert "the best checkpoint so far is not used" in capsys.readouterr().err
    _, state = load_with_best_state(tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt")
    assert state["best_model_path"] == ""


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        (None, ("--model.optimizer", "SGD", "--model.optimizer.lr", "0.01"), "model.optimizer is SGD"),
        ("x" * 300, (), "cannot be read: File name too long"),
    ],
)
def test_resume_that_is_impossible_is_one_message(path, options, said, stopped, drawn, tmp_path, capsys):
    assert said in message_of(capsys, *tiny_run.words(drawn, tmp_path, "--resume", path or str(stopped), *options))


def test_longer_run_continues_the_epoch_that_max_steps_has_cut(drawn, uninterrupted, tmp_path):
    constant = ("--model.schedule.kind", "constant")
    command = tiny_run.words(drawn, tmp_path, *constant, "--resume=auto", "--last_checkpoint.every_n_steps=0")
    assert tiny_run.onestage(*command, "--trainer.max_steps", "5") == 0
    folder = tiny_run.folder_of(tmp_path)
    (folder / "hpc_ckpt_1.ckpt").touch()  # SLURM's, which must not be evaluated instead of best.ckpt
    assert tiny_run.onestage(*command, "--trainer.max_steps", "13") == 0
    states = [tiny_run.final_state(run) for run in (uninterrupted(*constant, "--trainer.max_steps=13"), folder)]
    assert tiny_run.differences(*states) == [] and not (folder / "hpc_ckpt_1.ckpt").exists()


def test_run_resumes_with_its_data_in_another_folder(drawn, tmp_path, capsys):
    def command(root: Path) -> list[str]:
        options = ("--resume", "auto", "--trainer.max_steps", "4")
        return tiny_run.words(root, tmp_path / "runs", *options, source="COCO")

    killed_at("step", 3, command(drawn))
    moved = tmp_path / "moved"
    shutil.copytree(drawn, moved)
    assert tiny_run.onestage(*command(moved)) == 0
    (folder,) = (tmp_path / "runs").glob("tiny/version_*")
    assert step(folder / "checkpoints" / "last.ckpt") == 4
    shutil.copy(moved / "annotations" / "instances_val.json", moved / "annotations" / "instances_train.json")
    assert "--allow_data_change true, or start a new run by --resume none" in message_of(capsys, *command(moved))
