"""Lightning's Trainer with a detector's defaults, and checks of its settings before the first step."""

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info

from onestage.errors import ConfigError, DataError, require
from onestage.evaluation import anchor_losses
from onestage.training.callbacks import LossCollector
from onestage.training.module import DetectionModule

DecidedPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
Precision = Literal["auto", DecidedPrecision]
CURVES_FILE, FIGURE_FILE = "losses.csv", "losses.png"  # of `onestage losses`

HARMLESS_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",  # it was just created for this run
    ".*isinstance.treespec, LeafSpec.",  # between Lightning and torch
    "It is recommended to use .self.log.*sync_dist=True",  # every process logs the numbers of all
    "You have overridden .on_after_batch_transfer. in .LightningModule.",  # model.multi_scale, which needs the step
    "Found .* module.s. in eval mode at the start of training",  # model.freeze
    "The '.*_dataloader' does not have many workers",  # num_workers: auto has counted the cores
)


class DetectionTrainer(pl.Trainer):
    """Lightning's Trainer with precision `auto` and exact distributed evaluation, without some of its warnings.

    The limits are repeated for their types: with Lightning's Optional[Union[int, float]], whose order typing does not
    keep, `--trainer.limit_val_batches 1` would become 1.0, all batches instead of one.

    Args:
        precision: `auto` takes the faster precision of the device and reports it.
        use_distributed_sampler: stays false: Lightning's sampler would pad the evaluation with duplicates.
        limit_train_batches: batches per epoch: an int counts them, a float is a fraction in [0, 1].
        limit_val_batches: the same, per validation.
        limit_test_batches: the same, per test.
        limit_predict_batches: the same, per prediction.
        overfit_batches: the same, for both training and validation.
        val_check_interval: between validations: steps, a fraction of an epoch, or a time in Lightning's format.
    """

    def __init__(
        self,
        *args: Any,
        precision: Precision = "auto",
        use_distributed_sampler: Literal[False] = False,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        for message in HARMLESS_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
            logging.getLogger(name).addFilter(_is_no_advertisement)  # added once: logging compares filters
        accelerator = kwargs.get("accelerator", "auto")
        decided: DecidedPrecision | None = resolve_precision(precision, accelerator)
        if decided == "16-mixed" and device_of(accelerator) == "cpu":
            # Lightning would silently compute in bf16. torch can do fp16, slowly: to try out what a GPU will do.
            given = kwargs.get("plugins") or []
            given = given if isinstance(given, list) else [given]
            decided, kwargs["plugins"] = None, [*given, MixedPrecision("16-mixed", "cpu")]
        super().__init__(
            *args,
            precision=decided,
            use_distributed_sampler=use_distributed_sampler,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )
        check_settings(self)
        check_processes(self)
        is_possible = self.world_size == 1 or self.strategy.root_device.type != "cpu"
        remedy = "torch's SyncBatchNorm runs on GPUs only; without it each process normalises by its own images."
        synchronised = bool(kwargs.get("sync_batchnorm"))
        require(is_possible or not synchronised, "trainer.sync_batchnorm", synchronised, "false on CPUs", remedy)

    def losses(
        self,
        model: DetectionModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
        split: Literal["val", "test"] = "val",
        gammas: list[NonNegativeFloat] | None = None,
    ) -> None:
        """Write how the anchors share the classification loss, as RetinaNet's figure 4: a table and curves.

        Args:
            model: with the trained weights.
            datamodule: the data.
            ckpt_path: of the checkpoint; the command reads it before this method is called.
            split: the images to use.
            gammas: of the focal loss, each >= 0. null: 0, 0.5, 1, 2 and 5.
        """
        distribution = anchor_losses.LossDistribution(gammas or anchor_losses.FIGURE_GAMMAS)
        run = self.validate if split == "val" else self.test
        run(LossCollector(model, distribution), datamodule=datamodule, verbose=False)
        curves = distribution.curves()
        if not curves:
            remedy = "Raise trainer.limit_val_batches, or choose another --split."
            raise DataError(f"no image was seen, hence no loss. {remedy}")
        if self.is_global_zero:
            folder, title = Path(self.default_root_dir), str(ckpt_path or "the configured weights")
            folder.mkdir(parents=True, exist_ok=True)
            anchor_losses.write_loss_curves(folder / CURVES_FILE, curves, distribution.gammas)
            anchor_losses.draw_loss_curves(folder / FIGURE_FILE, curves, distribution.gammas, title)
            print(anchor_losses.format_loss_shares(curves, distribution.gammas))


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def evaluate_at_least_once(settings: Any) -> None:
    """Make a run that is shorter than the interval between validations end with one. settings: `trainer`, parsed."""
    if settings.max_epochs is not None and settings.max_epochs > 0 and settings.check_val_every_n_epoch is not None:
        settings.check_val_every_n_epoch = min(settings.check_val_every_n_epoch, settings.max_epochs)


def resolve_precision(precision: Precision, accelerator: object) -> DecidedPrecision:
    """Replace `auto` by the faster precision of the accelerator, and report it once."""
    if precision == "auto":
        precision, reason = choose_precision(device_of(accelerator))
        rank_zero_info(f"precision: {precision} ({reason}); override it with trainer.precision")
    return precision


def choose_precision(device: str) -> tuple[DecidedPrecision, str]:
    """Return the faster precision of a device, `cpu`, `cuda` or another, and the reason in words.

    By the instructions of the device, so that two runs on one machine agree; scripts/benchmark.py step measures.
    """
    if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed", "the GPU computes in bf16"
    if device == "cuda":
        return "16-mixed", "the GPU has no bf16, so fp16 with a loss scaler"
    if device != "cpu":
        return "32-true", f"no other precision was tried on {device}"
    # With these instructions a training step of SSD300 is twice as fast in bf16; without them oneDNN emulates bf16
    # and the step is slower than in fp32.
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)]
    return ("bf16-mixed", f"this CPU has {found[0]}") if found else ("32-true", "this CPU has no instructions for bf16")


def device_of(accelerator: object) -> str:
    """Return the type of the device that `trainer.accelerator` means on this machine."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu" if accelerator in ("auto", "cpu") else str(accelerator)


def check_settings(trainer: pl.Trainer) -> None:
    """Raise ConfigError for settings of the trainer that Lightning does not validate."""
    batches, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    remedy = "Set it to 1 for a step after every batch."
    require(batches >= 1, "trainer.accumulate_grad_batches", batches, ">= 1 batch per step", remedy)
    require(clip is None or clip >= 0, "trainer.gradient_clip_val", clip, ">= 0", "Set it to null for no clipping.")
    if type(trainer.strategy.launcher).__module__.endswith("launchers.multiprocessing"):
        raise ConfigError(
            "trainer.strategy forks or spawns processes inside the command, which does not get back what they have "
            "trained.\nSet trainer.strategy: ddp, which starts the command again for each process."
        )


def check_processes(trainer: pl.Trainer) -> None:
    """Raise ConfigError if torchrun or srun has started another number of processes than the trainer expects.

    With `trainer.devices: 1` Lightning does not ask how many processes there are, and each would train by itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher, processes, per_node = "torchrun", int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    else:  # one SLURM task may start processes itself
        launcher, processes = "srun", int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        per_node = processes // int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    if processes != trainer.world_size and (launcher == "torchrun" or processes > 1):
        raise ConfigError(
            f"{launcher} has started {processes} processes, {per_node} on each machine, but trainer.devices x "
            f"trainer.num_nodes is {trainer.num_devices} x {trainer.num_nodes}.\n"
            f"Give --trainer.devices {per_node} --trainer.num_nodes {processes // per_node}"
        )
