"""Parts that a configuration of several processes names: a recorder of batches, and FSDP on CPUs."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class Recorder(pl.Callback):
    """Append the images and the loss of each batch to `<folder>/rank<r>.jsonl`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        line = {"images": batch.image_indices.tolist(), "loss": loss}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class CPUFSDP(FSDPStrategy):
    """Lightning's strategy with a CPU as device, which has no index: torch supports it, Lightning refuses it."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
