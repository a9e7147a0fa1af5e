"""Faults of processes: kills, signals, lost and different ones. Exact resume is in test_exact_resume.py."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny_run
import torch
from faults import fail_with
from processes import end_of, finish
from tiny_run import break_method, folder_of, is_same_end

from onestage import cli
from onestage.errors import ConfigError
from onestage.reliability import stopping
from onestage.reliability.callbacks import ConfigInCheckpoint
from onestage.reliability.checkpoints import read_checkpoint
from onestage.reliability.resume import newest_checkpoint

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
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_stopping_ends_at_once_with_whole_files(first, drawn, tmp_path):
    signals = lambda: [tiny_run.send(number) for number in (first, signal.SIGINT)]  # noqa: E731
    assert tiny_run.end_of_child(tiny_run.words(drawn, tmp_path), "step", 4, signals) == 130
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 3  # the fourth step was not finished


@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_ctrl_c_before_the_command_runs_is_one_line(command, monkeypatch, capsys):
    """As during the import of the packages, which takes seconds."""
    monkeypatch.setattr(cli.main.__globals__["sys"].modules[cli.main.__module__], "run", fail_with(KeyboardInterrupt()))
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


# Several processes

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
    assert tiny_run.end_of_child(command, "write", 10) == -signal.SIGKILL  # 7 steps, before the validation, best, last
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
