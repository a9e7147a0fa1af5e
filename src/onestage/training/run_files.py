"""Files of a training that people open: epochs.csv, curves.png, labels.png and train_batch.jpg."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from onestage.evaluation.drawing import draw_sheet, save_jpeg
from onestage.evaluation.figures import draw_labels, draw_training, save_figure, training_curves
from onestage.files import atomic_write, read_rows
from onestage.training.loggers import METRICS_FILE
from onestage.types import Batch

EPOCHS_FILE, CURVES_PICTURE, LABELS_PICTURE, BATCH_PICTURE = "epochs.csv", "curves.png", "labels.png", "train_batch.jpg"
MAX_DRAWN = 16  # images of the first batch


class EpochTable(Callback):
    """epochs.csv: a row for each validation of a training.

    Columns: number of the epoch, 1 the first; optimizer steps so far; lr of the first parameter group; train/*, the
    mean of each loss over the first process's batches since the row before; val/*, the losses and metrics of the
    validation, empty where undefined; seconds since the row before, or since the start or resume.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: dict[str, Tensor] = {}  # of the finite losses since the last row, and their number
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the losses of a batch, without waiting for the device."""
        # Lightning has divided this one by the number of accumulated batches.
        losses = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        names = [name for name in losses if name.endswith("loss")]
        values = torch.stack([losses[name].detach().double() for name in names])
        pairs = torch.stack([values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().double()], dim=1)
        self._sums = {name: self._sums.get(name, 0.0) + pair for name, pair in zip(names, pairs, strict=True)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the row of a validation; a row of the same step, which a resumed run repeats, is replaced."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        losses = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        for name, (total, count) in ((name, pair.tolist()) for name, pair in self._sums.items()):
            row[f"train/{name}"] = total / count if count else math.nan
        row |= {name: float(value) for name, value in losses.items()}
        row |= {f"val/{name}": value for name, value in pl_module.metrics.items()}  # NaN was logged as 0
        now = time.perf_counter()
        row["seconds"], self._start, self._sums = round(now - self._start, 2), now, {}
        if trainer.is_global_zero:
            add_row(self.path, row)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, so that the first row after a resume has the means of an uninterrupted run."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums."""
        self._sums = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in state_dict.items()}


def add_row(path: Path, row: Mapping[str, float]) -> None:
    """Write a row after those of earlier steps; rows of its step and of later ones are dropped. NaN becomes empty."""
    _, rows = read_rows(path)
    text = {name: "" if math.isnan(value) else f"{value:.8g}" for name, value in row.items()}
    rows = [*(old for old in rows if int(old["step"]) < row["step"]), text]
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, fieldnames=[*dict.fromkeys(name for old in rows for name in old)])
        table.writeheader()
        table.writerows(rows)


class TrainingPictures(Callback):
    """Draw the labels and the first augmented batch when a training starts, and its curves when it ends.

    folder: of the run. No random number is drawn, so a run with pictures has the bits of one without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw the training labels."""
        if trainer.is_global_zero:
            save_figure(self.folder / LABELS_PICTURE, draw_labels(pl_module.data.annotations("train")))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Draw the first batch of a new run, with its boxes, as the network sees it."""
        if trainer.is_global_zero and trainer.global_step == batch_idx == trainer.current_epoch == 0:
            images = batch.images[:MAX_DRAWN].permute(0, 2, 3, 1).cpu().numpy()
            boxes, labels = (column[:MAX_DRAWN].cpu().numpy() for column in batch.targets)
            objects = [(box[label >= 0], label[label >= 0]) for box, label in zip(boxes, labels, strict=True)]
            save_jpeg(self.folder / BATCH_PICTURE, draw_sheet(images, objects, pl_module.data.class_names))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves of metrics.csv."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the latest rows
            _, rows = read_rows(self.folder / METRICS_FILE)
            if rows:
                save_figure(self.folder / CURVES_PICTURE, draw_training(training_curves(rows)))
