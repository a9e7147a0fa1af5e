"""Callbacks that report a run: images, results, anchor statistics, loss curves, the progress bar."""

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from onestage.errors import ConfigError
from onestage.evaluation import figures
from onestage.evaluation.anchor_losses import LossDistribution, anchor_statistics, missing_prior
from onestage.evaluation.drawing import BATCH_FILE, draw_boxes, draw_sheet, save_jpeg
from onestage.evaluation.results import write_records, write_results
from onestage.files import read_rows
from onestage.training.loggers import METRICS_FILE, write_rows
from onestage.training.module import DetectionModule, stage_of
from onestage.training.optimization import total_steps
from onestage.types import Batch, Detections, Predictions

IMAGES_FILE, EPOCHS_FILE = "images.json", "epochs.csv"
MAX_DRAWN = 16  # images of the first batch
TIMED_BATCHES = (10, 30)  # the run time is estimated from those between; the first ones are slower
SHORT_NAMES = {
    "train/loss": "loss",
    "train/classification_loss": "cls",
    "train/box_loss": "box",
    "train/objectness_loss": "obj",
    "val/mAP": "mAP",
    "val/AP50": "AP50",
}


class DetectionImages(Callback):
    """Draw ground truth and detections of the first images of every evaluation, and of all images to predict.

    Detections below the module's score threshold are not drawn; before the first evaluation the best ones are.
    folder: receives the JPEGs; those of an earlier evaluation are replaced. num_images: per process and evaluation.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.num_images = folder, num_images

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Use the first process's folder in all processes."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the batch if it is one of the first."""
        data, stage = pl_module.data, stage_of(trainer)
        left = len(batch.images) if stage == "predict" else self.num_images - batch_idx * data.batch_size
        for row, index in enumerate(batch.image_indices[: 0 if trainer.sanity_checking else max(0, left)].tolist()):
            annotations = data.annotations(stage)
            rows, image = annotations.objects(index), data.read_image(stage, index)
            objects = annotations.boxes[rows], annotations.labels[rows]
            found = Detections(*(values[row].cpu() for values in Detections(**outputs)))
            drawn = draw_boxes(image, *objects, found, data.class_names, score_threshold=pl_module.score_threshold)
            stem = Path(str(annotations.image_paths[index])).stem
            safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in stem)[:100]
            # The id makes the names of two images with one file name differ.
            save_jpeg(self.folder / f"{int(annotations.image_ids[index]):06d}_{safe}.jpg", drawn)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


class ResultsWriter(Callback):
    """Write results after every evaluation, so that an interrupted run has its latest: metrics, pictures, predictions.

    path: of `results.json` with metrics, or after a prediction of a COCO results file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the metrics of the split."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            evaluator, seconds = pl_module.evaluator, pl_module.evaluation_seconds
            evaluation, stage = evaluator.evaluation(), "test" if trainer.testing else "validate"
            write_results(self.path, stage, pl_module.metrics, evaluation, seconds, len(evaluator.image_rows))
            # Drawing takes a second, and `fit` ends with an evaluation of its best weights.
            if trainer.state.fn != TrainerFn.FITTING:
                figures.write_figures(self.path.parent, evaluation.analysis, pl_module.data.class_names)

    on_test_end = on_validation_end

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the detections of all processes, with the data set's own category ids, and a list of all images."""
        root = pl_module.data.predicted_root
        records, images = pl_module.evaluator.results(root), pl_module.evaluator.images(root)  # collective
        if trainer.is_global_zero:
            write_records(self.path, records)
            write_records(self.path.with_name(IMAGES_FILE), images)


class LossBar(TQDMProgressBar):
    """Progress bar of 80 columns with losses and mAP, and a line that stays for each validation.

    Without a terminal only the lines are printed. After 30 batches it prints how long the training will take.
    """

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} [{remaining}{postfix}]"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switch the bar off if standard output is a file or a pipe, where each refresh would be written."""
        super().setup(trainer, pl_module, stage)
        self._num_batches, self._start = 0, 0.0
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return the metrics behind the bar by short names; mAP in percent, as in the lines of the validations."""
        metrics = trainer.progress_bar_metrics
        texts = {
            name: f"{100 * value:.1f}" if name.startswith("val/") else f"{value:.2f}" for name, value in metrics.items()
        }
        return {short: texts[name] for name, short in SHORT_NAMES.items() if name in texts}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the metrics of a validation during training."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.is_global_zero:
            metrics = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
            parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
            parts += [f"{name} {100 * metrics[name]:.1f}" for name in ("mAP", "AP50") if name in metrics]
            self.print(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: {'  '.join(parts)}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, or as any line if there is none."""
        if self.is_enabled:
            super().print(*args, **kwargs)
        else:
            with suppress(BrokenPipeError):  # the end of `| tee` must not end the run
                print(*args, flush=True, **kwargs)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar; estimate the run time once."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._num_batches += 1
        first, last = TIMED_BATCHES
        if self._num_batches == first:
            self._start = time.perf_counter()
        elif self._num_batches == last and trainer.is_global_zero:
            seconds = (time.perf_counter() - self._start) / (last - first) * trainer.accumulate_grad_batches
            steps = total_steps(trainer) - trainer.global_step
            minutes = steps * seconds / 60
            if 1 <= minutes < math.inf:
                time_text = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
                self.print(f"training: about {time_text} for {steps:,.0f} steps")


class AnchorMonitor(Callback):
    """Log `anchors/*` to TensorBoard at every logged step, and check the first batch for a missing prior bias.

    Uses the batch with which the first process ends the step. A detector without `anchor_losses` is skipped.
    """

    @rank_zero_only
    @torch.no_grad()  # adaptive losses count the batches that have a gradient
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the composition of the loss of this batch."""
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # Lightning sets it; 0: never
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        is_logged = bool(loggers) and ends_step and every > 0 and trainer.global_step % every == 0
        is_first = batch_idx == trainer.current_epoch == 0
        if not (is_logged or is_first):
            return
        predictions: Predictions = outputs["predictions"]
        anchor_losses = pl_module.detector.anchor_losses(predictions, batch.targets)
        if anchor_losses is None:
            return
        if is_first and (warning := missing_prior(anchor_losses)):
            rank_zero_warn(warning)
        if is_logged:
            statistics = anchor_statistics(anchor_losses, predictions.anchors.strides)
            for logger in loggers:  # dozens of columns would bury the losses in metrics.csv
                logger.log_metrics(statistics, step=trainer.global_step - 1)  # that of the loss


class LossCollector(pl.LightningModule):
    """Run the trained detector of `module` over a split and collect the p_t of all anchors in `distribution`."""

    def __init__(self, module: DetectionModule, distribution: LossDistribution) -> None:
        super().__init__()
        self.module, self.distribution = module, distribution

    def setup(self, stage: str) -> None:
        """Check that data and detector fit together, as for an evaluation."""
        self.module.setup(stage)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch; ConfigError if the detector has no `anchor_losses`."""
        detector = self.module.detector
        anchor_losses = detector.anchor_losses(self.module.predict_batch(batch), batch.targets)
        if anchor_losses is None:
            raise ConfigError(
                f"{type(detector).__name__} does not return its classification loss per anchor.\n"
                "Give it the method anchor_losses (onestage.types.Detector)."
            )
        self.distribution.update(anchor_losses.labels, anchor_losses.true_probabilities)

    def on_validation_epoch_end(self) -> None:
        """Sum over the processes."""
        for tensor in (self.distribution.counts, self.distribution.losses):
            if self.trainer.world_size > 1:
                total = self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")
                tensor.copy_(torch.as_tensor(total))

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end


class EpochTable(Callback):
    """epochs.csv: a row for each validation of a training; docs/report.md has its columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: dict[str, Tensor] = {}  # of the finite losses since the last row, and their number
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the losses of a batch, without waiting for the device."""
        # Lightning has divided this one by the number of accumulated batches.
        losses = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        names = [name for name in losses if name.endswith("loss")]
        precise = torch.float32 if outputs["loss"].device.type == "mps" else torch.float64  # which MPS does not have
        values = torch.stack([losses[name].detach().to(precise) for name in names])
        pairs = torch.stack([values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().to(precise)], dim=1)
        # The sums of a checkpoint lie on the CPU.
        before = {name: pair.to(pairs.device) for name, pair in self._sums.items()}
        self._sums = {name: before.get(name, 0.0) + pair for name, pair in zip(names, pairs, strict=True)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the row of a validation; a row of the same step, which a resumed run repeats, is replaced."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        row |= {f"train/{name}": float(total / count) for name, (total, count) in self._sums.items()}  # 0 / 0: NaN
        row |= {name: float(loss) for name, loss in trainer.callback_metrics.items() if name.startswith("val/")}
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
    write_rows(path, [*dict.fromkeys(name for old in rows for name in old)], rows)


class TrainingPictures(Callback):
    """Draw the labels and the first augmented batch when a training starts, and its curves when it ends.

    folder: of the run. No random number is drawn, so a run with pictures has the bits of one without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw the training labels."""
        if trainer.is_global_zero:
            drawn = figures.draw_labels(pl_module.data.annotations("train"))
            figures.save_figure(self.folder / figures.LABELS_FILE, drawn)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Draw the first batch of a new run, with its boxes, as the network sees it."""
        if trainer.is_global_zero and trainer.global_step == batch_idx == trainer.current_epoch == 0:
            images = batch.images[:MAX_DRAWN].permute(0, 2, 3, 1).cpu().numpy()
            boxes, labels = (column[:MAX_DRAWN].cpu().numpy() for column in batch.targets)
            objects = [(box[label >= 0], label[label >= 0]) for box, label in zip(boxes, labels, strict=True)]
            save_jpeg(self.folder / BATCH_FILE, draw_sheet(images, objects, pl_module.data.class_names))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves of metrics.csv."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()  # the latest rows
            _, rows = read_rows(self.folder / METRICS_FILE)
            if rows:
                drawn = figures.draw_training(figures.training_curves(rows))
                figures.save_figure(self.folder / figures.CURVES_FILE, drawn)
