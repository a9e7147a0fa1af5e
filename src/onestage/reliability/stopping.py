"""Ending a run in order when somebody asks: SIGTERM, Ctrl-C, a scheduler that wants the machine back."""

import os
import re
import shutil
import signal
import subprocess
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from onestage.errors import CancelledError, OnestageError, TerminatedError
from onestage.reliability.checkpoints import LastCheckpoint
from onestage.reliability.save_points import is_after_step, is_last_batch, is_training, validation_follows

PATIENCE_SECONDS = 20.0  # that the first process has with the others when all of them end


class StopOnSignal(Checkpoint):  # a Checkpoint, because Lightning calls those last: what is saved is all there by then
    """Ends a run at the next moment that can be resumed, with a checkpoint and the exit code of the signal.

    A handler only notes the signal. After every batch the processes agree whether one of them has got any, so that all
    stop after the same step, whichever was told. Ctrl-C after any signal ends the process at once; files stay whole.

    Under SLURM, SIGUSR1 (`#SBATCH --signal=SIGUSR1@90`) also puts the job back into the queue.

    Args:
        last: writes the checkpoint; None: the run keeps none.
    """

    def __init__(self, last: LastCheckpoint | None) -> None:
        self.last = last
        self.received: int | None = None
        self._group: Any = None  # of processes, on the CPU: asking them must not wait for the device
        self._num_common_batches = 0  # of a validation, that every process has

    # Lightning installs its own handlers after all set-up hooks, and takes all of them back in the end.

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=30))
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        if "SLURM_JOB_ID" in os.environ:
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            os.write(
                2, b"\nerror: interrupted while stopping; the last checkpoint is whole. Go on with --resume auto.\n"
            )
            os._exit(CancelledError.exit_code)
        if self.received is None:
            self.received = number
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step and a checkpoint\n".encode())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, unless the state is only whole again in the validation or at the end of the epoch to come."""
        is_moment = is_after_step(trainer) and not is_last_batch(trainer) and not validation_follows(trainer)
        if is_moment and self._agreed(trainer):
            self._stop(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the batches after which the processes can ask each other: some may have one more than others."""
        self._num_common_batches = int(self._least(trainer, int(sum(_num_batches(trainer)))))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop inside a validation, which the resumed run begins again.

        Not between accumulated batches: their gradients are in no checkpoint, so the next optimizer step is waited for.
        """
        is_moment = is_after_step(trainer) or not is_training(trainer)
        if is_moment and batch_idx < self._num_common_batches and self._agreed(trainer):
            self._stop(trainer, before_validation=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop between two epochs."""
        if self._agreed(trainer):
            self._stop(trainer)

    def _agreed(self, trainer: pl.Trainer) -> bool:
        """Whether any process has received a signal; all of them get the same answer."""
        number = -self._least(trainer, -(self.received or 0))
        if number:  # otherwise one may have come in the meantime
            self.received = number
        return bool(number)

    def _least(self, trainer: pl.Trainer, value: int) -> int:
        if self._group is None:
            return value
        least = torch.tensor(value)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(least)

    def _stop(self, trainer: pl.Trainer, *, before_validation: bool = False) -> None:
        """Save and raise.

        Raises:
            CancelledError: by SIGINT.
            TerminatedError: by SIGTERM or the scheduler.
        """
        kept = ""
        if self.last is not None and is_training(trainer):
            self.last.save(trainer, before_validation=before_validation)
            kept = f" Its state is in {self.last.path}; go on with --resume auto." if self.last.path.is_file() else ""
        if self.received == signal.SIGUSR1 and trainer.is_global_zero:
            requeue(os.environ)
        kind: type[OnestageError] = CancelledError if self.received == signal.SIGINT else TerminatedError
        name = signal.Signals(self.received or signal.SIGTERM).name
        _release_children(trainer)
        raise kind(f"{name} ended the run after {trainer.global_step} steps.{kept}" if trainer.is_global_zero else "")


def _num_batches(trainer: pl.Trainer) -> list[float]:
    batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return [min(one, 2**31) for one in (batches if isinstance(batches, list) else [batches])]


def _release_children(trainer: pl.Trainer) -> None:
    """Give the processes that Lightning started the time to end by themselves, and not more."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or not launcher.procs:
        return
    children = list(launcher.procs)
    launcher.procs.clear()  # nobody else is to signal them

    def see_off() -> None:
        for child in children:
            try:
                child.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()

    threading.Thread(target=see_off, name="children").start()  # not a daemon: Python waits for it before it ends


def requeue(environment: Any) -> bool:
    """Put the SLURM job back into its queue, as `scontrol requeue` does; say whether that worked."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    command = shutil.which("scontrol")
    if command is None or not re.fullmatch(r"[0-9_]+", job):
        os.write(2, f"the job {job!r} could not be put back into the queue: no scontrol here\n".encode())
        return False
    return subprocess.run([command, "requeue", job], check=False).returncode == 0
