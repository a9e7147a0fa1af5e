"""Samples of an `AnnotationSet`, and their collation into a `Batch`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from onestage.data.cache import FileReader
from onestage.data.image_headers import with_header_sizes
from onestage.data.resize import Canvas, Placement
from onestage.data.source import ImageReader
from onestage.data.transforms import Picture, SeededTransform, mixup, mosaic
from onestage.errors import ConfigError, ImageError, require
from onestage.types import IGNORE, PADDING, AnnotationSet, Batch, Targets

OBJECTS_STEP = 16  # targets are padded to a multiple of it, so that their shape seldom changes
MAX_SUBSTITUTES = 8  # unreadable images in a row after which the error is raised: the disk may be gone
UNREAD = (0, 0)
PARTNERS, SUBSTITUTES = 1, 2  # uses of randomness beside the augmentation, each with its own generator

SampleKey = tuple[int, int, int]  # seed, epoch, index of the image


class Failure(NamedTuple):
    """An image that could not be read, so that another took its place or, in an evaluation, none."""

    image_index: int  # row of the AnnotationSet
    message: str


class Sample(NamedTuple):
    """One image as the network sees it, and its objects."""

    image: Tensor  # [3, H, W] uint8, RGB
    boxes: Tensor  # [M, 4] float32 xyxy, px of `image`
    labels: Tensor  # [M] int64: 0..K-1 or IGNORE
    image_index: int  # row of the image in the AnnotationSet
    original_size: tuple[int, int]  # (height, width) of the decoded file; UNREAD: the image is left out
    placement: Placement  # of the decoded file on `image`; it does not describe random augmentation
    failures: tuple[Failure, ...] = ()  # images that were replaced


class DetectionDataset(Dataset[Sample]):
    """Loads and transforms one image of a split at a time, with its targets.

    Args:
        annotations: the split.
        transform: augmentation and resize.
        seed: of the augmentation, which is a function of (seed, epoch, index of the image), >= 0.
        train_difficult: whether objects flagged as difficult are targets; if not, the loss ignores their regions, as
            it always ignores crowds.
        mosaic, mixup: as in `DetectionDataModule`; the other images are functions of (seed, epoch, index).
        on_error: as in `DetectionDataModule`; or "leave_out": the batch is shorter by each image that cannot be read.
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
        on_error: Literal["raise", "skip", "leave_out"] = "raise",
        images: ImageReader | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.mosaic = mosaic
        self.mixup = mixup
        self.on_error = on_error
        self.images = images or FileReader(annotations)
        self.max_bad_fraction = max_bad_fraction
        is_ignored = annotations.is_crowd if train_difficult else annotations.is_crowd | annotations.is_difficult
        self._labels = np.where(is_ignored, IGNORE, annotations.labels)
        self._canvas_numbers = self._find_canvases()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.annotations)

    def rows_by_canvas(self) -> list[npt.NDArray[np.int64]]:
        """Return the images of each canvas in use; samplers fill batches with those of one."""
        numbers = self._canvas_numbers
        return [np.flatnonzero(numbers == number) for number in np.unique(numbers)]

    def _find_canvases(self) -> npt.NDArray[np.int64]:
        """Return the number of each image's canvas, [N]: of its annotated size, else its file's, else the first."""
        resize = self.transform.resize
        if len(resize.canvases) == 1:
            return np.zeros(len(self), dtype=np.int64)
        found, numbers = np.unique(with_header_sizes(self.annotations).sizes, axis=0, return_inverse=True)
        canvases = [resize.canvas_of(*size) if all(size) else resize.canvases[0] for size in found.tolist()]
        return np.array([resize.canvases.index(canvas) for canvas in canvases], dtype=np.int64)[numbers.reshape(-1)]

    def __getitem__(self, key: int | tuple[int, int] | None) -> Sample:
        """Load and transform one image.

        key: (epoch, index of the image), or the index alone, which stands for epoch 0. Copy c of image i has the index
        c * N + i in a tuple. None: no image, for a place in a batch that stays empty. Raises ImageError if the file
        cannot be decoded whole, ConfigError if a transform cannot handle the image.
        """
        if key is None:
            return self._left_out()
        epoch, item = key if isinstance(key, tuple) else (0, key)
        sample_key = (self.seed, epoch, item)
        random = _generator(sample_key, PARTNERS)
        failures: list[Failure] = []

        def read_partner() -> tuple[int, Picture, tuple[int, int]]:
            return self._read(int(random.integers(len(self))), sample_key, failures)  # by chance the same image

        first_index = item % len(self) if isinstance(key, tuple) else item
        try:
            index, picture, original_size = self._read(first_index, sample_key, failures)
        except ImageError as error:
            if self.on_error != "leave_out":
                raise
            return self._left_out(Failure(first_index, str(error)))
        # Of the whole batch, also if a substitute is read.
        canvas = self.transform.resize.canvases[self._canvas_numbers[first_index]]
        if random.random() < self.mosaic:
            pictures = [picture, *(read_partner()[1] for _ in range(3))]
            picture = mosaic(pictures, 2 * self.transform.resize.longest_side, random)
        picture = self._transformed(picture, index, sample_key, canvas)
        if random.random() < self.mixup:
            partner_index, partner, _ = read_partner()
            partner = self._transformed(partner, partner_index, (*sample_key, PARTNERS), canvas)
            picture = mixup(picture, partner, random)
        return Sample(
            image=torch.from_numpy(np.ascontiguousarray(picture.image)).permute(2, 0, 1),
            boxes=torch.from_numpy(picture.boxes),
            labels=torch.from_numpy(self._labels[picture.rows]),
            image_index=index,
            original_size=original_size,
            placement=self.transform.resize.place(*original_size, canvas),
            failures=tuple(failures),
        )

    def _read(self, index: int, key: SampleKey, failures: list[Failure]) -> tuple[int, Picture, tuple[int, int]]:
        """Return image `index`, or its first readable substitute: index, picture, and (height, width) of the file.

        The picture may be smaller than the file, as cached copies are.
        """
        first_index, random = index, None  # a generator takes longer than the header of an image
        for trial in range(MAX_SUBSTITUTES + 1):
            try:
                pixels, original_size = self.images(index)
                break
            except ImageError as error:
                if self.on_error != "skip" or trial == MAX_SUBSTITUTES:
                    raise
                failures.append(Failure(index, str(error)))
            random = random or _generator((*key[:2], first_index), SUBSTITUTES)
            index = int(random.integers(len(self)))
        objects = self.annotations.objects(index)
        scales = [pixels.shape[1] / original_size[1], pixels.shape[0] / original_size[0]] * 2
        boxes = self.annotations.boxes[objects] * np.array(scales, dtype=np.float32)
        return index, Picture(pixels, boxes, np.arange(objects.start, objects.stop)), original_size

    def _left_out(self, *failures: Failure) -> Sample:
        """Return a blank sample, which `collate` drops."""
        blank = torch.zeros(3, *self.transform.resize.canvases[0], dtype=torch.uint8)
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        return Sample(blank, boxes, labels, -1, UNREAD, Placement(1.0, 1.0), failures)

    def _transformed(self, picture: Picture, index: int, key: tuple[int, ...], canvas: Canvas) -> Picture:
        try:
            image, boxes, kept = self.transform(picture.image, picture.boxes, key, canvas)
        except ConfigError as error:
            raise ConfigError(f"{self.annotations.image_paths[index]}: {error}") from error
        return Picture(image, boxes, picture.rows[kept])


def _generator(key: SampleKey, use: int) -> np.random.Generator:
    # A spawn key, because SeedSequence treats (a, b, c) and (a, b, c, 0) as equal.
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(use,)))


class LoadedBatch(NamedTuple):
    """A batch, and the images that its workers could not read."""

    batch: Batch
    failures: tuple[Failure, ...]


def collate_with_failures(samples: Sequence[Sample]) -> LoadedBatch:
    """Collate the samples that could be read, perhaps none, and collect the failures of all."""
    return LoadedBatch(collate(samples), tuple(failure for sample in samples for failure in sample.failures))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one canvas; pad their objects to one length, a multiple of 16 and at least 16.

    Samples without an image are dropped, so B is at most their number. The images are [B, 3, H, W] in channels_last
    memory, the layout of the decoder. Raises ConfigError if they have several canvases.
    """
    read = [sample for sample in samples if sample.original_size != UNREAD]
    stacked = read or samples[:1]
    canvases = sorted({tuple(sample.image.shape[1:]) for sample in stacked})
    remedy = "Give the loader a TrainingSampler or EvaluationSampler of onestage.data with its batch_size."
    require(len(canvases) == 1, "loader: sizes of a batch's images", canvases, "one (height, width)", remedy)
    longest = max(len(sample.labels) for sample in stacked)
    num_objects = OBJECTS_STEP * max(1, -(-longest // OBJECTS_STEP))
    boxes = torch.zeros(len(stacked), num_objects, 4)
    labels = torch.full((len(stacked), num_objects), PADDING)
    for row, sample in enumerate(stacked):
        boxes[row, : len(sample.boxes)] = sample.boxes
        labels[row, : len(sample.labels)] = sample.labels
    images = torch.stack([sample.image.permute(1, 2, 0) for sample in stacked]).permute(0, 3, 1, 2)
    batch_size = len(read)  # 0: only the shapes of the one stacked sample are kept
    return Batch(
        images=images[:batch_size],
        targets=Targets(boxes[:batch_size], labels[:batch_size]),
        image_indices=torch.tensor([sample.image_index for sample in stacked])[:batch_size],
        original_sizes=torch.tensor([sample.original_size for sample in stacked])[:batch_size],
        placements=torch.tensor([sample.placement for sample in stacked])[:batch_size],
    )
