"""Going on from a checkpoint in a new folder, or a moved one: what is there at any moment, and what is taken along."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from onestage.reliability.checkpoints import read_checkpoint
from onestage.training.module import DetectionModule

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def stopped(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 16 steps that was stopped after step 12, with a best checkpoint of step 8."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop = tiny_run.at_call(12, lambda: tiny_run.send(signal.SIGTERM), DetectionModule.training_step)
        patch.setattr(DetectionModule, "training_step", stop)
        assert tiny_run.onestage(*tiny_run.words(drawn, runs)) == 143
    checkpoints = runs / "tiny" / "version_0" / "checkpoints"
    assert {name: step(checkpoints / name) for name in ("best.ckpt", "last.ckpt")} == {"best.ckpt": 8, "last.ckpt": 12}
    return runs / "tiny" / "version_0"


def step(file: Path) -> int:
    return int(read_checkpoint(file)["global_step"])


def killed_at(where: str, count: int, command: list[str]) -> None:
    child = os.fork()
    if child == 0:
        tiny_run.break_at(where, count, lambda: tiny_run.send(signal.SIGKILL))
        tiny_run.onestage(*command)
        os._exit(99)  # the fault did not happen
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def and_its_best(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds, and of that what it says of the best one, to be changed."""
    checkpoint = torch.load(file, weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint"))
    return checkpoint, state


@pytest.mark.parametrize(("where", "count"), [("replace", 3), ("step", 1)])
def test_a_kill_before_the_first_save_in_a_new_folder_loses_no_step(
    where: str,
    count: int,
    stopped: Path,
    drawn: Path,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before best.ckpt has its name (the third one taken, after the trial of the folder and last.ckpt), or after."""
    killed_at(where, count, tiny_run.words(drawn, tmp_path, "--resume", str(stopped)))
    (folder,) = tmp_path.glob("tiny/version_*")
    files = {file.name: step(file) for file in (folder / "checkpoints").glob("*.ckpt")}
    assert files == ({"last.ckpt": 12} if where == "replace" else {"last.ckpt": 12, "best.ckpt": 8})
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto")) == 0
    assert "the optimizer takes" not in capsys.readouterr().err
    assert list(tmp_path.glob("tiny/version_*")) == [folder]
    assert list(folder.rglob("*.tmp")) == []
    whole, resumed = tiny_run.final_state(uninterrupted()), tiny_run.final_state(folder)
    assert tiny_run.differences({**whole, "callbacks": {}}, {**resumed, "callbacks": {}}) == []


def test_a_moved_run_knows_its_best_checkpoint(stopped: Path, drawn: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / "tiny" / "version_0"
    shutil.copytree(stopped, moved)
    checkpoint, before = and_its_best(moved / "checkpoints" / "last.ckpt")
    before["best_model_path"] = "/where/it/was/best.ckpt"
    torch.save(checkpoint, moved / "checkpoints" / "last.ckpt")
    killed_at("step", 2, tiny_run.words(drawn, tmp_path / "moved", "--resume", "auto"))
    _, after = and_its_best(moved / "checkpoints" / "last.ckpt")
    assert after["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert after["best_model_score"] == before["best_model_score"]


@pytest.mark.parametrize("named", ["another file", "a file with the name", "no file", "a number"])
def test_a_checkpoint_brings_no_file_but_a_best_checkpoint_that_lies_beside_it(
    named: str, stopped: Path, drawn: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    for name in ("id_rsa", "best.ckpt"):
        (tmp_path / "secret" / name).write_text("PRIVATE KEY")
    hostile = tmp_path / "hostile" / "last.ckpt"
    hostile.parent.mkdir()
    checkpoint, state = and_its_best(stopped / "checkpoints" / "last.ckpt")
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


def test_what_lies_beside_a_checkpoint_and_is_none_is_left_there_with_a_message(
    stopped: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    os.link(stopped / "checkpoints" / "last.ckpt", beside / "last.ckpt")
    (beside / "best.ckpt").write_text("PRIVATE KEY")
    words = tiny_run.words(drawn, tmp_path / "runs", "--resume", str(beside / "last.ckpt"))
    assert tiny_run.onestage(*words, "--trainer.max_steps", "13") == 0
    assert "the best checkpoint so far is not taken over" in capsys.readouterr().err
    _, state = and_its_best(tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt")
    assert state["best_model_path"] == ""


def test_a_run_with_weights_alone_has_nothing_to_go_on_from(drawn: Path, tmp_path: Path) -> None:
    """They are written by a callback of the user's own; the first last.ckpt was to come after step 8."""
    own = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_weights_only"]
    options = [*own, "true", "--trainer.callbacks.every_n_train_steps", "1", "--last_checkpoint.every_n_steps", "0"]
    command = tiny_run.words(drawn, tmp_path, *options, "--resume", "auto", "--trainer.max_steps", "9")
    killed_at("step", 3, command)
    (killed,) = tmp_path.glob("tiny/version_*")
    assert list((killed / "checkpoints").glob("*.ckpt")) != []
    assert tiny_run.onestage(*command) == 0
    assert (tmp_path / "tiny" / "version_1" / "checkpoints" / "last.ckpt").is_file()
    words = tiny_run.words(drawn, tmp_path / "other", "--resume", str(killed))
    assert tiny_run.onestage(*words) == 2


def rates(group: dict[str, Any]) -> tuple[float, ...]:
    return tuple(group[key] for key in ("initial_lr", "lr", "weight_decay"))


def test_the_optimizer_of_a_checkpoint_does_not_override_the_configuration(
    stopped: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a warm-up of 3 steps, step 12 is half of the way to step 21, where the cosine is 1/2."""
    words = tiny_run.words(drawn, tmp_path, "--resume", str(stopped), "--trainer.max_steps", "21")
    new = ["--model.optimizer.init_args.lr=0.5", "--model.optimizer.init_args.weight_decay=0.3"]
    seen: list[list[tuple[float, ...]]] = []

    def see(module: DetectionModule, *_: object) -> None:
        seen.append([rates(group) for group in module.trainer.optimizers[0].param_groups])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionModule, "on_train_batch_start", see)
        assert tiny_run.onestage(*words, *new, "--model.schedule.kind", "cosine", "--trainer.max_epochs", "3") == 0
    lr = pytest.approx(0.5 * 0.5)
    assert seen[0] == [(0.5, lr, 0.3), (0.5, lr, 0.0)]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "the optimizer takes" in line)
    assert "lr 0.002 -> 0.5, lr at step 12" in line
    assert "weight_decay 0.01 -> 0.3" in line
    last = torch.load(tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [rates(group)[::2] for group in last["optimizer_states"][0]["param_groups"]] == [(0.5, 0.3), (0.5, 0.0)]
    assert last["lr_schedulers"][0]["base_lrs"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        (None, ("--model.optimizer", "SGD", "--model.optimizer.lr", "0.01"), "model.optimizer is SGD"),
        ("x" * 300, (), "cannot be read: File name too long"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_message(
    path: str | None,
    options: tuple[str, ...],
    said: str,
    stopped: Path,
    drawn: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", path or str(stopped), *options)) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_a_run_goes_on_with_its_data_in_another_folder(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(root: Path) -> list[str]:
        options = ["--data.source", "onestage.data.COCO"]
        for split in ("train", "val"):
            options += [f"--data.{split}_annotations", str(root / "annotations" / f"instances_{split}.json")]
            options += [f"--data.{split}_images", str(root / "JPEGImages")]
        drop = {"--data.source.num_train", "--data.source.num_val", "--data.source.draw_seed"}
        words = iter(tiny_run.words(root, tmp_path / "runs", *options, "--resume", "auto", "--trainer.max_steps", "4"))
        return [word for word in words if word not in drop or not next(words)]

    killed_at("step", 3, command(drawn))
    moved = tmp_path / "moved"
    shutil.copytree(drawn, moved)
    assert tiny_run.onestage(*command(moved)) == 0
    (folder,) = (tmp_path / "runs").glob("tiny/version_*")
    assert step(folder / "checkpoints" / "last.ckpt") == 4
    shutil.copy(moved / "annotations" / "instances_val.json", moved / "annotations" / "instances_train.json")
    assert tiny_run.onestage(*command(moved)) == 2
    assert "--allow_data_change true, or begin a new run by --resume none" in capsys.readouterr().err
