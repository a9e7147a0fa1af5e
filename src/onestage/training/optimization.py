"""Parameter groups, learning-rate schedule and gradient clipping."""

import math
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from onestage.errors import ConfigError, require

WRAPPERS = re.compile(r"_(fsdp_wrapped|checkpoint_wrapped)_module\.")  # parts that torch's wrappers add to names


@dataclass(frozen=True)
class WarmupSchedule:
    """Factor on the optimizer's learning rate as a function of the optimizer step.

    In its first steps a detector sees box targets that its random heads are far from; a warm-up keeps SGD with momentum
    from destroying the backbone's weights there (arXiv:1706.02677, section 2.2).

    Args:
        kind: `step` multiplies by `decay` at every milestone; `cosine` goes from 1 to `final` along half a cosine
            (arXiv:1608.03983, eq. 5, without restarts); `constant` stays at 1 after the warm-up.
        warmup_steps: optimizer steps of linear warm-up, 0 for none.
        warmup_start: factor at step 0, in (0, 1].
        milestones: for `step`, as fractions of the whole run in (0, 1), so that a shorter run keeps its shape.
            The SSD paper's 80k and 100k of 120k iterations are 2/3 and 5/6.
        decay: for `step`, the factor at every milestone, in (0, 1].
        final: for `cosine`, the factor at the last step, in [0, 1].
    """

    kind: Literal["step", "cosine", "constant"] = "step"
    warmup_steps: int = 1000
    warmup_start: float = 0.001
    milestones: Sequence[float] = field(default=(2 / 3, 5 / 6))
    decay: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        key, milestones = "model.schedule", list(self.milestones)
        require(self.warmup_steps >= 0, f"{key}.warmup_steps", self.warmup_steps, ">= 0")
        require(0 < self.warmup_start <= 1, f"{key}.warmup_start", self.warmup_start, "in (0, 1]")
        require(0 < self.decay <= 1, f"{key}.decay", self.decay, "in (0, 1]")
        require(0 <= self.final <= 1, f"{key}.final", self.final, "in [0, 1]")
        is_valid = milestones == sorted(milestones) and all(0 < milestone < 1 for milestone in milestones)
        require(is_valid, f"{key}.milestones", milestones, "fractions of the run in (0, 1), ascending")

    def factor(self, step: int, total_steps: float) -> float:
        """Return the factor for optimizer step `step` (0 is the first) of a run of `total_steps`."""
        if step < self.warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        if self.kind == "step":
            return float(self.decay ** sum(step >= milestone * total_steps for milestone in self.milestones))
        if self.kind == "cosine":
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


def total_steps(trainer: pl.Trainer) -> float:
    """Return the optimizer steps of the whole run; infinity if it has no end.

    Lightning's estimate takes the present accumulation for all epochs, which GradientAccumulationScheduler changes.
    """
    estimated = float(trainer.estimated_stepping_batches)  # sets up the loaders
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined] # Lightning's type has none
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if not schedulers or trainer.max_epochs in (None, -1) or math.isinf(trainer.num_training_batches):
        return estimated if estimated >= 0 else math.inf  # -1: a loader without length, and no max_steps
    accumulated = (schedulers[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs or 0))
    steps = sum(math.ceil(trainer.num_training_batches / number) for number in accumulated)
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps


def decayed_parameters(detector: nn.Module) -> frozenset[str]:
    """Return the names of the parameters with weight decay: all but biases and normalisation parameters.

    Call it on the detector as it was built: FSDP flattens every parameter, so that all would have one dimension.
    """
    return frozenset(name for name, parameter in detector.named_parameters() if parameter.ndim > 1)


def parameter_groups(detector: nn.Module, decayed: frozenset[str]) -> list[dict[str, object]]:
    """Return two groups for an optimizer, with and without weight decay, as in SSD's Caffe solver."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            groups[WRAPPERS.sub("", name) not in decayed].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]


def scale_learning_rate(optimizer: Optimizer, trainer: pl.Trainer, batch_size: int, reference: int) -> None:
    """Multiply every group's learning rate by images per step / reference: the linear rule of arXiv:1706.02677."""
    processes, batches, before = trainer.world_size, trainer.accumulate_grad_batches, optimizer.param_groups[0]["lr"]
    images = batch_size * processes * batches
    for group in optimizer.param_groups:
        group["lr"] *= images / reference
    rank_zero_info(
        f"learning rate: {before:g} x {images} / {reference} = {before * images / reference:g} "
        f"(processes {processes} x batch_size {batch_size} x accumulate_grad_batches {batches}; "
        f"model.reference_batch_size: {reference})"
    )


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the values of each parameter group apart from its parameters."""
    return [{key: deepcopy(group[key]) for key in group if key != "params"} for group in optimizer.param_groups]


def restore_configured_hyperparameters(configured: list[dict[str, Any]], scheduler: LambdaLR) -> None:
    """Replace the hyperparameters that a checkpoint has loaded by the configured ones, and report the changes.

    torch stores hyperparameters with the momentum, and learning rates with the step of the schedule; loading overrides
    the configuration of the resumed run. `configured`: `hyperparameters` of the optimizer as it was built.
    """
    optimizer, step = scheduler.optimizer, scheduler.last_epoch
    names = {"initial_lr": "lr", "lr": f"lr at step {step}"}
    changes: dict[str, str] = {}
    for group, built, factor in zip(optimizer.param_groups, configured, scheduler.lr_lambdas, strict=True):
        wanted = {"initial_lr": built["lr"], **built, "lr": built["lr"] * factor(step)}
        for key, value in wanted.items():
            if key not in group or group[key] != value:
                changes[f"{names.get(key, key)} {group.get(key)} -> {value}"] = key
                group[key] = value
    if changes:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        rank_zero_info(f"resume: the optimizer takes these values of the configuration: {', '.join(changes)}")
    if {"fused", "capturable"} & set(changes.values()):  # they need the step counts on another device
        optimizer.load_state_dict(optimizer.state_dict())


def shards_parameters(strategy: Strategy) -> bool:
    """Return whether each process holds only its part of every parameter."""
    return isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)


def require_whole_weights(strategy: Strategy, key: str, remedy: str) -> None:
    """Raise ConfigError if the strategy splits the weights over the processes. key: what needs them whole."""
    if shards_parameters(strategy):
        problem = f"{key} needs whole weights, but {type(strategy).__name__} splits them over the processes"
        raise ConfigError(f"{problem}.\nSet {remedy}, or trainer.strategy: ddp.")


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the optimizer steps in one kernel, which then also undoes the loss scale."""
    return any(group.get("fused") for group in optimizer.param_groups)


def scaler_of(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return the loss scaler of fp16 training, or None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)  # same name in the plugins of one device and of FSDP


def check_clipping(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Raise ConfigError for clipping where the gradients are only unscaled inside the optimizer's step."""
    if trainer.gradient_clip_val and is_fused(optimizer) and scaler_of(trainer) is not None:
        raise ConfigError(
            "trainer.gradient_clip_val needs unscaled gradients, but with trainer.precision 16-mixed a fused optimizer "
            "unscales them only inside its step.\nSet model.optimizer.init_args.fused: false, or trainer.precision: "
            "bf16-mixed, or trainer.gradient_clip_val: null."
        )


def clip_gradients(trainer: pl.Trainer, optimizer: Optimizer, limit: float, algorithm: str | None) -> None:
    """Clip the gradients, also where Lightning refuses: a fused optimizer under bf16, and by norm under FSDP."""
    parameters: Iterable[nn.Parameter] = (weight for group in optimizer.param_groups for weight in group["params"])
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return  # clips inside its own step
    if algorithm == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    elif isinstance(trainer.strategy, FSDPStrategy):
        trainer.strategy.model.clip_grad_norm_(limit)  # type: ignore[union-attr,operator] # FSDP has wrapped it
    else:
        nn.utils.clip_grad_norm_(parameters, limit)
