"""Samples of an `AnnotationSet`, and their collation into a `Batch`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from onestage.data.cache import FileReader, ImageReader, ReadImage
from onestage.data.mixing import NUM_TILES, Picture, mixup, mosaic
from onestage.data.resize import Placement
from onestage.data.transforms import SeededTransform
from onestage.errors import ConfigError, ImageError
from onestage.types import IGNORE, PADDING, AnnotationSet, Batch, Targets

OBJECTS_STEP = 16  # targets are padded to a multiple of it, so that their shape seldom changes
MAX_SUBSTITUTES = 8  # unreadable images in a row after which the error is raised: the disk may be gone
PARTNERS, SUBSTITUTES = 1, 2  # uses of randomness beside the augmentation, each with its own generator

SampleKey = tuple[int, int, int]  # seed, epoch, index of the image


class Failure(NamedTuple):
    """An image that could not be read, so that another took its place."""

    image_index: int  # row of the AnnotationSet
    message: str


class Sample(NamedTuple):
    """One image as the network sees it, and its objects."""

    image: Tensor  # [3, H, W] uint8, RGB
    boxes: Tensor  # [M, 4] float32 xyxy, px of `image`
    labels: Tensor  # [M] int64: 0..K-1 or IGNORE
    image_index: int  # row of the image in the AnnotationSet
    original_size: tuple[int, int]  # (height, width) of the decoded file
    placement: Placement  # of the decoded file on `image`; it does not describe random augmentation
    failures: tuple[Failure, ...] = ()  # images that others took the place of


class DetectionDataset(Dataset[Sample]):
    """Loads and transforms one image of a split at a time, with its targets.

    Args:
        annotations: the split.
        transform: augmentation and resize.
        seed: of the augmentation, which is a function of (seed, epoch, index of the image), >= 0.
        train_difficult: whether objects flagged as difficult are targets; if not, the loss ignores their regions, as
            it always ignores crowds.
        mosaic: probability that an image is put together with three others before its transforms, in [0, 1].
        mixup: probability that an image is blended with another after their transforms, in [0, 1].
        on_error: raise an error for an unreadable image, or skip it and take another, a function of
            (seed, epoch, index).
        images: reader of the images; None: their files.
        max_bad_fraction: fraction of the images that may fail with `on_error="skip"`; the loader counts them.
    """

    def __init__(
        self,
        annotations: AnnotationSet,
        transform: SeededTransform,
        *,
        seed: int = 0,
        train_difficult: bool = True,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        on_error: Literal["raise", "skip"] = "raise",
        images: ImageReader | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.train_difficult = train_difficult
        self.mosaic = mosaic
        self.mixup = mixup
        self.on_error = on_error
        self.images = images or FileReader(annotations)
        self.max_bad_fraction = max_bad_fraction

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.annotations)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Load and transform one image.

        Args:
            key: (epoch, index of the image), or the index alone, which stands for epoch 0.

        Raises:
            ImageError: the file cannot be decoded whole; the message names it.
            ConfigError: a transform cannot handle the image; the message names both.
        """
        epoch, given_index = key if isinstance(key, tuple) else (0, key)
        sample_key = (self.seed, epoch, given_index)
        failures: list[Failure] = []
        # A sampler that repeats images gives copy c of image i as c * N + i.
        row = given_index % len(self) if isinstance(key, tuple) else given_index
        index, image = self._open(row, sample_key, failures)
        random = _generator(sample_key, PARTNERS)
        picture = self._picture(index, image)
        if random.random() < self.mosaic:
            others = [self._partner(random, sample_key, failures) for _ in range(NUM_TILES - 1)]
            picture = mosaic([picture, *others], 2 * self.transform.resize.longest_side, random)
        picture = self._transformed(picture, index, sample_key)
        if random.random() < self.mixup:
            other = self._partner(random, sample_key, failures)
            picture = mixup(picture, self._transformed(other, index, (*sample_key, PARTNERS)), random)
        return Sample(
            image=torch.from_numpy(np.ascontiguousarray(picture.pixels)).permute(2, 0, 1),
            boxes=torch.from_numpy(picture.boxes),
            labels=torch.from_numpy(self._labels(picture.objects)),
            image_index=index,
            original_size=image.original_size,
            placement=self.transform.resize.place(*image.original_size),
            failures=tuple(failures),
        )

    def _open(self, index: int, key: SampleKey, failures: list[Failure]) -> tuple[int, ReadImage]:
        """Return image `index`, or its first readable substitute, a function of (seed, epoch, index)."""
        random = _generator((key[0], key[1], index), SUBSTITUTES)
        for _ in range(MAX_SUBSTITUTES):
            try:
                return index, self.images.read(index)
            except ImageError as error:
                if self.on_error == "raise":
                    raise
                failures.append(Failure(index, str(error)))
            index = int(random.integers(len(self)))
        return index, self.images.read(index)

    def _partner(self, random: np.random.Generator, key: SampleKey, failures: list[Failure]) -> Picture:
        """Return another image, or by chance the same."""
        return self._picture(*self._open(int(random.integers(len(self))), key, failures))

    def _picture(self, index: int, image: ReadImage) -> Picture:
        """Return an image with its boxes in its own pixels, which may be fewer than those of its file."""
        (height, width), (original_height, original_width) = image.pixels.shape[:2], image.original_size
        objects = self.annotations.objects(index)
        boxes = self.annotations.boxes[objects]
        if (height, width) != (original_height, original_width):
            boxes = boxes * np.array([width / original_width, height / original_height] * 2, dtype=np.float32)
        return Picture(image.pixels, boxes, np.arange(objects.start, objects.stop))

    def _transformed(self, picture: Picture, index: int, key: tuple[int, ...]) -> Picture:
        try:
            transformed = self.transform(picture.pixels, picture.boxes, key)
        except ConfigError as error:
            raise ConfigError(f"{self.annotations.image_paths[index]}: {error}") from error
        return Picture(transformed.image, transformed.boxes, picture.objects[transformed.rows])

    def _labels(
        self, objects: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the labels of objects [M], given by their rows; IGNORE for crowds and the like."""
        is_ignored = self.annotations.is_crowd[objects]
        if not self.train_difficult:
            is_ignored = is_ignored | self.annotations.is_difficult[objects]
        return np.where(is_ignored, IGNORE, self.annotations.labels[objects])


def _generator(key: SampleKey, use: int) -> np.random.Generator:
    # A spawn key, because SeedSequence treats (a, b, c) and (a, b, c, 0) as equal.
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(use,)))


class LoadedBatch(NamedTuple):
    """A batch, and the images that its workers could not read."""

    batch: Batch
    failures: tuple[Failure, ...]


def collate_with_failures(samples: Sequence[Sample]) -> LoadedBatch:
    """Collate samples, and collect their failures."""
    return LoadedBatch(collate(samples), tuple(failure for sample in samples for failure in sample.failures))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one image size; pad their objects to one length, a multiple of 16 and at least 16.

    The images are [B, 3, H, W] in channels_last memory, the layout of the decoder.
    """
    longest = max(len(sample.labels) for sample in samples)
    num_objects = OBJECTS_STEP * max(1, -(-longest // OBJECTS_STEP))
    boxes = torch.zeros(len(samples), num_objects, 4)
    labels = torch.full((len(samples), num_objects), PADDING)
    for row, sample in enumerate(samples):
        boxes[row, : len(sample.boxes)] = sample.boxes
        labels[row, : len(sample.labels)] = sample.labels
    return Batch(
        images=torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        targets=Targets(boxes, labels),
        image_indices=torch.tensor([sample.image_index for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        placements=torch.tensor([sample.placement for sample in samples]),
    )
