"""What sums of losses are divided by."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onestage.errors import ConfigError


class PositiveNormaliser(nn.Module):
    """The number of positive anchors of a batch, averaged over processes; or its running mean.

    All processes together have at least one: what their averaged gradients are divided by is then that of one process
    with all their images, whatever the number of processes.

    A batch with few objects weighs each of them more, one with many less. The running mean of detectron2's RetinaNet
    weighs objects alike: with momentum 0.9 a batch moves it by a tenth. It starts at the first batch of training.

    Args:
        momentum: of the running mean, 0..1; 0 is the batch alone, as in the SSD and RetinaNet papers.

    Raises:
        ConfigError: unless 0 <= momentum < 1.
    """

    running_mean: Tensor  # scalar; 0 before the first batch

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ConfigError(
                f"normaliser_momentum is {momentum}; it must be in 0..1, without 1.\n"
                "0.0 divides by the positives of each batch; detectron2's running mean has 0.9"
            )
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(()), persistent=momentum > 0)

    @torch.no_grad()
    def forward(self, is_positive: Tensor, is_training: bool) -> Tensor:
        """Return the number to divide by, a scalar >= 1 / number of processes, without waiting for the device.

        Args:
            is_positive: [B, A] bool.
            is_training: whether this is a step of training. Evaluation makes no collective call, for processes may
                have unequal numbers of batches, and divides by its own batch's number, at least 1.
        """
        count = is_positive.sum().float()
        if not is_training:
            return count.clamp(min=1)
        count = sum_over_processes(count).clamp(min=1) / _num_processes()
        if self.momentum > 0:
            started = torch.where(self.running_mean > 0, self.running_mean, count)
            count = self.momentum * started + (1 - self.momentum) * count
            self.running_mean.copy_(count)
        return count

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"momentum={self.momentum}"


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over the processes of a distributed run, on the device; alone, return the values."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
