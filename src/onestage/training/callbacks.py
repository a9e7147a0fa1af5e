"""Callbacks that show a run: drawn detections, the results file, written predictions, the progress bar."""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

from onestage.evaluation.drawing import draw_boxes, save_jpeg
from onestage.evaluation.results import format_table, write_coco_results, write_results
from onestage.training.module import DetectionModule
from onestage.types import AnnotationSet, Batch, Detections, Stage


class DetectionImages(Callback):
    """Draws ground truth and detections of the first images of every evaluation into `predictions/`.

    Args:
        folder: where the JPEGs go; files of an earlier evaluation are replaced.
        num_images: how many images of each process are drawn.
        score_threshold: detections below it are not drawn, 0..1.
    """

    def __init__(self, folder: Path, num_images: int, score_threshold: float) -> None:
        self.folder = folder
        self.num_images = num_images
        self.score_threshold = score_threshold
        self._num_drawn = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the folder of the first process."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin again with the first image."""
        self._num_drawn = 0

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin again with the first image."""
        self._num_drawn = 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw what is still missing of the first images."""
        if not trainer.sanity_checking:
            self._draw(cast(DetectionModule, pl_module), "val", batch, Detections(**outputs))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw what is still missing of the first images."""
        self._draw(cast(DetectionModule, pl_module), "test", batch, Detections(**outputs))

    def _draw(self, module: DetectionModule, stage: Stage, batch: Batch, detections: Detections) -> None:
        num_missing = self.num_images - self._num_drawn
        if num_missing <= 0:
            return
        for row, index in enumerate(batch.image_indices[:num_missing].tolist()):
            draw_image(module, stage, index, _row(detections, row), self.folder, self.score_threshold)
            self._num_drawn += 1


class PredictionWriter(Callback):
    """Writes what `onestage predict` finds: a drawn JPEG of every image, and one COCO results file.

    Args:
        folder: the run folder; gets `predictions/*.jpg` and `predictions.json`.
        score_threshold: detections below it are not drawn, 0..1. The JSON file holds the 100 best of each image.
    """

    def __init__(self, folder: Path, score_threshold: float) -> None:
        self.folder = folder
        self.score_threshold = score_threshold

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the folder of the first process."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw every image of the batch."""
        module = cast(DetectionModule, pl_module)
        for row, index in enumerate(batch.image_indices.tolist()):
            image_folder = self.folder / "predictions"
            draw_image(module, "predict", index, _row(Detections(**outputs), row), image_folder, self.score_threshold)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the detections of all processes, in original pixels and with the data set's own category ids."""
        evaluator = cast(DetectionModule, pl_module).evaluator
        assert evaluator is not None
        records = evaluator.results()
        if trainer.is_global_zero:
            write_coco_results(self.folder / "predictions.json", records)


def draw_image(
    module: DetectionModule, stage: Stage, index: int, detections: Detections, folder: Path, score_threshold: float
) -> None:
    """Draw image `index` of the split `stage` with its objects and detections ([D] rows) into `folder`."""
    annotations = module.data.annotations(stage)
    objects = annotations.objects(index)
    drawn = draw_boxes(
        module.data.read_image(stage, index),
        annotations.boxes[objects],
        annotations.labels[objects],
        detections,
        module.data.class_names,
        score_threshold=score_threshold,
    )
    save_jpeg(folder / f"{_file_stem(annotations, index)}.jpg", drawn)


def _file_stem(annotations: AnnotationSet, index: int) -> str:
    """A file name that cannot leave the folder, and that two images of one name do not share."""
    stem = Path(str(annotations.image_paths[index])).stem
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in stem)[:100]
    return f"{int(annotations.image_ids[index]):06d}_{safe}"


def _row(detections: Detections, row: int) -> Detections:
    return Detections(*(tensor[row].cpu() for tensor in detections))


class ResultsWriter(Callback):
    """Writes `results.json` after every evaluation, so that a stopped run has its latest numbers.

    Args:
        path: of the results file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the numbers of the validation split."""
        if not trainer.sanity_checking:
            self._write(trainer, cast(DetectionModule, pl_module), "validate")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the numbers of the test split."""
        self._write(trainer, cast(DetectionModule, pl_module), "test")

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, module: DetectionModule, stage: str) -> None:
        assert module.evaluator is not None
        write_results(
            self.path,
            stage=stage,
            metrics=module.metrics,
            per_class=module.evaluator.per_class(),
            class_names=module.data.class_names,
            seconds=module.evaluation_seconds,
            images_per_second=module.evaluator.num_images / max(module.evaluation_seconds, 1e-9),
        )


class LossBar(TQDMProgressBar):
    """A progress bar of the losses and the mAP; the version of the run stands in its folder's name."""

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def print_report(module: DetectionModule) -> None:
    """Print the table of the latest evaluation."""
    assert module.evaluator is not None
    print(format_table(module.metrics, module.evaluator.per_class()))
