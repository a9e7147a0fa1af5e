"""What is random inside the model is a function of (seed, process, optimizer batch), as the order of the images is."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class SeededSteps(Callback):
    """Seeds torch, NumPy and Python before every training batch, so that no state has to be saved and none can be lost.

    Dropout of a resumed run is that of the uninterrupted one, whatever else has drawn random numbers in between. The
    seed of a batch depends on the process too: two processes never drop the same units of different images.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed everything that a model may draw from. On a GPU this sets a number and waits for nothing."""
        key = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        torch_seed, numpy_seed = np.random.SeedSequence(key).generate_state(2, dtype=np.uint64).tolist()
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed % 2**32)
        random.seed(numpy_seed)
