"""Runs a trained detector over a split to see how its anchors share the loss."""

from pathlib import Path

import lightning.pytorch as pl
import torch

from onestage.errors import ConfigError, DataError
from onestage.evaluation.loss_curves import (
    LossDistribution,
    draw_loss_curves,
    format_loss_shares,
    write_loss_curves,
)
from onestage.training.module import DetectionModule
from onestage.types import Batch

CURVES_FILE = "losses.csv"
FIGURE_FILE = "losses.png"


class LossCollector(pl.LightningModule):
    """Evaluates no detections: each step only adds the anchors' p_t to the distribution.

    Args:
        module: with the trained weights.
        distribution: what is filled.

    Raises:
        ConfigError: the detector does not tell its loss anchor by anchor.
    """

    def __init__(self, module: DetectionModule, distribution: LossDistribution) -> None:
        super().__init__()
        self.module = module
        self.distribution = distribution

    def setup(self, stage: str) -> None:
        """Check that data and detector fit together, as for an evaluation."""
        self.module.setup(stage)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of the validation split."""
        self._add(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of the test split."""
        self._add(batch)

    def _add(self, batch: Batch) -> None:
        detector = self.module.detector
        anchor_losses = detector.anchor_losses(detector(batch.images), batch.targets)
        if anchor_losses is None:
            raise ConfigError(
                f"{type(detector).__name__} does not tell its classification loss anchor by anchor.\n"
                "Give it the method anchor_losses (onestage.types.Detector)."
            )
        self.distribution.update(anchor_losses.labels, anchor_losses.true_probabilities)

    def on_validation_epoch_end(self) -> None:
        """Add up the processes."""
        self._sum_over_processes()

    def on_test_epoch_end(self) -> None:
        """Add up the processes."""
        self._sum_over_processes()

    def _sum_over_processes(self) -> None:
        if self.trainer.world_size == 1:
            return
        for tensor in (self.distribution.counts, self.distribution.losses):
            total = self.trainer.strategy.reduce(tensor.to(self.device), reduce_op="sum")
            tensor.copy_(torch.as_tensor(total))


def report_losses(folder: Path, distribution: LossDistribution, title: str) -> None:
    """Write the curves and their figure into `folder`, and print how much the hardest examples carry.

    Raises:
        DataError: no anchor was seen.
    """
    curves = distribution.curves()
    if not curves:
        raise DataError("no image was seen, hence no loss. Raise trainer.limit_val_batches, or choose another --split.")
    folder.mkdir(parents=True, exist_ok=True)
    write_loss_curves(folder / CURVES_FILE, curves, distribution.gammas)
    draw_loss_curves(folder / FIGURE_FILE, curves, distribution.gammas, title)
    print(format_loss_shares(curves, distribution.gammas))
