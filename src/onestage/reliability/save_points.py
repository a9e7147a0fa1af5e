"""The moments of a run whose state says everything: a run that goes on from one of them ends bit for bit the same.

Lightning saves between any two of its hooks and guesses, when it resumes, where it was. Three kinds of moments leave
nothing to guess: after an optimizer step inside an epoch, before a validation, and at the end of an epoch.
"""

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn


def is_training(trainer: pl.Trainer) -> bool:
    """Whether the weights are being trained: in `fit`, past the sanity check, in a run that keeps files."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_dry(trainer)


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether this is a trial of a few batches that keeps no files, trainer.fast_dev_run."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_after_step(trainer: pl.Trainer) -> bool:
    """Whether the batch just seen ended in an optimizer step. Gradients that still accumulate are in no checkpoint."""
    seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return seen % trainer.accumulate_grad_batches == 0 or is_last_batch(trainer)


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the batch just seen is the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready >= trainer.num_training_batches


def is_between_batches(trainer: pl.Trainer) -> bool:
    """Whether the training is done with one batch and has not got the next."""
    total = cast(_ProcessedTracker, trainer.fit_loop.epoch_loop.batch_progress.total)
    return total.ready == total.started == total.processed == total.completed


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether a validation begins after the batch just seen, which is not the last of its epoch."""
    loop = trainer.fit_loop.epoch_loop
    every = trainer.val_check_batch
    if not trainer.enable_validation or not loop._should_check_val_epoch() or every in (None, float("inf")):
        return False
    seen = loop.total_batch_idx + 1 if trainer.check_val_every_n_epoch is None else loop.batch_idx + 1
    return seen % int(every) == 0


def mark_validation_due(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint that is written before or inside a validation begin that validation when it is resumed.

    Lightning would skip what has been validated so far, though the detections of it are gone. Its word for "go on with
    a validation" is one batch started and not finished; with none finished before, it goes on with the first.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False


def forget_unfinished_validation(trainer: pl.Trainer) -> None:
    """At the start of a validation: take back the one batch more that `mark_validation_due` has counted."""
    total = cast(_ProcessedTracker, trainer.fit_loop.epoch_loop.val_loop.batch_progress.total)
    total.ready = total.started = total.processed = total.completed
