"""Per-class loss weights, for data sets whose classes differ in frequency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onestage.errors import require


class ClassWeights(nn.Module):
    """Weights given by hand.

    Given weights, and weights computed from the training set of this run, stay when a checkpoint is loaded. Without
    either (evaluation), the weights of the checkpoint are used.

    Args:
        weights: [K], >= 0, in the order of the classes.
    """

    values: Tensor  # [K]; [0] before `set_class_counts`: every anchor has weight 1

    def __init__(self, weights: Sequence[float] = ()) -> None:
        super().__init__()
        numbers = [float(weight) for weight in weights]
        is_valid = not numbers or (all(0 <= number < math.inf for number in numbers) and sum(numbers) > 0)
        remedy = "To compute them: class_weights: {class_path: onestage.losses.EffectiveNumberWeights}"
        require(is_valid, "class_weights", list(weights), "finite numbers >= 0, at least one of them > 0", remedy)
        self.register_buffer("values", torch.tensor(numbers))
        self.are_fixed = len(numbers) > 0

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Receive the number of training objects of each class, [K]; ConfigError if there are not K weights."""
        rule = f"{len(class_counts)} numbers, one for each class in the order of data.class_names"
        require(len(self.values) == len(class_counts), "class_weights", self.values.tolist(), rule)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the weight of each anchor, [B, A]; 1 for BACKGROUND and IGNORE. labels: [B, A] int64."""
        if len(self.values) == 0:
            return torch.ones(labels.shape, device=labels.device)
        return torch.where(labels >= 0, self.values[labels.clamp(min=0)], 1.0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load weights of any length, unless this run has its own; then check only the length."""
        saved = state_dict.get(f"{prefix}values")
        if isinstance(saved, Tensor) and not self.are_fixed:
            self.values = torch.empty_like(saved, device=self.values.device)
        elif isinstance(saved, Tensor) and len(saved) in (0, len(self.values)):
            state_dict = {**state_dict, f"{prefix}values": self.values}
        super()._load_from_state_dict(state_dict, prefix, *args)


class EffectiveNumberWeights(ClassWeights):
    """Weights (1 - beta) / (1 - beta^n) for n training objects. arXiv:1901.05555, section 4.

    The paper scales the weights to a sum of K. Here their mean over all objects is 1, which keeps the balance of
    objects and background. A class without objects gets the weight of a class with one object.

    Args:
        beta: 0 gives all classes weight 1; towards 1 the weights approach 1 / n. The paper tries 0.9 to 0.9999.
    """

    def __init__(self, beta: float = 0.999) -> None:
        super().__init__()
        require(0 <= beta < 1, "EffectiveNumberWeights: beta", beta, "in [0, 1)", "The paper tries 0.9 to 0.9999.")
        self.beta = beta

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Compute the weights from the number of training objects of each class, [K]."""
        counts = class_counts.to("cpu", torch.float64)
        weights = (1 - self.beta) / (1 - self.beta ** counts.clamp(min=1))
        if counts.sum() > 0:
            weights = weights * counts.sum() / (weights * counts).sum()
        self.values = weights.to(self.values.device, torch.float32)
        self.are_fixed = True


Weights = Sequence[float] | ClassWeights | None  # the argument `class_weights` of all classification losses
