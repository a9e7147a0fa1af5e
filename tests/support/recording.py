"""Callback that records the images and the loss of every training batch of each process."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Recorder(Callback):
    """Append one line of JSON per batch to `<folder>/rank<r>.jsonl`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        line = {
            "epoch": trainer.current_epoch,
            "images": batch.image_indices.tolist(),
            "loss": float(outputs["loss"]) * trainer.accumulate_grad_batches,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
