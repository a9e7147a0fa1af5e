"""What an anchor counts by the class of its object, for data sets in which a few classes have most of the objects."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onestage.errors import ConfigError


class ClassWeights(nn.Module):
    """Weights given by hand.

    Weights are configuration, not learnt: those given by hand, or found in the training set of this run, stay when a
    checkpoint is loaded. Its own serve where there is no training set to find them in.

    Args:
        weights: [K], >= 0, in the order of the classes.

    Raises:
        ConfigError: if a weight is negative or not finite, or all are 0.
    """

    values: Tensor  # [K], or [0] while nothing is known: then every anchor counts 1

    def __init__(self, weights: Sequence[float] = ()) -> None:
        super().__init__()
        values = torch.tensor([float(weight) for weight in weights])
        if len(values) and not (values.isfinite().all() and (values >= 0).all() and values.sum() > 0):
            raise ConfigError(
                f"class_weights is {list(weights)}; each must be a number >= 0, and one of them more than 0.\n"
                "To have them computed: class_weights: {class_path: onestage.losses.EffectiveNumberWeights}"
            )
        self.register_buffer("values", values)
        self.are_decided = len(values) > 0

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Learn how many objects of each class the training set has, [K].

        Raises:
            ConfigError: if there are weights for another number of classes.
        """
        if len(self.values) != len(class_counts):
            raise ConfigError(
                f"class_weights has {len(self.values)} numbers, but the data has {len(class_counts)} classes; each "
                "class needs one, in the order of data.class_names."
            )

    def forward(self, labels: Tensor) -> Tensor:
        """Return the weight of each anchor, [B, A]; 1 where its label is no class. labels: [B, A] int64."""
        if len(self.values) == 0:
            return torch.ones(labels.shape, device=labels.device)
        return torch.where(labels >= 0, self.values[labels.clamp(min=0)], 1.0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the weights of a checkpoint, of any number, unless there are some; then look only at their number."""
        saved = state_dict.get(f"{prefix}values")
        if isinstance(saved, Tensor) and not self.are_decided:
            self.values = torch.empty_like(saved, device=self.values.device)
        elif isinstance(saved, Tensor) and len(saved) in (0, len(self.values)):
            state_dict = {**state_dict, f"{prefix}values": self.values}
        super()._load_from_state_dict(state_dict, prefix, *args)


class EffectiveNumberWeights(ClassWeights):
    """Weights (1 - beta) / (1 - beta^n) for n objects, read from the training set. arXiv:1901.05555, section 4.

    The paper scales them to a sum of K. Here it is the mean over all objects that is 1, so that objects and background
    stay balanced as they were. A class without objects has the weight of one with a single object.

    Args:
        beta: 0 leaves all weights at 1, towards 1 they approach 1 / n; the paper tries 0.9 to 0.9999.

    Raises:
        ConfigError: unless 0 <= beta < 1.
    """

    def __init__(self, beta: float = 0.999) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ConfigError(
                f"EffectiveNumberWeights: beta is {beta}; it must be in 0..1, without 1.\n"
                "The paper's are 0.9, 0.99, 0.999 and 0.9999"
            )
        self.beta = beta

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Compute the weights of classes with so many objects, [K]."""
        counts = class_counts.to("cpu", torch.float64)
        weights = (1 - self.beta) / (1 - self.beta ** counts.clamp(min=1))
        weight_of_objects = (weights * counts).sum()
        if weight_of_objects > 0:
            weights = weights * counts.sum() / weight_of_objects
        self.values = weights.to(self.values.device, torch.float32)
        self.are_decided = True

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"beta={self.beta}"
