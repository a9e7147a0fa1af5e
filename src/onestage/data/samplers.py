"""Samplers: the order of the images, and how often an epoch shows each, as functions of (seed, epoch)."""

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from onestage.data.dataset import DetectionDataset
from onestage.errors import ConfigError, DataError, require
from onestage.types import AnnotationSet

FLOAT_SLACK = 1e-6  # exceeds the rounding error of a sum of a million float64

logger = logging.getLogger(__name__)


class Sampling(ABC):
    """How many times an epoch shows each image on average; `TrainingSampler` draws whole numbers."""

    @abstractmethod
    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return the expected number of times that an epoch shows each image, [N], >= 0."""


class RepeatFactorSampling(Sampling):
    """Repeats the images of rare classes: LVIS's r_c = max(1, sqrt(t / f_c)) (arXiv:1908.03195, appendix B).

    f_c is the fraction of images with class c; an image is shown max r_c times over its classes, one without objects
    once. So an epoch is longer than the set.

    Args:
        threshold: t, the fraction of images below which a class counts as rare, in (0, 1]. LVIS: 0.001.
    """

    def __init__(self, threshold: float = 0.001) -> None:
        remedy = "Set data.sampling.init_args.threshold: 0.001, LVIS's value, or more for a small set."
        require(0 < threshold <= 1, "data.sampling.threshold", threshold, "in (0, 1]", remedy)
        self.threshold = threshold

    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return r_i = max over the classes of image i of r_c, [N], >= 1."""
        images, _, num_images = _pairs(annotations)
        repeats = np.ones(len(annotations))
        np.maximum.at(repeats, images, np.sqrt(self.threshold / (num_images / len(annotations))))
        return repeats


class ClassBalancedSampling(Sampling):
    """Shows every class equally often, as if a class were drawn first and then one of its images.

    Class-aware sampling, arXiv:1512.05830, section 3.2. An epoch is as long as the set: of the N' images with objects,
    image i is shown N' / K sum_c 1 / N_c times, summed over its classes c, where N_c images show c and K classes
    occur; images without objects are shown once. The few images of a rare class are repeated very often.
    """

    def repeats(self, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
        """Return the expected number of times each image is shown, [N]; they add up to N."""
        images, classes, num_images = _pairs(annotations)
        repeats = np.ones(len(annotations))
        repeats[images] = 0.0
        share = len(np.unique(images)) / max(len(np.unique(classes)), 1)
        np.add.at(repeats, images, share / num_images)
        return repeats


def count_repeats(sampling: Sampling, annotations: AnnotationSet) -> npt.NDArray[np.float64]:
    """Return the repeats of every image, [N] >= 0, or ConfigError; print an epoch's length, or warn of no effect."""
    repeats = np.asarray(sampling.repeats(annotations), dtype=np.float64)
    is_valid = repeats.shape == (len(annotations),) and bool((repeats >= 0).all()) and 0 < repeats.sum() < np.inf
    rule = f"one number >= 0 for each of the {len(annotations)} images"
    require(is_valid, f"data.sampling: repeats of {type(sampling).__name__}", repeats, rule)
    if np.allclose(repeats, 1):
        problem = f"no class of {annotations.source} is rare enough"
        remedy = "Remove data.sampling, or raise its threshold if it has one."
        rank_zero_only(logger.warning)(f"data.sampling has no effect: {problem}. {remedy}")
    else:
        counts = f"{repeats.sum():.0f} images of {len(repeats)}, one of them up to {repeats.max():.1f} times"
        rank_zero_info(f"data.sampling: an epoch shows {counts}")
    return repeats


def _pairs(annotations: AnnotationSet) -> tuple[npt.NDArray[np.int64], ...]:
    """Return images [n] and classes [n], every pair once and without crowds, and the number of images of each class."""
    images, is_target, num_classes = annotations.image_rows, ~annotations.is_crowd, len(annotations.class_names)
    pairs = np.unique(images[is_target] * num_classes + annotations.labels[is_target])
    images, classes = pairs // num_classes, pairs % num_classes
    return images, classes, np.bincount(classes)[classes]


# Both are DistributedSamplers because Lightning shards every other sampler once more.


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Visits the images in an order that is a function of (seed, epoch), and yields (epoch, index).

    All processes together take batches of `world_size * batch_size` images of one canvas from the front of that order;
    the rest of each canvas is not used in this epoch. So every process has the same number of batches, and the images
    of a step depend on the size of the whole batch only, not on the number of processes.

    With `repeats`, an epoch shows image i `floor(repeats[i])` or one more times. Its copy number c is item (epoch,
    c * N + i), which `DetectionDataset` augments in its own way. Raises ConfigError if no batch can be filled.

    Args:
        dataset: the training split, N images.
        batch_size: per process, >= 1.
        seed: of the order, >= 0.
        rank, world_size: number of this process, in [0, world_size), and of all.
        repeats: [N] how many times an epoch shows each image on average, >= 0 (see `Sampling`); None: once.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: npt.NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self._repeats = repeats
        self._groups = dataset.rows_by_canvas()
        # Of every epoch, regardless of how `draw_copies` rounds.
        self._sizes = [len(g) if repeats is None else int(repeats[g].sum() + FLOAT_SLACK) for g in self._groups]
        self.num_images = sum(self._sizes)
        # A checksum of the images, of how often an epoch shows each, and of their canvases, to detect a change.
        self.selection = zlib.crc32(dataset.annotations.image_ids.tobytes())
        for values in ([] if repeats is None else [repeats]) + self._groups[1:]:
            self.selection = zlib.crc32(values.tobytes(), self.selection)
        self.batch_size = batch_size
        self.world_size = world_size
        self.num_batches = sum(size // (batch_size * world_size) for size in self._sizes)  # the same on every process
        self.num_samples = self.num_batches * batch_size
        self.total_size = self.num_samples * world_size
        self.batches_to_skip = 0  # set by the loader for the one epoch in which training resumes
        num_lost = sum(size for size in self._sizes if size < batch_size * world_size)
        if num_lost and self.num_batches:
            rule = f"a step takes {batch_size * world_size} images of one canvas, and theirs has fewer"
            remedy = "Lower data.batch_size, or give data.resize fewer canvases."
            rank_zero_only(logger.warning)(f"{num_lost} images are never trained on: {rule}. {remedy}")
        if self.num_batches == 0:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            images = f"{max(self._sizes)} images{' of one canvas' if len(self._groups) > 1 else ''}"
            raise ConfigError(
                f"data.batch_size is {batch_size}{processes}, but the training split has only {images}.\n"
                f"Set data.batch_size to at most {max(max(self._sizes) // world_size, 1)}."
            )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over this process's share of the epoch given by `set_epoch`."""
        generator = np.random.default_rng((self.seed, self.epoch))
        images_per_step, orders = self.batch_size * self.num_replicas, []
        for group, size in zip(self._groups, self._sizes, strict=True):
            items = group
            if self._repeats is not None:
                copies, places = np.divmod(draw_copies(self._repeats[group], generator), len(group))
                items = copies * len(self._repeats) + group[places]
            orders.append(generator.permutation(items)[: size // images_per_step * images_per_step])
        order = np.concatenate(orders)
        if len(orders) > 1:  # of whole steps
            order = generator.permutation(order.reshape(-1, images_per_step)).reshape(-1)
        share = order[self.rank :: self.num_replicas][self.batches_to_skip * self.batch_size :]
        return zip(repeat(self.epoch), share.tolist(), strict=False)


def draw_copies(repeats: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Round the repeats of every image up or down at random, and return an item for each copy.

    Systematic sampling: the fractions are laid end to end in random order, and a grid of step 1 with a random start
    picks those it meets. So each is rounded up with the probability of its fraction, and the sum is always that of
    `repeats`, [N], rounded up or down. Copy c of image i is c * N + i in the result.
    """
    copies = np.floor(repeats).astype(np.int64)
    order = generator.permutation(len(repeats))
    edges = np.concatenate([[0.0], np.cumsum((repeats - copies)[order])]) + generator.random()
    edges[-1] += FLOAT_SLACK  # rounding of a whole sum must not lose an image
    copies[order] += np.diff(np.floor(edges)).astype(np.int64)
    images = np.repeat(np.arange(len(repeats)), copies)
    first = np.repeat(np.cumsum(copies) - copies, copies)
    return (np.arange(len(images)) - first) * len(repeats) + images


class EvaluationSampler(DistributedSampler[int | None], SequentialSampler):
    """Visits every image exactly once, over all processes: process r of W takes images r, r + W, r + 2 W, ...

    Processes may differ by one image. All images of a batch have one canvas, so that the network sees an image as it
    would see it alone; the last batch of a canvas is filled with None, which yields no image.

    A SequentialSampler, because `overfit_batches` replaces every other sampler, and all processes would get the same
    images. No batch sampler, because Lightning would rebuild it around another sampler. Raises DataError if a process
    would get no image, for which the others would wait for ever.

    Args:
        dataset: the split, N images.
        batch_size: of the loader, per process, >= 1.
        rank, world_size: number of this process, in [0, world_size), and of all.
        is_even: whether the last images of each canvas are left out so that all shares are equal, as training needs.
    """

    def __init__(
        self, dataset: DetectionDataset, *, batch_size: int, rank: int = 0, world_size: int = 1, is_even: bool = False
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        groups = dataset.rows_by_canvas()
        num_images = max(map(len, groups), default=0) if is_even else len(dataset)
        if num_images < world_size:
            canvas = " of one canvas" if is_even and len(groups) > 1 else ""
            raise DataError(
                f"{dataset.annotations.source} has {num_images} images{canvas} for {world_size} processes.\n"
                f"Set trainer.devices to at most {max(num_images, 1)}, or give more images."
            )
        self._share: list[int | None] = []
        start = 0  # of the group, in the order that the processes divide
        for group in groups:
            images = group[: len(group) // world_size * world_size if is_even else None]
            self._share += [None] * (-len(self._share) % batch_size)
            self._share += images[(rank - start) % world_size :: world_size].tolist()
            start += len(images)
        self.num_samples = len(self._share)
        self.total_size = start

    def __iter__(self) -> Iterator[int | None]:  # type: ignore[override]  # SequentialSampler has no empty places
        """Iterate over this process's images; None fills up a batch."""
        return iter(self._share)
