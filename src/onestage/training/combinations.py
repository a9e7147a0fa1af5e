"""Which settings cannot go together. Checked before the first step, so that no run fails after an hour."""

import os
import shutil

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from onestage.errors import ConfigError
from onestage.training.optimization import is_fused

COMPILERS = ("c++", "g++", "clang++", "cl")  # of these torch.compile needs one


def check_processes(trainer: pl.Trainer) -> None:
    """Refuse to be one of several processes that do not know of each other.

    With `trainer.devices: 1` Lightning asks nobody how many processes there are, and each would train by itself.

    Raises:
        ConfigError: torchrun or srun has started another number of processes than the trainer is to have.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, processes = "torchrun", int(environment["WORLD_SIZE"])
        per_node = int(environment["LOCAL_WORLD_SIZE"])
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        launcher, processes = "srun", int(environment["SLURM_STEP_NUM_TASKS"])
        per_node = processes // int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    else:
        return
    if processes != trainer.world_size:
        raise ConfigError(
            f"{launcher} has started {processes} processes, {per_node} on each machine, but trainer.devices x "
            f"trainer.num_nodes is {trainer.num_devices} x {trainer.num_nodes}.\n"
            f"Give --trainer.devices {per_node} --trainer.num_nodes {processes // per_node}"
        )


def check_values(trainer: pl.Trainer) -> None:
    """Refuse numbers of the trainer that Lightning takes without a look.

    Raises:
        ConfigError: fewer than one batch makes a step, or gradients would be clipped to a negative length.
    """
    batches, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if batches < 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches is {batches}; a step needs at least one batch.\n"
            "Set it to 1 for a step after every batch."
        )
    if clip is not None and not clip >= 0:
        raise ConfigError(
            f"trainer.gradient_clip_val is {clip}; it must be 0 or more: a negative one would turn gradients round.\n"
            "Set it to null for no clipping."
        )


def check_launcher(trainer: pl.Trainer) -> None:
    """Refuse processes that are forked or spawned inside the command.

    What they leave behind ends with them: the command would go on with the module and the callbacks of before.

    Raises:
        ConfigError: `trainer.strategy` starts such processes.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        method = trainer.strategy.launcher._start_method
        raise ConfigError(
            f"trainer.strategy starts processes by {method!r} inside the command, which does not get back what they "
            "have trained or found.\nSet trainer.strategy: ddp, which starts the command anew for each process."
        )


def check_compiler() -> None:
    """Refuse `model.compile` where there is nothing to compile with.

    Raises:
        ConfigError: no C++ compiler is on the path.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        raise ConfigError(
            f"model.compile is true, but there is no C++ compiler ({named or ', '.join(COMPILERS)}), and torch.compile "
            "needs one.\nInstall g++, or set model.compile: false."
        )


def check_batch_norm(trainer: pl.Trainer, detector: nn.Module) -> None:
    """Refuse `trainer.sync_batchnorm` where it cannot run, and say so where it does nothing.

    Raises:
        ConfigError: it is asked for on several processes of a CPU.
    """
    if not getattr(trainer, "sync_batchnorm", False):
        return
    if not any(isinstance(layer, _BatchNorm) for layer in detector.modules()):
        rank_zero_info(f"sync_batchnorm: {type(detector).__name__} has no batch norm, so there is nothing to do.")
    elif trainer.world_size == 1:
        rank_zero_info("sync_batchnorm: there is one process, so there is nothing to do.")
    elif trainer.strategy.root_device.type == "cpu":
        raise ConfigError(
            "trainer.sync_batchnorm is true, but torch's SyncBatchNorm runs on GPUs only.\n"
            "Set trainer.sync_batchnorm: false; each process then normalises by its own images."
        )


def check_optimizer(trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Refuse clipping of gradients that nobody can see unscaled.

    Raises:
        ConfigError: fp16, a fused optimizer and clipping come together.
    """
    if trainer.gradient_clip_val and is_fused(optimizer) and scaler_of(trainer) is not None:
        raise ConfigError(
            "trainer.precision 16-mixed scales the loss, a fused optimizer unscales gradients only inside its own "
            "step, and trainer.gradient_clip_val has to see them before.\nSet model.optimizer.init_args.fused: "
            "false, or trainer.precision: bf16-mixed, or trainer.gradient_clip_val: null."
        )


def scaler_of(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return what scales the loss under fp16; None where nothing does."""
    # The precision of one device has it under this name, and so has that of FSDP.
    return getattr(trainer.precision_plugin, "scaler", None)
