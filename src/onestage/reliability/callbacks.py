"""Write best.ckpt and last.ckpt at moments that can be resumed exactly.

Lightning saves between any two of its hooks and guesses, when it resumes, where it was. Three moments leave nothing to
guess: after an optimizer step inside an epoch, before a validation, and at the end of an epoch.
"""

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from onestage.errors import CheckpointError, ConfigError, DataError, require
from onestage.evaluation.results import installed_versions
from onestage.reliability.checkpoints import BEST, LAST, copy_file, keep_previous, read_checkpoint, require_writable
from onestage.reliability.resume import fingerprints
from onestage.training.module import CHECKPOINT_KEY
from onestage.types import JSONDict


def is_training(trainer: pl.Trainer) -> bool:
    """Return whether `fit` is past the sanity check and writes files."""
    is_dry = bool(getattr(trainer, "fast_dev_run", False))
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_dry


def is_after_step(trainer: pl.Trainer) -> bool:
    """Return whether the last batch ended in an optimizer step."""
    num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return num_batches % trainer.accumulate_grad_batches == 0 or is_last_batch(trainer)


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Return whether the last batch was the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready >= trainer.num_training_batches


def validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the last batch inside its epoch."""
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    is_epoch = every_epochs is None or (trainer.current_epoch + 1) % every_epochs == 0
    if not trainer.enable_validation or not is_epoch or every_batches in (None, float("inf")):
        return False
    loop = trainer.fit_loop.epoch_loop
    num_batches = loop.total_batch_idx + 1 if every_epochs is None else loop.batch_idx + 1
    return num_batches % int(every_batches) == 0


class SeededSteps(Callback):
    """Make dropout a function of (seed, process, epoch, batch), without any state."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Seed torch, NumPy and Python without waiting for the device."""
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        torch_seed, numpy_seed = np.random.SeedSequence(key).generate_state(2, dtype=np.uint64).tolist()
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed % 2**32)
        random.seed(numpy_seed)


class BestCheckpoint(ModelCheckpoint):
    """Keep `checkpoints/best.ckpt`, the weights with the best metric so far.

    Args:
        monitor: a logged metric, such as `val/mAP` or `val/AP50`.
        mode: `max` where more is better.
    """

    def __init__(self, monitor: str = "val/mAP", mode: str = "max") -> None:
        super().__init__(filename=Path(BEST).stem, monitor=monitor, mode=mode, enable_version_counter=False)
        self._inherited: Path | None = None  # the best checkpoint of the resumed run

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Find the best checkpoint of the resumed run, which lies beside the resumed one, for all processes."""
        best = Path(str(trainer.ckpt_path)).with_name(BEST)
        state = checkpoint["callbacks"].get(self.state_key)
        was_validated = isinstance(state, dict) and state.get("best_model_score") is not None
        has_best = trainer.is_global_zero and is_training(trainer) and was_validated
        try:
            if has_best:
                read_checkpoint(best)
        except (CheckpointError, OSError) as error:
            has_best = False
            rank_zero_info(f"resume: the best checkpoint so far is not used: {str(error).partition(chr(10))[0]}")
        self._inherited = trainer.strategy.broadcast(best if has_best else None)

    def on_sanity_check_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Raise ConfigError if the sanity check, and so no validation, logs the metric."""
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if logged and str(self.monitor).startswith("val/") and self.monitor not in logged:
            problem = f"best_checkpoint.monitor is {self.monitor}, which the validation does not log"
            remedy = "For a metric that is logged only in training, set trainer.num_sanity_val_steps: 0."
            raise ConfigError(f"{problem}.\nSet it to one of {', '.join(logged)}. {remedy}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the best checkpoint, after last.ckpt; keep its score, which Lightning forgets in another folder."""
        if self._inherited is not None:  # a score without its file is useless
            copy = Path(str(self.dirpath)) / BEST
            if copy.resolve() != self._inherited.resolve():
                rank_zero_only(copy_file)(self._inherited, copy)
            self.best_model_path = self.kth_best_model_path = str(copy)
            self.best_model_score = self.kth_value = state_dict["best_model_score"]
            self.best_k_models = {self.best_model_path: self.kth_value}
            self.current_score = state_dict.get("current_score")


class LastCheckpoint(Checkpoint):
    """Keep last.ckpt, the state to resume from, and previous.ckpt, the one before.

    It is written at intervals, and when a signal or a data error ends the run.

    Args:
        every_n_epochs: interval in epochs, >= 0; 0: not at the ends of epochs.
        every_n_steps: interval in optimizer steps, >= 0, for long epochs; 0: not inside epochs.
    """

    dirpath: str | None = None  # the run's folder of checkpoints

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int = 0) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            require(value >= 0, f"last_checkpoint.{name}", value, ">= 0 (0: never)")
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._is_due = False  # an interval ended at a moment that cannot be resumed
        self._is_before_validation = False
        self._saved: tuple[int, bool] | None = None  # global step and whether a validation was due

    @property
    def path(self) -> Path:
        """Return the path of the newest state."""
        return Path(str(self.dirpath)) / LAST

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Use the folder of the first process everywhere; check that it can be written."""
        self.dirpath = trainer.strategy.broadcast(self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints"))
        if trainer.is_global_zero and is_training(trainer) and (self.every_n_epochs or self.every_n_steps):
            require_writable(self.path)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Copy the state of another run, so that a kill before the first save is harmless."""
        resumed = Path(str(trainer.ckpt_path))
        if trainer.is_global_zero and is_training(trainer) and resumed.resolve().parent != self.path.resolve().parent:
            copy_file(resumed, self.path)

    def save(self, trainer: pl.Trainer, *, before_validation: bool = False) -> None:
        """Write the state of this moment, unless it is already written."""
        moment = (trainer.global_step, before_validation)
        self._is_due = False
        if moment == self._saved or trainer.global_step == 0:
            return
        if trainer.is_global_zero:
            with suppress(CheckpointError):  # a damaged file must not replace a good one
                if self._saved is None:
                    read_checkpoint(self.path)
                keep_previous(self.path)
        self._is_before_validation = before_validation
        trainer.save_checkpoint(self.path, False)  # False: not the weights alone
        self._is_before_validation = False
        self._saved = moment

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the resumed run start with the validation that this run did not finish.

        Lightning continues a validation if one batch is started and not finished; with none finished, at the first.
        """
        if self._is_before_validation:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            done = progress["total"]["completed"] - progress["current"]["completed"]
            progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
            progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["is_last_batch"] = False

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if an interval of steps has ended and nothing resumable follows."""
        is_end = self.every_n_epochs > 0 and trainer.global_step == trainer.max_steps
        is_due = is_end or (self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0)
        self._is_due |= is_due and is_training(trainer) and is_after_step(trainer)
        if self._is_due and not is_last_batch(trainer) and not validation_follows(trainer):
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Save if an interval ended with the batch before."""
        if is_training(trainer):
            total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            total.ready = total.started = total.processed = total.completed  # see `on_save_checkpoint`
            if self._is_due:
                self.save(trainer, before_validation=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Save if an interval of epochs has ended, or one of steps with the last batch."""
        is_due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        is_saved = trainer.global_step == (self._saved or (0,))[0] and not is_last_batch(trainer)  # cut by max_steps
        if is_training(trainer) and (self._is_due or is_due) and not is_saved:
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Save when the data end the run; with several processes they are not in step."""
        if not isinstance(exception, DataError) or not is_training(trainer) or trainer.world_size > 1:
            return
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        is_between_batches = total.ready == total.started == total.processed == total.completed
        if is_between_batches and is_after_step(trainer):
            self.save(trainer, before_validation=trainer.validating)


class ConfigInCheckpoint(Callback):
    """Store configuration, data fingerprints and versions in every checkpoint.

    config: the groups `model` and `data`. decisive: the settings that all processes must share, by their dotted keys.
    """

    def __init__(self, config: JSONDict, decisive: JSONDict) -> None:
        self.config, self.decisive = config, decisive
        self._origin: JSONDict = {}

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Raise ConfigError, in every process, if they have different configurations."""
        if trainer.world_size > 1:
            settings: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(settings, {key: repr(value) for key, value in self.decisive.items()})
            others = [rank for rank, other in enumerate(settings) if other != settings[0]]
            if others:
                pairs = set(settings[0].items()) ^ set(settings[others[0]].items())
                keys = ", ".join(sorted({key for key, _ in pairs}))
                problem = f"processes {others} have another configuration than process 0: {keys}"
                raise ConfigError(f"{problem}.\nStart every process with the same --config files and options.")

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Compute the fingerprints once, in the process that writes files."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # Lightning's type has none
        for each in (found for found in callbacks if isinstance(found, GradientAccumulationScheduler)):
            each.on_train_epoch_start(trainer)  # which a resumed epoch begins without
        if trainer.is_global_zero:
            annotations = module.data.annotations("train")
            self._origin = {**fingerprints(annotations), "versions": installed_versions()}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the origin beside the class names."""
        checkpoint.setdefault(CHECKPOINT_KEY, {}).update({"config": self.config, **self._origin})
