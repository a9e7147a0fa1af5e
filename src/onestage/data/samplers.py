"""Which image comes when, on which process. Both samplers are pure functions of their arguments and the epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from onestage.data.dataset import DetectionDataset
from onestage.errors import ConfigError, DataError

# Both are DistributedSamplers because Lightning shards every other sampler once more.


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Visits the images in an order that is a function of (seed, epoch), and yields (epoch, index).

    All processes together take batches of `world_size * batch_size` images off the front of that order; what is left
    at the end waits for another epoch. So no image comes twice in an epoch, every process has the same number of
    batches, and the images of a step depend on the size of the whole batch only, not on how many processes share it.

    Args:
        dataset: the training split, N images.
        batch_size: per process, >= 1.
        seed: >= 0.
        rank: of this process, 0..world_size - 1.
        world_size: number of processes.

    Raises:
        ConfigError: there are fewer images than one batch takes.
    """

    def __init__(
        self, dataset: DetectionDataset, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.num_images = num_images = len(dataset)
        self.batch_size = batch_size
        self.world_size = world_size
        self.num_batches = num_images // (batch_size * world_size)  # the same on every process
        self.num_samples = self.num_batches * batch_size
        self.total_size = self.num_samples * world_size
        self.batches_to_skip = 0  # set by the loader for the one epoch in which training resumes
        if self.num_batches == 0:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"data.batch_size is {batch_size}{processes}, but the training split has only {num_images} images; "
                f"one batch of all processes must fit into it.\nSet data.batch_size to at most "
                f"{max(num_images // world_size, 1)}."
            )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over this process's share of the epoch given by `set_epoch`."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        share = order[self.rank : self.total_size : self.num_replicas]
        epoch = self.epoch
        return ((epoch, index) for index in share[self.batches_to_skip * self.batch_size :].tolist())


class EvaluationSampler(DistributedSampler[int]):
    """Visits every image exactly once, over all processes: process r of W takes images r, r + W, r + 2 W, ...

    Nothing is repeated to make the shares equal, so processes may differ by one image.

    Args:
        dataset: the split, N images.
        rank: of this process, 0..world_size - 1.
        world_size: number of processes.

    Raises:
        DataError: a process would get no image, and the others would wait for it forever.
    """

    def __init__(self, dataset: DetectionDataset, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        num_images = len(dataset)
        if num_images < world_size:
            raise DataError(
                f"{dataset.annotations.source} has {num_images} images for {world_size} processes; each needs at "
                "least one.\n"
                f"Set trainer.devices to at most {max(num_images, 1)}, or give more images."
            )
        self._share = range(rank, num_images, world_size)
        self.num_samples = len(self._share)
        self.total_size = num_images

    def __iter__(self) -> Iterator[int]:
        """Iterate over this process's images."""
        return iter(self._share)
