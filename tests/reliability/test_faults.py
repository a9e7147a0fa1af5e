"""Faults of processes, the machine and the files. Exact resume is in test_exact_resume.py."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import checkpoint_files
import processes
import pytest
import tiny_run
import torch
from command_line import message_of
from processes import end_of, finish
from tiny_run import break_method, folder_of, is_same_end

from onestage import cli
from onestage.errors import ConfigError, ResourceError
from onestage.reliability import stopping
from onestage.reliability.callbacks import ConfigInCheckpoint
from onestage.reliability.checkpoints import read_checkpoint
from onestage.reliability.resume import newest_checkpoint
from onestage.training import loggers
from onestage.training.module import DetectionModule

pytestmark = pytest.mark.fault


def start(command: list[str], fault: str = "", launcher: list[str] | None = None) -> subprocess.Popen[str]:
    """Start the tiny run as a process of its own, with a fault in it."""
    return processes.start(*(launcher or []), tiny_run.__file__, *command, environment={"ONESTAGE_FAULT": fault})


def storm(folder: Path, *options: str) -> dict[str, object]:
    program = Path(tiny_run.__file__).with_name("storm.py")
    out, _ = finish(processes.start(program, folder, *options), seconds=3600)
    print(out)
    return json.loads(out)


@pytest.mark.slow
def test_fifty_kills_lose_one_interval_each_and_no_checkpoint(tmp_path):
    report = storm(tmp_path, "--stops", "0")["kill"]
    assert report["failures"] == []
    of_saves = {"save": 5, "damaged last.ckpt, save": 5}
    assert report["kills"] == {"start": 3, "step": 17, **of_saves, "validation": 10, "worker": 10}
    assert report["most_steps_lost"] <= report["interval"]
    assert report["slowest_end_seconds"] < 30


@pytest.mark.slow
def test_ten_stops_of_either_process_end_both_and_lose_no_checkpoint(tmp_path):
    report = storm(tmp_path, "--kills", "0")["stop"]
    assert report["failures"] == []
    assert report["stops"] == 10
    assert report["slowest_end_seconds"] < 30


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_saves_that_step_and_ends_with_its_code(number, code, drawn, tmp_path, capsys):
    # No interval: only the signal writes a checkpoint.
    options = ("--last_checkpoint.every_n_steps", "0", "--last_checkpoint.every_n_epochs", "0")
    assert tiny_run.end_of_signalled(tiny_run.words(drawn, tmp_path, *options), 3, number=number) == code
    assert read_checkpoint(folder_of(tmp_path) / "checkpoints" / "last.ckpt")["global_step"] == 3
    message = capsys.readouterr().err
    assert "continue with --resume auto" in message
    assert "there is no best.ckpt: to evaluate it, use last.ckpt" in message  # before the first validation


@pytest.mark.slow
def test_second_sigterm_and_one_inside_the_save_change_nothing(drawn, tmp_path, monkeypatch):
    sync = tiny_run.at_call(1, lambda: tiny_run.send(signal.SIGTERM), os.fsync)

    def stop() -> None:
        for _ in range(2):
            tiny_run.send(signal.SIGTERM)
        monkeypatch.setattr(os, "fsync", sync)  # the next one is in the save

    break_method(monkeypatch, "training_step", 3, stop)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 143
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 3


@pytest.mark.slow
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_ctrl_c_while_stopping_ends_at_once_with_whole_files(first, drawn, tmp_path):
    assert tiny_run.end_of_broken(tiny_run.words(drawn, tmp_path), "step", 4, first, "SIGINT") == 130
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 3  # the fourth step was not finished


@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_ctrl_c_before_the_command_runs_is_one_line(command, monkeypatch, capsys):
    """As during the import of the packages, which takes seconds."""
    monkeypatch.setattr(sys.modules["onestage.cli.main"], "run", Mock(side_effect=KeyboardInterrupt()))
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_signal_during_the_exchange_of_signals_is_kept(monkeypatch):
    stop = stopping.StopOnSignal(None)

    def minimum(value: int) -> int:
        stop._store_signal(signal.SIGTERM, None)
        return value

    monkeypatch.setattr(stop, "_minimum", minimum)
    assert not stop._all_agree(SimpleNamespace())
    assert stop.received == signal.SIGTERM
    assert stop._all_agree(SimpleNamespace())  # after the next step


@pytest.mark.slow
def test_signal_in_the_evaluation_after_training_is_no_success(drawn, tmp_path):
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto")
    assert tiny_run.end_of_signalled(command, 5, "validation_step") == 143  # 2 epochs of 2, then this
    assert tiny_run.onestage(*command) == 0  # only the evaluation is left


TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_both_with_one_checkpoint(drawn, tmp_path):
    _, err = finish(start(tiny_run.words(drawn, tmp_path, *TWO), fault="1:step:2:SIGTERM"), 143)
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 2
    assert err.count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_killed_or_stopped_process_is_named_and_ends_all(rank, number, drawn, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=0"]
    code, _, err = end_of(start(tiny_run.words(drawn, tmp_path, *TWO), f"{rank}:step:3:{number}", torchrun))
    assert code != 0
    # torchrun sees a death first and names it in its own words; it does not see a stopped process.
    by_torchrun = f"rank      : {rank} (local_rank: {rank})\n  exitcode  : -9" in err
    assert f"process {rank} (pid " in err or (number == "SIGKILL" and by_torchrun), err[-3000:]
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 2


@pytest.mark.slow
def test_stopped_process_ends_an_evaluation_too(drawn, tmp_path):
    finish(start(tiny_run.words(drawn, tmp_path)))
    folder = folder_of(tmp_path)
    given = ("--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "best.ckpt"))
    words = ["validate", *given, "--trainer.num_sanity_val_steps", "0", *TWO]
    _, err = finish(start(words, fault="1:validation:1:SIGSTOP"), 7)
    assert "process 1 (pid " in err
    assert "start the evaluation again" in err


def test_processes_with_different_configurations_are_refused(monkeypatch):
    def gather(gathered: list[object], own: object) -> None:
        gathered[:] = [own, {**own, "model.optimizer.init_args.lr": "0.2"}, own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    decisive = {"model.optimizer.init_args.lr": 0.1, "data.batch_size": 4}
    expected = r"processes \[1\] have another configuration than process 0: model.optimizer.init_args.lr\."
    with pytest.raises(ConfigError, match=expected):
        ConfigInCheckpoint({}, decisive).setup(SimpleNamespace(world_size=3), None, "fit")
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda gathered, own: gathered.__setitem__(0, own))
    ConfigInCheckpoint({}, decisive).setup(SimpleNamespace(world_size=1), None, "fit")


@pytest.mark.slow
def test_kill_in_the_save_after_a_validation_leaves_one_row_of_it(drawn, tmp_path):
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto", epochs=1)
    code = tiny_run.end_of_broken(command, "write", 10, "SIGKILL")  # 7 steps, before the validation, best, last
    assert code == -signal.SIGKILL
    assert tiny_run.onestage(*command) == 0
    with (folder_of(tmp_path) / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/mAP"]]
    assert len({row["step"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits_after_a_kill(drawn, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(tiny_run.words(drawn, whole, *TWO)))
    command = tiny_run.words(drawn, broken, *TWO, "--resume", "auto")
    finish(start(command, fault="1:step:6:SIGKILL"), 7)
    finish(start(command))
    assert is_same_end(folder_of(whole), folder_of(broken))


# The machine and the files: full disks, memory, damaged checkpoints, changed data


@pytest.mark.slow
def test_full_disk_for_the_curves_does_not_end_the_run(drawn, tmp_path, monkeypatch, caplog):
    no_space = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(loggers.CSVLogger, "save", no_space)
    monkeypatch.setattr(loggers.TensorBoardLogger, "log_metrics", no_space)
    loggers._warned.clear()
    with caplog.at_level("WARNING", logger="onestage.training.loggers"):
        assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 0
    assert sum("metrics.csv cannot be written" in line for line in caplog.messages) == 1
    assert sum("event files cannot be written" in line for line in caplog.messages) == 1


def test_folder_that_denies_writing_is_found_before_training(drawn, tmp_path, monkeypatch, capsys):
    # As root, permissions do not apply.
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    monkeypatch.setattr(DetectionModule, "training_step", lambda *_: pytest.fail("it trained"))
    message = message_of(capsys, *tiny_run.words(drawn, tmp_path), code=5)
    assert "Permission denied" in message
    assert str(folder_of(tmp_path)) in message


SHARED_MEMORY = "unable to open shared memory object </torch_4711_0> in read-write mode: No space left on device (28)"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--auto_batch"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "data.batch"),
        (MemoryError(), "data.batch_size"),
        (RuntimeError(SHARED_MEMORY), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "--runs_dir"),
    ],
)
def test_shortage_of_the_machine_is_named_with_its_remedy(error, remedy):
    with pytest.raises(ResourceError, match=remedy), stopping.mapped_errors():
        raise error


def test_out_of_memory_leaves_the_last_checkpoint(drawn, tmp_path, monkeypatch, capsys):
    break_method(monkeypatch, "training_step", 3, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    assert "data.batch_size" in message_of(capsys, *tiny_run.words(drawn, tmp_path), code=5)
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "code", "said"),
    [
        ("onestage.versions.torch", "2.0.0", 0, "torch 2.0.0"),
        ("onestage.schema", 99, 2, "schema 99"),
        ("loops", {"fit_loop": {}}, 2, "Resume from|Use another one"),
        ("lr_schedulers", 5, 2, "Resume from|Use another one"),
        ("callbacks", 5, 2, "Resume from|Use another one"),
        ("optimizer_states", [1], 2, "Resume from|Use another one"),
    ],
)
def test_other_or_malformed_checkpoint_is_reported(place, value, code, said, stopped, drawn, tmp_path, capsys):
    saved = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    path = checkpoint_files.write(tmp_path / "other.ckpt", checkpoint_files.changed(place, value, saved))
    words = tiny_run.words(drawn, tmp_path, "--resume", str(path), "--trainer.max_steps", "13")
    assert tiny_run.onestage(*words) == code
    err = capsys.readouterr().err
    assert re.search(said, err)
    assert "Traceback" not in err


def edit_a_box(data: Path) -> None:
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))


def edit_a_byte(data: Path) -> None:
    """Change the pixels of a training image."""
    name = json.loads((data / "annotations" / "instances_train.json").read_text())["images"][3]["file_name"]
    content = bytearray((data / "JPEGImages" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (data / "JPEGImages" / name).write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "problem"), [(edit_a_box, "training annotations"), (edit_a_byte, "training images")])
def test_changed_data_is_refused_unless_the_change_is_allowed(edit, problem, drawn, tmp_path, capsys):
    data = shutil.copytree(drawn, tmp_path / "data")
    command = tiny_run.words(data, tmp_path / "runs", "--resume", "auto", source="COCO")
    assert tiny_run.end_of_signalled(command, 2) == 143
    edit(data)
    error = message_of(capsys, *command)
    assert problem in error
    assert "--allow_data_change true" in error
    assert tiny_run.onestage(*command, "--allow_data_change", "true") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EROFS, "writable")])
def test_failed_write_ends_with_code_5_and_keeps_the_saved(number, word, drawn, tmp_path, monkeypatch, capsys):
    checkpoints, syncs = tmp_path / "tiny" / "version_0" / "checkpoints", iter(range(1, 10**9))

    def sync(handle: int) -> None:
        if (checkpoints / "last.ckpt").exists() and next(syncs) > 4:  # each save takes two: the file and its folder
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    assert word in message_of(capsys, *tiny_run.words(drawn, tmp_path), code=5)
    assert newest_checkpoint(checkpoints).global_step >= 2
    assert list(checkpoints.glob(".*.tmp")) == []


@pytest.mark.slow
def test_other_numbers_of_workers_give_the_same_bits(stopped, drawn, uninterrupted, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "tiny" / "version_0")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto", "--data.num_workers", "2")) == 0
    assert is_same_end(uninterrupted(), folder)
