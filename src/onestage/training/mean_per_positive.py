"""A validation loss, put together from those of all batches and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanPerPositive(Metric):
    """Sum of a loss over the number of positive anchors, or over 1 if there is none; NaN before the first update.

    Each batch divides its loss by its own positives, or by 1. That is undone, sums and numbers are added up, and only
    then the sum is divided: a batch without positives adds what its background costs and nothing to the number.
    """

    full_state_update = False
    total: Tensor
    num_positives: Tensor
    num_updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "num_positives", "num_updates"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, num_positives: Tensor) -> None:
        """Add a batch: its loss, divided by its positives or by 1, and their number, scalars on the metric's device."""
        self.total += loss * num_positives.clamp(min=1)
        self.num_positives += num_positives
        self.num_updates += 1

    def compute(self) -> Tensor:
        """Return the loss of all batches together."""
        loss = self.total / self.num_positives.clamp(min=1)
        return torch.where(self.num_updates > 0, loss, torch.nan)
