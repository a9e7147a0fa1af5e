"""The optimizer of a run: which parameters decay, how large the batch of a step is, how its gradients are clipped."""

import re
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WRAPPERS = re.compile(r"_(fsdp_wrapped|checkpoint_wrapped)_module\.")  # what torch's wrappers add to a name


def decayed_parameters(detector: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that weight decay is for: all but biases and the scales of normalisation.

    To be asked of a detector as it was built. FSDP replaces each parameter by this process's piece of it, flattened,
    and by the number of dimensions every one of those would be a bias.
    """
    return frozenset(name for name, parameter in detector.named_parameters() if parameter.ndim > 1)


def parameter_groups(detector: nn.Module, decayed: frozenset[str]) -> list[dict[str, object]]:
    """Return two groups for an optimizer: with its weight decay, and without any, as in SSD's Caffe solver."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            groups[WRAPPERS.sub("", name) not in decayed].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]


def images_per_step(trainer: pl.Trainer, batch_size: int) -> int:
    """Return how many images one optimizer step sees: those of all processes and of all accumulated batches."""
    return batch_size * trainer.world_size * trainer.accumulate_grad_batches


def scale_learning_rate(optimizer: Optimizer, trainer: pl.Trainer, batch_size: int, reference: int) -> None:
    """Multiply every group's learning rate by images per step / reference: the linear rule of arXiv:1706.02677.

    The mean gradient of k times as many images has k times less noise, and stands for k steps of the smaller batch.
    Found with SGD; it needs a warm-up, and fails where the batch is a large part of the data set.
    """
    images = images_per_step(trainer, batch_size)
    factor = images / reference
    before = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    parts = (
        f"processes {trainer.world_size} x batch_size {batch_size} "
        f"x accumulate_grad_batches {trainer.accumulate_grad_batches}"
    )
    rank_zero_info(
        f"learning rate: {before:g} x {images} / {reference} = {before * factor:g} "
        f"({parts}; model.reference_batch_size: {reference})"
    )


def warn_of_long_warmup(warmup_steps: int, total_steps: float) -> None:
    """Say so where most of a run is warm-up, as when the schedule of a large data set meets a small one.

    Nothing else would tell: such a run never or hardly trains at its learning rate, and only ends with a low mAP.
    """
    if warmup_steps > 0.5 * total_steps:
        rank_zero_warn(
            f"model.schedule.warmup_steps is {warmup_steps}, but the run has {total_steps:g} steps: for most of it the "
            "learning rate is below the one that is set.\nSet model.schedule.warmup_steps to a tenth of the steps or "
            "less, or train for more epochs."
        )


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what each parameter group holds beside its parameters."""
    groups = optimizer.param_groups
    return [{key: deepcopy(value) for key, value in group.items() if key != "params"} for group in groups]


def hold_to(configured: list[dict[str, Any]], scheduler: LambdaLR) -> None:
    """Undo what a checkpoint has changed in an optimizer and its schedule beside their state, and say what that was.

    torch stores the hyper-parameters of an optimizer with its momentum, and the rates of a schedule with its step. Once
    loaded they would stand in the place of those that the run was told to have. The same ones are left alone.

    Args:
        configured: `hyper_parameters` of the optimizer as it was built.
        scheduler: of that optimizer, at the step where the run goes on.
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
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        rank_zero_info(f"resume: the optimizer takes these values of the configuration: {', '.join(changes)}")
    if {"fused", "capturable"} & set(changes.values()):  # which want the counts of steps on another device
        optimizer.load_state_dict(optimizer.state_dict())


def clip_gradients(trainer: pl.Trainer, optimizer: Optimizer, limit: float, algorithm: str | None) -> None:
    """Clip the gradients, also where Lightning refuses although nothing stands in the way.

    That is a fused optimizer under bf16, where no scaler has changed the gradients, and a norm under FSDP, which FSDP
    itself can compute over the pieces of all processes.
    """
    if algorithm == "value":
        nn.utils.clip_grad_value_(_parameters(optimizer), limit)
    elif isinstance(trainer.strategy, FSDPStrategy):
        trainer.strategy.model.clip_grad_norm_(limit)  # type: ignore[union-attr,operator] # FSDP has wrapped it
    else:
        nn.utils.clip_grad_norm_(_parameters(optimizer), limit)


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def is_fused(optimizer: Optimizer) -> bool:
    """Say whether the optimizer does its step in one kernel, which is also where it would undo a loss scale."""
    return any(group.get("fused") for group in optimizer.param_groups)
