"""A whole `onestage fit` that takes seconds: a tiny detector with dropout on a drawn set, with faults on demand.

As a program it is `onestage` with the fault that the variable ONESTAGE_FAULT names (see `FAULTS`); the processes that
Lightning starts run this same file.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from tiny_training import TinyDetector

from onestage.types import Predictions

REPOSITORY = Path(__file__).resolve().parents[2]


class ForgetfulDetector(TinyDetector):
    """A tiny detector with dropout, so that a resumed run that draws other random numbers ends with other weights."""

    dropout: ClassVar = 0.2

    def forward(self, images: Tensor) -> Predictions:
        predictions = super().forward(images)
        logits = torch.nn.functional.dropout(predictions.class_logits, self.dropout, self.training)
        return predictions._replace(class_logits=logits)


def words(data: Path, runs: Path, *options: str, epochs: int = 2) -> list[str]:
    """The command line of a run of 8 steps an epoch, saved at every step."""
    return [
        "fit", "--config", str(REPOSITORY / "configs" / "shapes_ssd.yaml"), "--experiment", "tiny",
        "--data.root", str(data), "--data.num_train", "32", "--data.num_val", "7", "--data.draw_seed", "0",
        "--data.num_workers", "0", "--data.batch_size", "4", "--data.image_size", "64",
        "--model.detector.class_path", "tiny_run.ForgetfulDetector", "--model.schedule.warmup_steps", "3",
        "--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true",
        "--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--drawn_images", "0",
        "--last_checkpoint.every_n_steps", "1", "--runs_dir", str(runs), *options,
    ]  # fmt: skip
