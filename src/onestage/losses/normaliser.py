"""The divisor of loss sums: the number of positive anchors, or of images."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onestage.errors import require


class PositiveNormaliser(nn.Module):
    """The positive anchors of a batch, averaged over processes, or their running mean.

    All processes together count at least one. The averaged gradients then equal those of one process with all images.
    Dividing by each batch's own number gives objects in sparse batches a larger weight; the running mean, which is
    detectron2's and starts at the first training batch, gives all objects the same.

    Args:
        momentum: of the running mean, in [0, 1); 0 uses the batch alone, as the SSD and RetinaNet papers do.
    """

    running_mean: Tensor  # scalar; 0 before the first batch

    def __init__(self, momentum: float = 0.0) -> None:
        super().__init__()
        remedy = "0.0 divides by the positives of each batch; detectron2's running mean uses 0.9."
        require(0 <= momentum < 1, "normaliser_momentum", momentum, "in [0, 1)", remedy)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(()), persistent=momentum > 0)

    @torch.no_grad()
    def forward(self, is_positive: Tensor) -> Tensor:
        """Return the divisor of a batch `is_positive` [B, A], a scalar >= 1 / number of processes."""
        count = is_positive.sum().float()
        if not self.training:  # no collective call, because processes may have different numbers of batches
            return count.clamp(min=1)
        count = sum_over_processes(count).clamp(min=1) / num_processes()
        if self.momentum > 0:
            previous = torch.where(self.running_mean > 0, self.running_mean, count)
            count = self.momentum * previous + (1 - self.momentum) * count
            self.running_mean.copy_(count)
        return count


class ImageNormaliser(nn.Module):
    """The number of images of this process: darknet divides the sum of a batch by it, and by nothing else."""

    def forward(self, is_positive: Tensor) -> Tensor:
        """Return B, a scalar. is_positive: [B, A]."""
        return torch.full((), float(len(is_positive)), device=is_positive.device)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over the processes of a distributed run, on the device."""
    if num_processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def num_processes() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
