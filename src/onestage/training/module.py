"""The Lightning module that trains and evaluates any detector."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

import onestage
from onestage.boxes.geometry import to_original
from onestage.errors import ConfigError, require
from onestage.evaluation.coco import CocoEvaluator
from onestage.training import optimization
from onestage.training.multi_scale import MultiScale
from onestage.training.optimization import WarmupSchedule
from onestage.types import AnnotationSet, Batch, DetectionData, Detections, Detector, Losses, Predictions, Stage

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]

# Schema of the values that this module adds to a checkpoint under the key `onestage`.
CHECKPOINT_KEY = "onestage"
CHECKPOINT_SCHEMA = 2

COMPILERS = ("c++", "g++", "clang++", "cl")  # torch.compile needs one of them


class DetectionModule(pl.LightningModule):
    """Train a detector on the weighted sum of its loss terms; evaluate it with COCO's metrics.

    Any Trainer of Lightning takes it, with a `DetectionDataModule` or with loaders of `Batch`. Metrics need the
    annotations: of the data module, or of a loader over a `DetectionDataset`. Other loaders give losses only.

    Args:
        detector: the model; `num_classes` comes from the data module.
        optimizer: makes the optimizer from parameter groups. Biases and normalisation parameters (one dimension) form
            a group of their own without weight decay, as in SSD's Caffe solver.
        schedule: warm-up and decay of the learning rate.
        loss_weights: weight >= 0 of each of the detector's loss terms, such as `{box: 2.0}` (alpha of SSD eq. 1). A
            term that is not listed has weight 1.
        channels_last: memory format of network and images. auto: the faster one, which `fit` times on a CPU.
        compile: use torch.compile for network and classification loss in `fit`. Needs a C++ compiler; on a CPU it
            gains nothing and costs 40 s.
        freeze: number of the backbone's first stages that keep their weights, for fine-tuning; 0: all are trained.
        reference_batch_size: images per step for which the optimizer's learning rate was chosen; the rate is
            multiplied by images per step / reference (arXiv:1706.02677). One step sees data.batch_size images of each
            process and each accumulated batch. null: the learning rate is used unchanged.
        multi_scale: input sizes that change during training; null: always that of the data.
    """

    def __init__(
        self,
        detector: Detector,
        optimizer: OptimizerFactory = torch.optim.SGD,
        schedule: WarmupSchedule | None = None,
        loss_weights: dict[str, float] | None = None,
        channels_last: bool | Literal["auto"] = "auto",
        compile: bool = False,
        reference_batch_size: int | None = None,
        multi_scale: MultiScale | None = None,
        freeze: int = 0,
    ) -> None:
        super().__init__()
        self.loss_weights = _checked_weights(loss_weights or {}, detector)
        is_positive = reference_batch_size is None or reference_batch_size >= 1
        require(is_positive, "model.reference_batch_size", reference_batch_size, ">= 1 image, or null")
        self.detector, self.optimizer, self.schedule = detector, optimizer, schedule or WarmupSchedule()
        self.channels_last, self.compile_detector = channels_last, compile
        self.reference_batch_size, self.multi_scale = reference_batch_size, multi_scale
        if multi_scale is not None:  # before all callbacks; defined in the class, Lightning would warn in every run
            self.on_after_batch_transfer = self._resize_batch  # type: ignore[method-assign]
        if freeze:
            backbone: Any = getattr(detector, "backbone", None)
            rule = f"0 for {type(detector).__name__}, whose backbone cannot be frozen"
            require(hasattr(backbone, "freeze"), "model.freeze", freeze, rule)
            backbone.freeze(freeze)
        self._decayed = optimization.decayed_parameters(detector)
        self._lr: float | None = None  # instead of the configured one
        self._configured: list[dict[str, Any]] = []  # hyperparameters of the optimizer as it was built
        self._scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self.evaluator: CocoEvaluator | None = None
        self.metrics: dict[str, float] = {}
        self.score_threshold: float | None = None  # with the best F1 of the latest evaluation; None: unknown

    @property
    def has_data(self) -> bool:
        """Whether the Trainer was given a data module of detections, and not only loaders."""
        return hasattr(getattr(self.trainer, "datamodule", None), "canvases")

    @property
    def data(self) -> DetectionData:
        """The data module of the run; ConfigError if there are only loaders."""
        if not self.has_data:
            raise ConfigError(
                "the Trainer was given loaders; class weights, reference_batch_size, multi_scale need a data module.\n"
                "Pass datamodule=onestage.data.DetectionDataModule(...) to the Trainer's method."
            )
        return cast(DetectionData, self.trainer.datamodule)  # type: ignore[attr-defined] # Lightning sets it

    @property
    def backbone(self) -> nn.Module:
        """The detector's backbone, under the name that Lightning's BackboneFinetuning looks for."""
        return cast(nn.Module, self.detector.backbone)

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, which Lightning's LearningRateFinder reads and sets."""
        return self._lr if self._lr is not None else float(self.make_optimizer().param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = value

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # a classmethod to type checkers only
        cls, checkpoint_path: str | Path, map_location: Any = None, hparams_file: Any = None,
        strict: bool | None = None, weights_only: bool | None = True, **arguments: Any,
    ) -> Self:  # fmt: skip
        """Return the module of a checkpoint, on the CPU unless `map_location` names a device.

        arguments: of the constructor. Without a `detector` it is the one in the checkpoint of `onestage fit`, and
        hparams_file and strict do not count. weights_only: always true; no code in a file is run.
        """
        if "detector" in arguments:
            place = (checkpoint_path, map_location, hparams_file, strict)
            return super().load_from_checkpoint(*place, weights_only=True, **arguments)
        loaded = onestage.load(checkpoint_path, device=map_location or "cpu").module
        return cls(loaded.detector, **{"loss_weights": loaded.loss_weights, **arguments})

    def setup(self, stage: str) -> None:
        """Check that data and detector fit together, then apply the memory format and compile."""
        for canvas in self.data.canvases if self.has_data else ():
            self.detector.require_canvas(canvas)
        # `bf16-true` would round boxes to 2 px and placements to 0.4 %. Images are bytes, which the detector converts.
        self.trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        self.apply_memory_format()
        if stage == "fit":
            for canvas in self.multi_scale.require_canvases(self.data.canvases) if self.multi_scale else ():
                self.detector.require_canvas(canvas)
            if self.detector.uses_class_weights:
                annotations = self.data.annotations("train")
                labels = torch.from_numpy(annotations.labels[~annotations.is_crowd])
                self.detector.set_class_counts(labels.bincount(minlength=self.data.num_classes))
            if self.compile_detector:
                check_compiler()
                self.detector.compile()  # in place, so that the names in the state dict do not change

    def apply_memory_format(self) -> None:
        """Convert the weights to the memory format of the run."""
        if self.channels_last == "auto":  # `fit` has timed it
            device = self.trainer.strategy.root_device.type
            self.channels_last = usual_memory_format(device, str(self.trainer.precision))
        # Not under FSDP: it flattens weights in memory order but loads optimizer state in index order, a permuted
        # momentum. Nor with ModelPruning, whose view(-1) of a weight needs its values in index order.
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined] # Lightning's type has none
        flattens = any(isinstance(callback, ModelPruning) for callback in callbacks)
        if self.channels_last and not flattens and not optimization.shards_parameters(self.trainer.strategy):
            self.detector.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Detections:
        """Detect on images of the detector's canvas, [B, 3, H, W] uint8 RGB; boxes in their pixels."""
        return self.detector.detect(self.detector(images))

    def to_torchscript(self, *_: Any, **__: Any) -> Any:
        """Raise ConfigError: TorchScript, which torch has deprecated, cannot express the detectors."""
        remedy = "Export with torch.export.export(module, (images,)), images as in a call of the module."
        raise ConfigError(f"to_torchscript: detectors cannot be scripted; torch has deprecated TorchScript.\n{remedy}")

    def _resize_batch(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Resize a training batch to the input size of the step."""
        if self.multi_scale is None or not self.trainer.training:
            return batch
        return self.multi_scale.resize(batch, self.trainer.global_step, self.data.seed)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the `loss` of one batch and its terms, and the predictions for the callbacks."""
        predictions = self.predict_batch(batch)
        losses = self.weighted_loss(self.detector.loss(predictions, batch.targets))
        self.log_dict({f"train/{k}": v for k, v in losses.items()}, prog_bar=True, batch_size=len(batch.images))
        return {**losses, "predictions": predictions}

    def predict_batch(self, batch: Batch) -> Predictions:
        """Return the predictions of a batch, its images in the memory format of the run."""
        remedy = "Give the loader collate_fn=onestage.data.collate, or pass a data module: onestage.data.from_datasets."
        kind = type(batch).__name__
        require(isinstance(batch, Batch), "loader: a batch", kind, "an onestage.types.Batch", remedy)
        # Converted while they are uint8: a quarter of the bytes of floats. A no-op if they have the format already.
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return cast(Predictions, self.detector(batch.images.contiguous(memory_format=layout)))

    def weighted_loss(self, losses: Losses) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum of the terms, and each unweighted term as `<term>_loss`.

        ConfigError if the terms are not those that the detector declares.
        """
        terms, name = losses.terms, type(self.detector).__name__
        if terms.keys() != self.loss_weights.keys():
            found, declared = ", ".join(sorted(terms)), ", ".join(sorted(self.loss_weights))
            problem = f"{name}.loss returned the terms {found}, but {name}.loss_terms declares {declared}"
            raise ConfigError(f"{problem}.\nCorrect loss_terms of the class; no term is ignored.")
        loss = cast(Tensor, sum(weight * terms[name] for name, weight in self.loss_weights.items()))
        return {"loss": loss, **{f"{name}_loss": terms[name] for name in self.loss_weights}}

    # Evaluation: each step only collects; all metrics are computed once, at the end.

    def on_validation_epoch_start(self) -> None:
        """Start a new evaluation of the data module's split, or of a loader's dataset with annotations."""
        stage = stage_of(self.trainer)
        annotations: Any = getattr(getattr(self._loader(stage), "dataset", None), "annotations", None)
        if self.has_data:
            annotations = self.data.annotations(stage)
        self.evaluator = CocoEvaluator(annotations) if self.has_data or isinstance(annotations, AnnotationSet) else None
        self._loss_sums = torch.zeros(2 + len(self.loss_weights), device=self.device)  # of divisors, loss and terms
        self._start = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Collect losses and detections; return the detections in original pixels."""
        predictions = self.predict_batch(batch)
        losses = self.detector.loss(predictions, batch.targets)
        # The batch's own divisor is undone: the logged loss is that of one batch with all images of all processes.
        divisor = losses.num_positives if losses.divisor is None else losses.divisor
        values = torch.stack([*self.weighted_loss(losses).values()])
        self._loss_sums += torch.cat([divisor[None], values * divisor.clamp(min=1)])
        return self._collect(batch, predictions)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the detections of one batch in original pixels."""
        return self._collect(batch, self.predict_batch(batch))

    def _loader(self, stage: Stage) -> Any:
        return getattr(self.trainer, f"{stage}_dataloaders", None)

    def _collect(self, batch: Batch, predictions: Predictions) -> dict[str, Tensor]:
        detections = self.detect(batch, predictions)
        if self.evaluator is not None:
            self.evaluator.update(batch.image_indices, detections)
        return detections._asdict()

    def detect(self, batch: Batch, predictions: Predictions | None = None) -> Detections:
        """Return the detections of a batch in original pixels. predictions: of the batch, if they exist already."""
        predictions = predictions or self.predict_batch(batch)
        scales, offsets = batch.placements[:, :2].flip(1), batch.placements[:, 2:].flip(1)  # [B, 2] (y, x)
        detections = self.detector.detect(predictions, batch.original_sizes * scales + offsets)
        boxes = to_original(detections.boxes, batch.placements, batch.original_sizes)
        return detections._replace(boxes=boxes)

    def on_validation_epoch_end(self) -> None:
        """Compute and log the metrics of the split."""
        prefix, self.metrics = stage_of(self.trainer), {}
        self.on_predict_epoch_end()
        if self.evaluator is None:
            rank_zero_warn(f"{prefix}: only losses are evaluated, since the loader's dataset has no annotations.")
        else:
            metrics, _, analysis = self.evaluator.evaluation()
            self.metrics = {**metrics, "VOC07": analysis.overall.voc07, "VOC10": analysis.overall.voc10}
            if analysis.score_threshold is not None:
                self.score_threshold = analysis.score_threshold
        self.evaluation_seconds = time.perf_counter() - self._start
        divisor, *sums = cast(Tensor, self.trainer.strategy.reduce(self._loss_sums, reduce_op="sum"))
        names = ("loss", *(f"{term}_loss" for term in self.loss_weights))
        for name, total in zip(names, sums, strict=True):
            self.log(f"{prefix}/{name}", total / divisor.clamp(min=1))
        for name, value in self.metrics.items():
            # NaN means "undefined on this data", which loggers and ModelCheckpoint cannot handle; 0 comes nearest.
            value = 0.0 if math.isnan(value) else value
            self.log(f"{prefix}/{name}", value, prog_bar=name in ("mAP", "AP50"))

    def on_predict_epoch_end(self) -> None:
        """Tell the evaluator which images the loader has left out."""
        if self.evaluator is not None:
            self.evaluator.unreadable |= getattr(self._loader(stage_of(self.trainer)), "unreadable", {})

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    # Optimisation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over two parameter groups and the schedule that steps with it."""
        optimizer = self.make_optimizer()
        optimization.check_clipping(self.trainer, optimizer)
        if self.reference_batch_size is not None and self._lr is None:
            optimization.scale_learning_rate(optimizer, self.trainer, self.data.batch_size, self.reference_batch_size)
        self._configured = optimization.hyperparameters(optimizer)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Warn of a long warm-up; after a resume, restore the configured hyperparameters."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        # A subclass's own scheduler may drive the momentum or keep state in the groups: left as it was saved.
        if self._scheduler is None or schedulers != [self._scheduler]:
            return
        steps, total_steps = self.schedule.warmup_steps, optimization.total_steps(self.trainer)
        self._learning_rate_factor(max(1, steps))  # refuses a run without end now, and not after its warm-up
        if steps > 0.5 * total_steps and not getattr(self.trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"model.schedule.warmup_steps is {steps}, but the run has {total_steps:g} steps: for most of it the "
                "learning rate is below the configured one.\nSet model.schedule.warmup_steps to a tenth of the steps."
            )
        if self.trainer.ckpt_path is not None:
            more = self._scheduler.optimizer.param_groups[len(self._configured) :]
            rule, remedy = "none: a resume would freeze them again", "Start from the weights: --init_from PATH."
            require(not more, "resume: parameter groups that BackboneFinetuning has added", len(more), rule, remedy)
            optimization.restore_configured_hyperparameters(self._configured, self._scheduler)

    def make_optimizer(self) -> Optimizer:
        """Return the configured optimizer, its learning rate unscaled; ConfigError if it refuses its arguments."""
        try:
            optimizer = self.optimizer(optimization.parameter_groups(self.detector, self._decayed))
        except (ValueError, RuntimeError) as error:  # each optimizer checks its own arguments
            raise ConfigError(f"model.optimizer cannot be built: {error}.") from error
        for group in optimizer.param_groups if self._lr is not None else ():
            group["lr"] = self._lr
        return optimizer

    def _learning_rate_factor(self, step: int) -> float:
        # Reading the length of the run while the optimizers are being built would make Lightning set up the loaders
        # before it has restored their position.
        kind, remedy = self.schedule.kind, "Set trainer.max_epochs, or trainer.max_steps if a loader has no length."
        if step < max(1, self.schedule.warmup_steps) or kind == "constant":
            return self.schedule.factor(step, total_steps=math.inf)
        total_steps = optimization.total_steps(self.trainer)
        require(total_steps < math.inf, "model.schedule.kind", kind, "constant in a run without end", remedy)
        return self.schedule.factor(step, total_steps)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; leave the rate of groups alone that a callback, such as BackboneFinetuning, has added."""
        own = self._scheduler
        if own is not None and scheduler is own:
            for group in own.optimizer.param_groups[len(own.base_lrs) :]:
                own.base_lrs.append(1.0)
                own.lr_lambdas.append(lambda _, group=group: float(group["lr"]))  # type: ignore[misc] # a default
        super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm or by value, with any optimizer and any strategy that does not clip by itself."""
        if gradient_clip_val:
            optimization.clip_gradients(self.trainer, optimizer, float(gradient_clip_val), gradient_clip_algorithm)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a reader needs to use the weights without the data set, as primitives that load safely."""
        size, ids = self.detector.image_size, [*range(1, 1 + self.detector.num_classes)]
        names = [f"class_{number - 1}" for number in ids]
        if self.has_data:
            size, names = max(map(max, self.data.canvases)), list(self.data.class_names)
            ids = [int(category) for category in self.data.category_ids]
        values = {"schema": CHECKPOINT_SCHEMA, "detector": type(self.detector).__name__}
        values |= {"image_size": size, "class_names": names, "category_ids": ids}
        if self.score_threshold is not None:
            values["score_threshold"] = self.score_threshold
        checkpoint.setdefault(CHECKPOINT_KEY, {}).update(values)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the score threshold of the evaluation before the checkpoint was written."""
        self.restore_threshold(checkpoint.get(CHECKPOINT_KEY, {}).get("score_threshold"))

    def restore_threshold(self, value: object) -> None:
        """Take the score threshold that a checkpoint holds, if it holds a valid one."""
        if isinstance(value, float) and 0 <= value <= 1:
            self.score_threshold = value


def usual_memory_format(device: str, precision: str) -> bool:
    """Return whether channels_last is usually faster: on GPUs, whose tensor cores need it, and in bf16 on CPUs."""
    return device == "cuda" or (device == "cpu" and precision == "bf16-mixed")


def stage_of(trainer: pl.Trainer) -> Stage:
    """Return the split that the running evaluation reads."""
    return "test" if trainer.testing else "predict" if trainer.predicting else "val"


def _checked_weights(loss_weights: dict[str, float], detector: Detector) -> dict[str, float]:
    """Return the weight of every loss term of the detector; 1 where none is given."""
    terms, name = detector.loss_terms, type(detector).__name__
    for term, weight in loss_weights.items():
        require(term in terms, "model.loss_weights: a key", term, f"a loss term of {name}: {', '.join(terms)}")
        remedy = "With GIoU try 2 for focal loss of gamma 1, 4 for cross-entropy or mining: docs/focal_loss.md."
        require(0 <= weight < math.inf, f"model.loss_weights.{term}", weight, "finite and >= 0", remedy)
    return {term: float(loss_weights.get(term, 1.0)) for term in terms}


def check_compiler() -> None:
    """Raise ConfigError if there is no C++ compiler for `model.compile`."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    rule = f"false without a C++ compiler ({', '.join(names)})"
    require(any(map(shutil.which, names)), "model.compile", True, rule, "Install g++, or set model.compile: false.")
