"""A mean with weights over all batches and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """sum of value x weight / sum of weight; NaN before the first update.

    torchmetrics 1.9's own MeanMetric either looks for NaN, for which it waits for the device at every update, or, with
    nan_strategy="disable", silently takes every weight for 1.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add a batch: both scalars, on the metric's device."""
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.weight
