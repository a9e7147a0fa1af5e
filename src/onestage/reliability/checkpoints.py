"""Which checkpoints a run keeps, and what is in them beside Lightning's own."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from onestage.errors import CheckpointError, ConfigError, DataError
from onestage.evaluation.results import installed_versions
from onestage.reliability.checkpoint_files import read_checkpoint
from onestage.reliability.checkpoint_io import copy_whole, keep_previous, require_writable
from onestage.reliability.fingerprint import fingerprints
from onestage.reliability.save_points import (
    forget_unfinished_validation,
    is_after_step,
    is_between_batches,
    is_dry,
    is_last_batch,
    is_training,
    mark_validation_due,
    validation_follows,
)
from onestage.training.module import CHECKPOINT_KEY, DetectionModule
from onestage.types import JSONDict

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class BestCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/best.ckpt`, the weights with the best metric so far.

    Args:
        monitor: a logged metric, such as `val/mAP` or `val/AP50`.
        mode: `max` where more is better.
        dirpath: the folder; null: `checkpoints/` of the run.
    """

    def __init__(self, monitor: str = "val/mAP", mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath, filename=Path(BEST).stem, monitor=monitor, mode=mode, enable_version_counter=False
        )
        self._inherited: Path | None = None  # the best checkpoint of the run that is resumed
        self._copies = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look for the best checkpoint of the run that is resumed; all processes go by what the first one finds."""
        self._copies = trainer.is_global_zero
        best = None
        if trainer.is_global_zero and is_training(trainer):
            state = checkpoint["callbacks"].get(self.state_key)
            best = _stored_best(state, Path(str(trainer.ckpt_path)).parent, Path(str(self.dirpath)))
        self._inherited = trainer.strategy.broadcast(best)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the metric where it costs no epoch: the validation before training logs all there are.

        Raises:
            ConfigError: it is one of the validation and was not logged.
        """
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        if logged and str(self.monitor).startswith("val/") and self.monitor not in logged:
            raise ConfigError(
                f"best_checkpoint.monitor is {self.monitor}, which the validation does not log.\n"
                f"Set it to one of {', '.join(logged)}. For one that is logged only once training has begun, set "
                "trainer.num_sanity_val_steps: 0."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best checkpoint of the run that is resumed, as a copy in this run's folder.

        Lightning forgets the best score when the folder changes: the first validation after a resume would win.
        """
        if self._inherited is None:
            return  # without its file, its score is nothing to go by
        copy = Path(str(self.dirpath)) / BEST
        if self._copies and copy.resolve() != self._inherited.resolve():
            copy_whole(self._inherited, copy)
        score = state_dict["best_model_score"]
        ours = {
            "dirpath": str(self.dirpath),
            "best_model_path": str(copy),
            "best_k_models": {str(copy): score},
            "kth_best_model_path": str(copy),
            "kth_value": score,
            "last_model_path": "",
        }
        super().load_state_dict({**state_dict, **ours})
        self.current_score = state_dict.get("current_score")  # which Lightning leaves out


def _stored_best(state: object, beside: Path, own: Path) -> Path | None:
    """Return the best checkpoint that a run knew of, in the folder of the checkpoint that is resumed or in our own.

    The stored path is that of the machine and the day on which it was written, and a checkpoint from somewhere may
    name any file that this user can read: it is followed into these two folders only.
    """
    score = state.get("best_model_score") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(score, Tensor) or score.numel() != 1:
        return None  # nothing was validated before it was written
    stored = Path(str(state.get("best_model_path") or ""))
    best = stored if stored.parent in (beside, own) else beside / BEST
    try:
        if stored.name != BEST:
            raise CheckpointError(f"a path to {BEST} is expected, not {str(stored)!r}.")
        read_checkpoint(best)
    except (CheckpointError, OSError) as error:
        said = str(error).partition("\n")[0]
        rank_zero_info(
            f"resume: the best checkpoint so far is not taken over, so the next one will be the best: {said}"
        )
        return None
    return best


class LastCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, the state to resume from, and the one before it as `checkpoints/previous.ckpt`.

    It is written at intervals, and when a signal or a data error ends the run.

    Args:
        every_n_epochs: how often it is written; 0: not at the ends of epochs.
        every_n_steps: the same in optimizer steps, for epochs that are long; 0: not inside epochs.
        dirpath: the folder; null: `checkpoints/` of the run.

    Raises:
        ConfigError: an interval is negative.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int = 0, dirpath: str | None = None) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value < 0:
                raise ConfigError(f"last_checkpoint.{name} is {value}; it must be 0 (never) or more.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._is_due = False  # an interval ended where no checkpoint can be written yet
        self._is_before_validation = False
        self._saved: tuple[int, bool] | None = None  # global step and whether a validation was due

    @property
    def path(self) -> Path:
        """Of the newest state."""
        return Path(str(self.dirpath)) / LAST

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the folder of the first process, and see that it can be written."""
        self.dirpath = trainer.strategy.broadcast(self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints"))
        writes = stage == "fit" and trainer.is_global_zero and not is_dry(trainer)
        if writes and (self.every_n_epochs or self.every_n_steps):
            require_writable(self.path.parent)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin with the state of another run that is gone on from: killed before its first save, this one has that.

        Every callback is asked this before `BestCheckpoint` brings an older state into the folder.
        """
        resumed = Path(str(trainer.ckpt_path))
        if trainer.is_global_zero and is_training(trainer) and resumed.resolve().parent != self.path.resolve().parent:
            keep_previous(self.path, self.path.with_name(PREVIOUS))
            copy_whole(resumed, self.path)

    def save(self, trainer: pl.Trainer, *, before_validation: bool = False) -> None:
        """Write the state of this moment, which must be one of those of `save_points`, unless it has been written.

        Raises:
            ResourceError: it could not be written; the last one is untouched.
        """
        moment = (trainer.global_step, before_validation)
        self._is_due = False
        if moment == self._saved or trainer.global_step == 0:
            return
        if trainer.is_global_zero:
            keep_previous(self.path, self.path.with_name(PREVIOUS))
        self._is_before_validation = before_validation
        try:
            trainer.save_checkpoint(self.path, False)  # not the weights alone, and Lightning says less if told
        finally:
            self._is_before_validation = False
        self._saved = moment

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the resumed run begin with the validation that this one did not finish."""
        if self._is_before_validation:
            mark_validation_due(checkpoint)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if an interval of steps has ended, or wait for the validation or the end of the epoch to come."""
        if not self.every_n_steps or not is_training(trainer) or not is_after_step(trainer):
            return
        self._is_due |= trainer.global_step % self.every_n_steps == 0
        if self._is_due and not is_last_batch(trainer) and not validation_follows(trainer):
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if an interval has ended with the batch before."""
        if is_training(trainer):
            forget_unfinished_validation(trainer)
            if self._is_due:
                self.save(trainer, before_validation=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if an interval of epochs has ended, or one of steps with the last batch."""
        if not is_training(trainer):
            return
        if self._is_due or (self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0):
            self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save when the data ends the run: nothing is wrong with the weights, and the step before is whole.

        Not with several processes: the others wait somewhere else, and a checkpoint needs all of them.
        """
        if not isinstance(exception, DataError) or not is_training(trainer) or trainer.world_size > 1:
            return
        if is_between_batches(trainer) and is_after_step(trainer):
            self.save(trainer, before_validation=trainer.validating)


class ConfigInCheckpoint(Callback):
    """Stores in every checkpoint what made it, so that one file is enough to predict.

    That is the run's `model` and `data` configuration, fingerprints of the training annotations and images, and the
    versions of the packages.
    """

    def __init__(self, config: JSONDict) -> None:
        self.config = config
        self._origin: JSONDict = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the fingerprints once, where files are written: what a run is trained on does not change."""
        if trainer.is_global_zero:
            annotations = cast(DetectionModule, pl_module).data.annotations("train")
            self._origin = {**fingerprints(annotations), "versions": installed_versions()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add it beside the class names."""
        checkpoint.setdefault(CHECKPOINT_KEY, {}).update({"config": self.config, **self._origin})
