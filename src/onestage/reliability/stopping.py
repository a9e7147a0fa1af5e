"""End a run in order, with a checkpoint and the right exit code."""

import contextlib
import errno
import os
import signal
import subprocess
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from onestage.errors import CancelledError, CheckpointError, ConfigError, OnestageError, ResourceError, TerminatedError
from onestage.files import OUT_OF_SPACE
from onestage.reliability.callbacks import LastCheckpoint, is_after_step, is_last_batch, is_training, validation_follows
from onestage.reliability.checkpoints import BEST, LAST
from onestage.reliability.watchdog import await_watchdog_verdict, is_connection_lost
from onestage.training.loggers import first_line

PACKAGE = Path(__file__).parents[1]
LIGHTNING_PARTS = {"callbacks": "trainer.callbacks", "loggers": "trainer.logger", "profilers": "trainer.profiler"}
CHILD_SECONDS = 20.0  # how long the first process waits for those it started, when all of them end


class StopOnSignal(Checkpoint):  # a Checkpoint, because Lightning calls those last: all state is final by then
    """End a run at the next resumable moment, with the exit code of the signal.

    The handler only stores the signal. After every batch the processes agree whether one of them has received any, so
    that all stop after the same step. Ctrl-C after any signal ends the process at once. SIGUSR1, by which SLURM
    announces the end of a job, is left to Lightning's SLURMEnvironment. last: writes the checkpoint, or None.
    """

    def __init__(self, last: LastCheckpoint | None) -> None:
        self.last = last
        self.received: int | None = None
        self._group: Any = None  # of processes, on the CPU: the exchange must not wait for the device
        self._num_common_batches = 0  # of a validation, in every process

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Lightning installs its own before and removes all later."""
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=30))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._store_signal)
            signal.signal(signal.SIGINT, self._store_signal)

    on_train_start = on_sanity_check_start

    def _store_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            message = "error: interrupted while stopping; the last checkpoint is complete. Continue with --resume auto."
            with contextlib.suppress(OSError):
                os.write(2, f"\n{message}\n".encode())
            os._exit(CancelledError.exit_code)
        if self.received is None:
            self.received = number
            with contextlib.suppress(OSError):  # Ctrl-C ends `| tee` first
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step and a checkpoint\n".encode())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here, unless a validation or the end of the epoch follows."""
        is_moment = is_after_step(trainer) and not is_last_batch(trainer) and not validation_follows(trainer)
        if is_moment and self._all_agree(trainer):
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Count the batches that every process has: some have one batch more."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        num_batches = sum(min(number, 2**31) for number in (batches if isinstance(batches, list) else [batches]))
        self._num_common_batches = self._minimum(int(num_batches))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
    ) -> None:
        """Stop inside a validation, which the resumed run repeats.

        Not between accumulated batches: their gradients are in no checkpoint, so the run continues to the next step.
        """
        is_moment = is_after_step(trainer) or not is_training(trainer)
        if is_moment and index < self._num_common_batches and self._all_agree(trainer):
            self._stop(trainer, before_validation=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop between two epochs."""
        if self._all_agree(trainer):
            self._stop(trainer)

    def _all_agree(self, trainer: pl.Trainer) -> bool:
        """Return whether any process has received a signal; the answer is the same in all."""
        number = -self._minimum(-(self.received or 0))
        if number:  # if not, a signal may have arrived during the exchange
            self.received = number
        return bool(number)

    def _minimum(self, value: int) -> int:
        """Return the smallest value of all processes."""
        if self._group is None:
            return value
        minimum = torch.tensor(value)
        torch.distributed.all_reduce(minimum, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(minimum)

    def _stop(self, trainer: pl.Trainer, *, before_validation: bool = False) -> None:
        """Save, then raise CancelledError after SIGINT and TerminatedError after SIGTERM."""
        kept = ""
        if self.last is not None and is_training(trainer):
            self.last.save(trainer, before_validation=before_validation)
            if self.last.path.is_file():
                kept = f" Its state is in {self.last.path}; continue with --resume auto."
                if not self.last.path.with_name(BEST).is_file():
                    kept += f"\nNothing was validated yet, so there is no {BEST}: to evaluate it, use {LAST}."
        kind: type[OnestageError] = CancelledError if self.received == signal.SIGINT else TerminatedError
        name = signal.Signals(self.received or signal.SIGTERM).name
        _await_children(trainer)
        message = f"{name} ended the run after {trainer.global_step} steps.{kept}"
        raise kind(message if trainer.is_global_zero else "")


def _await_children(trainer: pl.Trainer) -> None:
    """Let the processes that Lightning started end by themselves."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    children = [child for child in started if isinstance(child, subprocess.Popen)]
    if not children:
        return
    started.clear()  # so that Lightning does not signal them

    def wait_or_kill() -> None:
        for child in children:
            try:
                child.wait(CHILD_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()

    threading.Thread(target=wait_or_kill, name="children").start()  # not a daemon: Python waits for it at exit


@contextlib.contextmanager
def mapped_errors() -> Iterator[None]:
    """Map exceptions of libraries to the errors of this project."""
    try:
        yield
    except OnestageError:
        raise
    except MisconfigurationException as error:  # Lightning's error for settings that conflict
        raise ConfigError(str(error)) from error
    except SIGTERMException as error:  # in an evaluation; a SystemExit without a code, which would mean success
        raise TerminatedError("SIGTERM ended the command.") from error
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns Ctrl-C into a SystemExit with code 1
        if KeyboardInterrupt in (type(error), type(error.__context__)):
            raise CancelledError("interrupted.") from error
        raise
    except Exception as error:
        if is_connection_lost(error):
            await_watchdog_verdict()
        mapped = _shortage(error) or _failure_in_lightning(error)
        if mapped is None:
            raise
        raise mapped from error


def _shortage(error: Exception) -> ResourceError | None:
    """Return the error that names what the machine has too little of, or None."""
    text = str(error).strip().partition("\n")[0][:300]
    if isinstance(error, OSError) and error.errno in (*OUT_OF_SPACE, errno.EACCES, errno.EROFS):
        return ResourceError(
            f"{error.filename or 'a file'} cannot be written: {error.strerror}.\n"
            "Free some space or make it writable, or set --runs_dir to another folder."
        )
    if not isinstance(error, RuntimeError | OSError | MemoryError):
        return None
    if any(word in text for word in ("/torch_", "shared memory", "Bus error", "bus error")):
        return ResourceError(
            f"the shared memory through which workers send images is full ({text}).\n"
            "Start the container with --shm-size=8g, or set data.num_workers: 0."
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return ResourceError(
            f"out of memory: {text}\nLower data.batch_size, or let --auto_batch true find what fits; "
            "trainer.accumulate_grad_batches keeps the batch of a step. Checkpoints are untouched."
        )
    return None


def _failure_in_lightning(error: Exception) -> OnestageError | None:
    """Return an error that names the checkpoint, callback, logger or profiler with which Lightning failed, or None."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(Path(frame.f_code.co_filename).name, frame.f_code.co_name) for frame in frames]
    if any(file == "checkpoint_connector.py" and "restore" in function for file, function in names):
        problem = f"an entry is malformed ({type(error).__name__}: {str(error)[:200]})"
        remedy = "Resume from another one, or start with --resume none."
        return CheckpointError(f"the checkpoint cannot be restored: {problem}.\n{remedy}")
    if isinstance(error, ValueError) and names[-1] == ("fit_loop.py", "setup_data"):  # more batches than an epoch has
        return ConfigError(f"trainer.val_check_interval: {first_line(error)}")
    for frame in reversed(frames):
        path, owner = Path(frame.f_code.co_filename), frame.f_locals.get("self")
        if path.is_relative_to(PACKAGE):
            return None
        if path.parent.name in LIGHTNING_PARTS and "pytorch" in path.parts and owner is not None:
            name, key = type(owner).__name__, LIGHTNING_PARTS[path.parent.name]
            problem = f"{name} cannot work in this run: {type(error).__name__}: {first_line(error)[:200]}"
            return ConfigError(f"{key}: {problem}\nCorrect its arguments as Lightning's manual says, or leave it out.")
    return None
