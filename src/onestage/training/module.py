"""The Lightning module: any detector, trained and evaluated. It names no model and no data set."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from onestage.errors import ConfigError
from onestage.evaluation.coco import CocoEvaluator, in_original_pixels
from onestage.reliability.save_points import is_dry
from onestage.training.combinations import check_batch_norm, check_compiler, check_optimizer
from onestage.training.mean_per_positive import MeanPerPositive
from onestage.training.optimization import (
    clip_gradients,
    decayed_parameters,
    hold_to,
    hyper_parameters,
    parameter_groups,
    scale_learning_rate,
    warn_of_long_warmup,
)
from onestage.training.schedule import WarmupSchedule
from onestage.training.strategies import clips_by_itself, shards_parameters
from onestage.types import Batch, DetectionData, Detections, Detector, Losses, Metrics, Predictions, Stage

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

# The one schema of what this module adds to a checkpoint, under the key `onestage`.
CHECKPOINT_KEY = "onestage"
CHECKPOINT_SCHEMA = 1

LOSSES = ("loss", "classification_loss", "box_loss")  # what is logged of each stage


class DetectionModule(pl.LightningModule):
    """Trains a detector on `classification + box_loss_weight * box` and evaluates it as COCO does.

    Args:
        detector: the model; `num_classes` comes from the data module.
        optimizer: makes the optimizer from parameter groups. Biases and normalisation parameters (one dimension) form
            a group of their own without weight decay, as in SSD's Caffe solver.
        schedule: warm-up and decay of the learning rate.
        box_loss_weight: alpha of SSD eq. 1, >= 0.
        channels_last: memory format of network and images; 1.1x faster in fp32, 1.2x in bf16 on CPUs, and what tensor
            cores want.
        compile: compile the network and its classification loss in place with torch.compile on the first step of
            `fit`. Needs a C++ compiler; on a CPU it gains nothing and costs 40 s.
        reference_batch_size: how many images a step had for which the optimizer's learning rate was chosen; that is
            then multiplied by images per step / reference (arXiv:1706.02677). A step sees data.batch_size images of
            each process and of each accumulated batch. null: the learning rate is taken as it stands.
    """

    def __init__(
        self,
        detector: Detector,
        optimizer: OptimizerFactory = torch.optim.SGD,
        schedule: WarmupSchedule | None = None,
        box_loss_weight: float = 1.0,
        channels_last: bool = True,
        compile: bool = False,
        reference_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= box_loss_weight < math.inf:
            raise ConfigError(
                f"model.box_loss_weight is {box_loss_weight}; it must be a number, 0 or more.\n"
                "SSD's is 1; with focal loss try 0.05 to 1, docs/focal_loss.md."
            )
        if reference_batch_size is not None and reference_batch_size < 1:
            raise ConfigError(
                f"model.reference_batch_size is {reference_batch_size}; it must be 1 or more images, or null."
            )
        self.detector = detector
        self.optimizer = optimizer
        self.schedule = schedule or WarmupSchedule()
        self.box_loss_weight = box_loss_weight
        self.channels_last = channels_last
        self.compile_detector = compile
        self.reference_batch_size = reference_batch_size
        self._decayed = decayed_parameters(detector)
        self._configured: list[dict[str, Any]] = []  # the hyper-parameters of the optimizer as it was built
        self._scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self.loss_means = nn.ModuleDict({name: MeanPerPositive() for name in LOSSES})
        self.evaluator: CocoEvaluator | None = None
        self.metrics: Metrics = {}
        self.evaluation_seconds = 0.0
        self._start = 0.0

    @property
    def data(self) -> DetectionData:
        """The data module of the run."""
        return cast(DetectionData, self.trainer.datamodule)  # type: ignore[attr-defined] # Lightning sets it

    def setup(self, stage: str) -> None:
        """Check that data and detector fit together, then lay out and compile the network."""
        for canvas in self.data.canvases:
            self.detector.require_canvas(canvas)
        self.lay_out()
        if stage == "fit":
            if self.detector.uses_class_weights:
                self.detector.set_class_counts(self._class_counts())
            check_batch_norm(self.trainer, self.detector)
            if self.compile_detector:
                check_compiler()
                self.detector.compile()  # in place, so that the names in the state dict stay as they are

    def lay_out(self) -> None:
        """Put the weights into the memory format of the run."""
        # Not under FSDP: it flattens weights in the order of memory, but the optimizer state that it loads in the order
        # of indices, so that a resumed run would go on with a permuted momentum.
        if self.channels_last and not shards_parameters(self.trainer.strategy):
            self.detector.to(memory_format=torch.channels_last)

    def _class_counts(self) -> Tensor:
        """Count the objects of each class that training learns from, [K]."""
        annotations = self.data.annotations("train")
        labels = torch.from_numpy(annotations.labels[~annotations.is_crowd])
        return labels.bincount(minlength=self.data.num_classes)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the `loss` of one batch, SSD eq. 1 with the classification loss of the detector, and its makings."""
        predictions = self._predict(batch)
        losses = self._total(self.detector.loss(predictions, batch.targets))
        named = {f"train/{name}": value for name, value in losses.items()}
        self.log_dict(named, prog_bar=True, batch_size=len(batch.images))
        return {**losses, "predictions": predictions}  # what the callbacks that watch a run look at

    def _predict(self, batch: Batch) -> Predictions:
        # Laid out while they are still bytes, a quarter of what floats would move; nothing to do if they already are.
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return cast(Predictions, self.detector(batch.images.contiguous(memory_format=layout)))

    def _total(self, losses: Losses) -> dict[str, Tensor]:
        terms = losses.terms
        loss = terms["classification"] + self.box_loss_weight * terms["box"]  # SSD eq. 1
        return {"loss": loss, "classification_loss": terms["classification"], "box_loss": terms["box"]}

    # Evaluation: each step only collects; every number is computed once, at the end.

    def on_validation_epoch_start(self) -> None:
        """Start a fresh evaluation of the validation split."""
        self._start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Start a fresh evaluation of the test split."""
        self._start_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        """Start collecting the detections of the images to predict."""
        self._start_evaluation("predict")

    def _start_evaluation(self, stage: Stage) -> None:
        self.evaluator = CocoEvaluator(self.data.annotations(stage))
        for mean in self.loss_means.values():
            cast(MeanPerPositive, mean).reset()
        self._start = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Collect detections and losses; return the detections in original pixels."""
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`, on the test split."""
        return self._evaluation_step(batch)

    def _evaluation_step(self, batch: Batch) -> dict[str, Tensor]:
        predictions = self._predict(batch)
        terms = self.detector.loss(predictions, batch.targets)
        losses = self._total(terms)
        for name, mean in self.loss_means.items():
            # That makes it the loss of one batch of all images, however they are shared among batches and processes.
            cast(MeanPerPositive, mean).update(losses[name], terms.num_positives)
        return self._collect(batch, self._detect(batch, predictions))

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the detections of one batch in original pixels."""
        return self._collect(batch, self._detect(batch, self._predict(batch)))

    def _detect(self, batch: Batch, predictions: Predictions) -> Detections:
        scales, offsets = batch.placements[:, :2].flip(-1), batch.placements[:, 2:].flip(-1)  # [B, 2] (y, x)
        return self.detector.detect(predictions, content_sizes=batch.original_sizes * scales + offsets)

    def _collect(self, batch: Batch, detections: Detections) -> dict[str, Tensor]:
        detections = in_original_pixels(detections, batch.placements, batch.original_sizes)
        assert self.evaluator is not None
        self.evaluator.update(batch.image_indices, detections)
        return detections._asdict()

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Compute and log the test metrics."""
        self._end_evaluation("test")

    def _end_evaluation(self, prefix: str) -> None:
        assert self.evaluator is not None
        self.metrics = self.evaluator.compute()
        self.evaluation_seconds = time.perf_counter() - self._start
        for name, mean in self.loss_means.items():
            # As metric objects, because Lightning's own averaging is wrong where processes hold different counts.
            self.log(f"{prefix}/{name}", cast(MeanPerPositive, mean))
        for name, value in self.metrics.items():
            # NaN says "undefined on this data"; loggers and ModelCheckpoint have no word for that, 0 comes nearest.
            in_bar = name in ("mAP", "AP50")
            self.log(f"{prefix}/{name}", 0.0 if value != value else value, prog_bar=in_bar)

    # Optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over two parameter groups and the schedule that steps with it."""
        optimizer = self.make_optimizer()
        check_optimizer(self.trainer, optimizer)
        if self.reference_batch_size is not None:
            scale_learning_rate(optimizer, self.trainer, self.data.batch_size, self.reference_batch_size)
        self._configured = hyper_parameters(optimizer)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Look at the length of the warm-up, and hold to what was configured where a checkpoint brought its own."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        # One of a subclass may drive the momentum, or keep what it needs in the groups: that is left as it was saved.
        if self._scheduler is None or schedulers != [self._scheduler]:
            return
        if not is_dry(self.trainer):
            warn_of_long_warmup(self.schedule.warmup_steps, float(self.trainer.estimated_stepping_batches))
        if self.trainer.ckpt_path is not None:
            hold_to(self._configured, self._scheduler)

    def make_optimizer(self) -> Optimizer:
        """Return the configured optimizer over the detector's parameters, with its learning rate as configured.

        Raises:
            ConfigError: the optimizer refuses its arguments.
        """
        try:
            return self.optimizer(parameter_groups(self.detector, self._decayed))
        except (ValueError, RuntimeError) as error:  # each optimizer checks its own arguments
            raise ConfigError(f"model.optimizer cannot be built: {error}.") from error

    def _learning_rate_factor(self, step: int) -> float:
        # The length of the run is asked for only when a step needs it: asking while the optimizers are being built
        # makes Lightning set up the loaders before it has restored their position.
        if step < max(1, self.schedule.warmup_steps) or not self.schedule.needs_total_steps:
            return self.schedule.factor(step, total_steps=float("inf"))
        total_steps = float(self.trainer.estimated_stepping_batches)
        if total_steps == float("inf"):
            raise ConfigError(
                f"model.schedule.kind is {self.schedule.kind!r}, which depends on the length of the run, but the run "
                "has no end.\nSet trainer.max_epochs or trainer.max_steps, or model.schedule.kind: constant."
            )
        return self.schedule.factor(step, total_steps)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm or by value, with any optimizer and strategy that leaves it to us."""
        if gradient_clip_val and not clips_by_itself(self.trainer.strategy):
            clip_gradients(self.trainer, optimizer, float(gradient_clip_val), gradient_clip_algorithm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a reader needs to use the weights without the data set. Primitives only, so that it loads safely."""
        ours = {
            "schema": CHECKPOINT_SCHEMA,
            "detector": type(self.detector).__name__,
            "image_size": max(map(max, self.data.canvases)),
            "class_names": list(self.data.class_names),
            "category_ids": [int(category) for category in self.data.category_ids],
        }
        checkpoint.setdefault(CHECKPOINT_KEY, {}).update(ours)
