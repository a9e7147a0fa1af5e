"""The faults of a training run: kills, signals, full disks, lost permissions, damaged files, changed data.

Each is what the user's machine would do, or as near to it as a test may go; F14, numbers that are not finite, is tested
with the guard that looks for them.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import tiny_run
import torch

from onestage import cli
from onestage.data import loader as loader_module
from onestage.data import worker_watch
from onestage.errors import DataError, ResourceError, RunInUseError
from onestage.reliability import checkpoint_io, stopping
from onestage.reliability.checkpoint_files import read_checkpoint
from onestage.reliability.checkpoint_io import WholeFileIO, keep_previous, sweep
from onestage.reliability.resume import newest_checkpoint
from onestage.reliability.runs import take_run_folder
from onestage.training import loggers
from onestage.training.module import DetectionModule

pytestmark = pytest.mark.fault
SECONDS = 300  # no test waits longer for a process; how fast it was is not asserted but in F6 and F7


def start(command: list[str], fault: str = "", launcher: list[str] | None = None) -> subprocess.Popen[str]:
    """Start the tiny run as a process of its own, with a fault in it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ONESTAGE_FAULT": fault}
    program = str(Path(tiny_run.__file__))
    return subprocess.Popen(
        [sys.executable, *(launcher or []), program, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, err


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def folder_of(runs: Path) -> Path:
    (folder,) = runs.glob("tiny/version_*")
    return folder


def same_end(whole: Path, resumed: Path) -> bool:
    return tiny_run.differences(tiny_run.final_state(whole), tiny_run.final_state(resumed)) == []


def break_method(monkeypatch: pytest.MonkeyPatch, method: str, count: int, action: Callable[[], object]) -> None:
    monkeypatch.setattr(DetectionModule, method, tiny_run.at_call(count, action, getattr(DetectionModule, method)))


def fail_with(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# F1, F2: kills


@pytest.mark.parametrize(("where", "count"), [("step", 6), ("write", 3), ("sync", 5), ("replace", 6)])
def test_f01_f02_a_killed_run_loses_one_interval_and_goes_on_to_the_same_bits(
    where: str, count: int, drawn: Path, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """A kill in a step, half-way through the bytes, before they are on the disk, and before the name is taken."""
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto")
    killed = os.fork()
    if killed == 0:
        steps = tmp_path / "steps"
        method = DetectionModule.training_step

        def counted(*arguments: object, **named: object) -> object:
            steps.write_text(str(int(steps.read_text() or 0) + 1 if steps.exists() else 1))
            return method(*arguments, **named)

        DetectionModule.training_step = counted
        tiny_run.break_at(where, count, lambda: tiny_run.send(signal.SIGKILL))
        tiny_run.onestage(*command)
        os._exit(99)  # the fault did not happen
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    folder = folder_of(tmp_path)
    files = list((folder / "checkpoints").glob("*.ckpt"))
    steps = [read_checkpoint(file)["global_step"] for file in files]  # each is whole, whatever the moment
    assert max(steps) >= int((tmp_path / "steps").read_text()) - 2  # one was not finished, one not saved
    assert tiny_run.onestage(*command) == 0
    assert same_end(uninterrupted(), folder)
    assert list(folder.rglob("*.tmp")) == []


def test_f02_a_kill_leaves_no_unfinished_file_behind_for_long(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".last.ckpt.12345.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    other = tmp_path / "checkpoints" / "last.ckpt"
    other.write_bytes(b"whole")
    assert sweep(tmp_path) == [left]
    assert other.exists()
    assert not left.exists()


# F3, F4: signals; that they save and that the run goes on exactly is in test_exact_resume.py


@pytest.mark.parametrize(
    ("number", "code", "method"),
    [
        (signal.SIGTERM, 143, "training_step"),
        (signal.SIGTERM, 143, "validation_step"),
        (signal.SIGINT, 130, "training_step"),
    ],
)
def test_f03_f04_a_signal_saves_that_step_and_ends_with_its_code(
    number: int,
    code: int,
    method: str,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps_before = {"training_step": 3, "validation_step": 8}[method]
    count = {"training_step": 3, "validation_step": 1}[method]
    break_method(monkeypatch, method, count, lambda: tiny_run.send(number))
    # No interval: only the signal writes a checkpoint.
    options = ("--last_checkpoint.every_n_steps", "0", "--last_checkpoint.every_n_epochs", "0")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, *options)) == code
    assert read_checkpoint(folder_of(tmp_path) / "checkpoints" / "last.ckpt")["global_step"] == steps_before
    assert "go on with --resume auto" in capsys.readouterr().err


def test_f03_a_second_sigterm_and_one_inside_the_save_change_nothing(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        tiny_run.send(signal.SIGTERM)
        tiny_run.send(signal.SIGTERM)

    break_method(monkeypatch, "training_step", 3, twice)
    monkeypatch.setattr(os, "fsync", tiny_run.at_call(6, lambda: tiny_run.send(signal.SIGTERM), os.fsync))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 143
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints")[1] == 3


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_f04_ctrl_c_while_stopping_ends_the_process_at_once_and_files_stay_whole(
    first: int, drawn: Path, tmp_path: Path
) -> None:
    child = os.fork()
    if child == 0:
        tiny_run.break_at("step", 4, lambda: [tiny_run.send(number) for number in (first, signal.SIGINT)])
        tiny_run.onestage(*tiny_run.words(drawn, tmp_path))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints")[1] == 3  # the fourth step was not finished


@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_f04_ctrl_c_before_anything_has_begun_is_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while packages are imported, which takes seconds."""
    monkeypatch.setattr(cli, "run", lambda _: fail_with(KeyboardInterrupt())())
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_f03_a_signal_that_comes_while_the_processes_agree_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stopping.StopOnSignal(None)

    def least(_: object, value: int) -> int:
        stop._note(signal.SIGTERM, None)
        return value

    monkeypatch.setattr(stop, "_least", least)
    assert not stop._agreed(SimpleNamespace())
    assert stop.received == signal.SIGTERM  # the next step asks again
    assert stop._agreed(SimpleNamespace())


def test_f03_a_signal_in_the_evaluation_after_training_is_no_success(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_method(monkeypatch, "validation_step", 5, lambda: tiny_run.send(signal.SIGTERM))  # 2 epochs of 2, then this
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto")
    assert tiny_run.onestage(*command) == 143
    assert tiny_run.onestage(*command) == 0  # nothing is left to train; the evaluation is made up for


def test_f03_slurm_puts_the_job_back_into_its_queue(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)  # or Lightning would take this for a job of SLURM's
    break_method(monkeypatch, "training_step", 2, lambda: tiny_run.send(signal.SIGUSR1))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path / "runs")) == 143
    assert calls.read_text().split() == ["requeue", "4711"]
    assert newest_checkpoint(folder_of(tmp_path / "runs") / "checkpoints")[1] == 2


def test_f03_a_job_number_that_is_none_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping.shutil, "which", lambda _: "/bin/true")
    assert not stopping.requeue({"SLURM_JOB_ID": "1; touch canary"})
    assert stopping.requeue({"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"})


# F5 to F7: processes that train together

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def test_f05_sigterm_to_one_of_two_processes_ends_both_with_one_checkpoint(drawn: Path, tmp_path: Path) -> None:
    code, err = end_of(start(tiny_run.words(drawn, tmp_path, *TWO), fault="1:step:2:SIGTERM"))
    assert code == 143, err[-3000:]
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints")[1] == 2
    assert err.count("error: ") == 1


def test_f06_a_killed_process_is_named_and_the_other_ends(drawn: Path, tmp_path: Path) -> None:
    code, err = end_of(start(tiny_run.words(drawn, tmp_path, *TWO), fault="1:step:2:SIGKILL"))
    assert code == 7, err[-3000:]
    assert "process 1 (pid " in err
    assert "died" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP", "sleep"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_f06_f07_a_killed_or_hung_process_ends_all_within_30_seconds(
    rank: str, number: str, drawn: Path, tmp_path: Path
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=0"]
    process = start(tiny_run.words(drawn, tmp_path, *TWO), f"{rank}:step:3:{number}", torchrun)
    checkpoint = tmp_path / "tiny" / "version_0" / "checkpoints" / "last.ckpt"
    wait_until(lambda: checkpoint.exists() and read_checkpoint(checkpoint)["global_step"] == 2)
    stopped = time.monotonic()
    code, err = end_of(process)
    assert code != 0
    # torchrun sees a death first and names it in its own words; what stands still, it does not see.
    by_torchrun = f"rank      : {rank} (local_rank: {rank})\n  exitcode  : -9" in err
    assert f"process {rank} (pid " in err or (number == "SIGKILL" and by_torchrun), err[-3000:]
    assert time.monotonic() - stopped < 30


@pytest.mark.slow
def test_f07_a_hung_process_ends_an_evaluation_too(drawn: Path, tmp_path: Path) -> None:
    assert end_of(start(tiny_run.words(drawn, tmp_path)))[0] == 0
    folder = folder_of(tmp_path)
    given = ("--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "best.ckpt"))
    words = ["validate", *given, "--trainer.num_sanity_val_steps", "0", *TWO]
    code, err = end_of(start(words, fault="1:validation:1:SIGSTOP"))
    assert code == 7, err[-3000:]
    assert "process 1 (pid " in err
    assert "begin the evaluation again" in err


@pytest.mark.slow
def test_f06_two_processes_go_on_to_the_same_bits_after_a_kill(drawn: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, err = end_of(start(tiny_run.words(drawn, whole, *TWO)))
    assert code == 0, err[-3000:]
    command = tiny_run.words(drawn, broken, *TWO, "--resume", "auto")
    assert end_of(start(command, fault="1:step:6:SIGKILL"))[0] == 7
    code, err = end_of(start(command))
    assert code == 0, err[-3000:]
    assert same_end(folder_of(whole), folder_of(broken))


# F8 to F10: disks


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 3 MB that every user may enter, where this user may mount one."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        folder.rmdir()
        pytest.skip("mounting a file system takes root")
    folder.chmod(0o755)
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def checkpoint_of(megabytes: float, step: int = 1) -> dict[str, object]:
    """The state of a training, of the size that is asked for."""
    whole = torch.load(golden.GOLDEN / "0.1.0.ckpt", weights_only=True)
    return {**whole, "state_dict": {"weight": torch.zeros(int(megabytes * 250_000))}, "global_step": step}


def test_f08_a_full_disk_is_named_and_the_previous_checkpoint_is_whole(small_disk: Path) -> None:
    path = small_disk / "checkpoints" / "last.ckpt"
    WholeFileIO().save_checkpoint(checkpoint_of(1.5, step=1), path)
    with pytest.raises(ResourceError) as stopped:
        WholeFileIO().save_checkpoint(checkpoint_of(4, step=2), path)
    message = str(stopped.value)
    assert str(path.parent) in message
    assert "full" in message
    assert "MB free" in message
    assert "--runs_dir" in message
    assert read_checkpoint(path)["global_step"] == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EROFS, "writable")])
def test_f08_f10_a_write_that_fails_ends_the_run_with_code_5_and_what_was_saved_stays(
    number: int,
    word: str,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sync(handle: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs > 6:
            raise OSError(number, os.strerror(number))

    syncs = 0
    monkeypatch.setattr(os, "fsync", sync)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    assert word in capsys.readouterr().err
    checkpoints = folder_of(tmp_path) / "checkpoints"
    assert newest_checkpoint(checkpoints)[1] >= 2
    assert list(checkpoints.glob(".*.tmp")) == []


def test_f08_torchs_own_words_for_a_full_disk_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", lambda *_: fail_with(error)())
    with pytest.raises(ResourceError, match="full"):
        WholeFileIO().save_checkpoint({}, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "save", lambda *_: fail_with(RuntimeError("something else"))())
    with pytest.raises(RuntimeError, match="something else"):
        WholeFileIO().save_checkpoint({}, tmp_path / "last.ckpt")


def test_f09_a_full_disk_for_logs_alone_is_said_once_and_training_goes_on(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(loggers, "_warned", set())
    monkeypatch.setattr(loggers.CSVLogger, "save", lambda _: full())
    monkeypatch.setattr(loggers.TensorBoardLogger, "log_metrics", lambda *_: full())
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 0
    said = [record.getMessage() for record in caplog.records if "training continues without" in record.getMessage()]
    assert len(said) == 2
    assert read_checkpoint(folder_of(tmp_path) / "checkpoints" / "last.ckpt")["global_step"] == 16


def test_f10_a_folder_that_refuses_is_named_before_training_begins(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint_io.os, "replace", refuse)  # as root, permissions stop nobody
    monkeypatch.setattr(DetectionModule, "training_step", fail_with(AssertionError("it trained")))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    message = capsys.readouterr().err
    assert "Permission denied" in message
    assert str(folder_of(tmp_path) / "checkpoints") in message


def test_f10_a_read_only_disk_and_a_foreign_folder_refuse_a_real_save(small_disk: Path) -> None:
    path = small_disk / "checkpoints" / "last.ckpt"
    WholeFileIO().save_checkpoint(checkpoint_of(0.1), path)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ResourceError, match="Read-only"):
        WholeFileIO().save_checkpoint(checkpoint_of(0.1, step=2), path)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    path.parent.chmod(0o555)
    os.seteuid(65534)
    try:
        with pytest.raises(ResourceError, match="Permission denied"):
            WholeFileIO().save_checkpoint(checkpoint_of(0.1, step=2), path)
    finally:
        os.seteuid(0)
    assert read_checkpoint(path)["global_step"] == 1


# F11 to F13: workers of the loader


@pytest.fixture
def fault_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], None]:
    """Let something happen once, in a worker, when a file with that name is read."""
    parent = os.getpid()

    def install(name: str, action: Callable[[], object]) -> None:
        import onestage.data.images as images

        read = images.read_file

        def broken(file: Path, *arguments: object) -> bytes:
            if os.getpid() != parent and Path(file).name == name:
                action()
            return read(file, *arguments)

        monkeypatch.setattr(images, "read_file", broken)

    return install


def image_of_step(step: int) -> str:
    """The file of the first image of a step of the first epoch, as the sampler orders them."""
    import numpy as np

    order = np.random.default_rng((42, 0)).permutation(32)
    return f"{int(order[4 * step]) + 1:06d}.jpg"


def test_f11_a_killed_worker_is_named_with_its_file_and_the_run_goes_on_exactly(
    drawn: Path,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
    fault_in_a_worker: Callable[[str, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = image_of_step(5)
    flag = tmp_path / "once"

    def die() -> None:
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    fault_in_a_worker(name, die)
    # Only the death itself may write the checkpoint.
    options = ("--data.num_workers", "1", "--data.prefetch_factor", "1", "--last_checkpoint.every_n_steps", "0")
    command = tiny_run.words(drawn, tmp_path / "runs", *options, "--resume", "auto")
    assert tiny_run.onestage(*command) == 3
    message = capsys.readouterr().err
    assert "was killed by SIGKILL" in message
    assert name in message
    folder = folder_of(tmp_path / "runs")
    assert newest_checkpoint(folder / "checkpoints")[1] == 5
    assert tiny_run.onestage(*command) == 0
    assert same_end(uninterrupted(), folder)


def test_f12_a_hung_worker_is_ended_and_named_with_its_file(
    drawn: Path,
    tmp_path: Path,
    fault_in_a_worker: Callable[[str, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, flag = image_of_step(2), tmp_path / "hangs"
    fault_in_a_worker(name, lambda: [flag.touch(), time.sleep(600)])
    step = DetectionModule.training_step

    def impatient_once_it_hangs(self: DetectionModule, batch: object, batch_idx: int) -> object:
        """A second is short for a busy machine: it counts from when the worker, one batch ahead, is where it stays."""
        if batch_idx == 1:
            wait_until(flag.exists)
            watch = self.trainer.datamodule._train_loader.watch
            assert watch.timeout_seconds == SECONDS
            watch.timeout_seconds = 1.0
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DetectionModule, "training_step", impatient_once_it_hangs)
    options = ("--data.num_workers=1", "--data.prefetch_factor=1", f"--data.worker_timeout_seconds={SECONDS}")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, *options)) == 3
    message = capsys.readouterr().err
    assert "stood still for 1 s" in message
    assert name in message


def test_f13_full_shared_memory_says_which_option_makes_it_larger(
    drawn: Path,
    tmp_path: Path,
    fault_in_a_worker: Callable[[str, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def bus_error() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGBUS)  # what writing to a full /dev/shm ends in

    fault_in_a_worker(image_of_step(1), bus_error)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--data.num_workers", "1")) == 5
    assert "--shm-size" in capsys.readouterr().err


# F15: memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_f15_too_little_memory_names_the_batch_size_and_leaves_the_checkpoint(
    error: BaseException,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_method(monkeypatch, "training_step", 4, fail_with(error))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    message = capsys.readouterr().err
    assert "data.batch_size" in message
    assert "--auto_batch" in message
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints")[1] == 3


# F16 to F18: which file is the newest, whose folder it is, and whether it is whole


def test_f16_the_step_inside_decides_and_not_the_time_of_the_file(tmp_path: Path) -> None:
    for name, step, when in (("best.ckpt", 40, 1_000), ("last.ckpt", 50, 500), ("previous.ckpt", 45, 2_000)):
        WholeFileIO().save_checkpoint(checkpoint_of(0.01, step), tmp_path / name)
        os.utime(tmp_path / name, (when, when))
    assert newest_checkpoint(tmp_path) == (tmp_path / "last.ckpt", 50)


def test_f16_of_equal_steps_the_last_is_later_than_the_best(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        WholeFileIO().save_checkpoint(checkpoint_of(0.01, 8), tmp_path / name)
    assert newest_checkpoint(tmp_path)[0].name == "last.ckpt"


def test_f17_the_second_run_in_a_folder_refuses_and_a_dead_owner_does_not_count(tmp_path: Path) -> None:
    ready, stop = os.pipe(), os.pipe()
    owner = os.fork()
    if owner == 0:
        take_run_folder(tmp_path)
        os.write(ready[1], b"1")
        os.read(stop[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(RunInUseError, match=f"process {owner} on .*started"):
        take_run_folder(tmp_path)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    take_run_folder(tmp_path)


def test_f17_resuming_a_run_that_is_going_on_is_refused_with_code_4(drawn: Path, tmp_path: Path) -> None:
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto", "--trainer.max_epochs", "500")
    going_on = os.fork()
    if going_on == 0:
        code = 99
        try:
            code = tiny_run.onestage(*command)
        finally:
            os._exit(code)  # never back into the tests
    try:
        wait_until(lambda: list(tmp_path.glob("tiny/version_0/checkpoints/*.ckpt")))
        assert tiny_run.onestage(*command) == 4
        os.kill(going_on, signal.SIGTERM)
    except BaseException:
        os.kill(going_on, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(going_on, 0)
    assert os.waitstatus_to_exitcode(status) == 143


@pytest.fixture(scope="module")
def stopped(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 16 steps that was stopped after step 6, to be copied by who goes on with it."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        break_method(patch, "training_step", 6, lambda: tiny_run.send(signal.SIGTERM))
        assert tiny_run.onestage(*tiny_run.words(drawn, runs)) == 143
    return folder_of(runs)


@pytest.mark.parametrize("damage", ["truncated", "flipped byte", "deleted", "empty"])
def test_f18_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    damage: str,
    stopped: Path,
    drawn: Path,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "tiny" / "version_0")
    last = folder / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    middle = len(content) // 2
    last.write_bytes(
        {
            "truncated": content[:middle],
            "flipped byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "deleted": b"",
            "empty": b"",
        }[damage]
    )
    if damage == "deleted":
        last.unlink()
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto")) == 0
    said = capsys.readouterr().err
    assert "previous.ckpt (optimizer step 5)" in said
    assert damage == "deleted" or str(last) in said
    assert same_end(uninterrupted(), folder)


def test_f18_if_none_is_whole_that_is_an_error_and_not_a_new_run(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto", "--trainer.max_steps", "3")
    assert tiny_run.onestage(*command) == 0
    for file in (folder_of(tmp_path) / "checkpoints").glob("*.ckpt"):
        file.write_bytes(file.read_bytes()[:-1])
    assert tiny_run.onestage(*command) == 2
    assert "--resume none" in capsys.readouterr().err


# F19, F20: other versions, other data


def test_f19_another_schema_is_refused_and_other_packages_are_said(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tiny_run.words(drawn, tmp_path, "--resume", "auto")
    with monkeypatch.context() as patch:
        break_method(patch, "training_step", 2, lambda: tiny_run.send(signal.SIGTERM))
        assert tiny_run.onestage(*command) == 143
    last = folder_of(tmp_path) / "checkpoints" / "last.ckpt"
    last.with_name("previous.ckpt").unlink()
    saved = torch.load(last, weights_only=True)
    saved["onestage"]["versions"]["torch"] = "2.0.0"
    torch.save(saved, last)
    assert tiny_run.onestage(*command) == 0
    assert "torch 2.0.0" in capsys.readouterr().err
    for schema in (0, 99):
        saved["onestage"]["schema"] = schema
        torch.save(saved, tmp_path / "other.ckpt")
        assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", str(tmp_path / "other.ckpt"))) == 2
        assert f"schema {schema}" in capsys.readouterr().err


def test_f19_other_numbers_of_workers_give_the_same_bits(
    stopped: Path, drawn: Path, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "tiny" / "version_0")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto", "--data.num_workers", "2")) == 0
    assert same_end(uninterrupted(), folder)


def edit_a_box(data: Path) -> None:
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))


def edit_a_byte(data: Path) -> None:
    """In the middle of a training image, which has other pixels then."""
    name = json.loads((data / "annotations" / "instances_train.json").read_text())["images"][3]["file_name"]
    content = bytearray((data / "JPEGImages" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (data / "JPEGImages" / name).write_bytes(content)


@pytest.mark.parametrize(("edit", "told"), [(edit_a_box, "training annotations"), (edit_a_byte, "training images")])
def test_f20_changed_data_is_refused_unless_the_change_is_meant(
    edit: Callable[[Path], None],
    told: str,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    options = [
        "--data.source", "onestage.data.COCO",
        "--data.train_annotations", "annotations/instances_train.json", "--data.train_images", "JPEGImages",
        "--data.val_annotations", "annotations/instances_val.json", "--data.val_images", "JPEGImages",
    ]  # fmt: skip
    drop = {"--data.source.num_train", "--data.source.num_val", "--data.source.draw_seed"}
    words = iter(tiny_run.words(data, tmp_path / "runs", *options, "--resume", "auto"))
    command = [word for word in words if word not in drop or not next(words)]
    with monkeypatch.context() as patch:
        break_method(patch, "training_step", 2, lambda: tiny_run.send(signal.SIGTERM))
        assert tiny_run.onestage(*command) == 143
    edit(data)
    assert tiny_run.onestage(*command) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "--allow_data_change true" in error
    assert tiny_run.onestage(*command, "--allow_data_change", "true") == 0


def test_the_names_of_the_modules_that_the_faults_break_are_still_theirs() -> None:
    """A fault that no longer reaches its place would let every test above pass for nothing."""
    assert checkpoint_io.os is os
    assert loader_module.WorkerWatch is worker_watch.WorkerWatch
    assert issubclass(DataError, Exception)
    assert callable(keep_previous)
