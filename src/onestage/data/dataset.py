"""From an `AnnotationSet` to samples, and from samples to a `Batch`. Which sample comes when is the samplers' part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from onestage.data.images import read_image
from onestage.data.transforms import SeededTransform
from onestage.types import IGNORE, PADDING, AnnotationSet, Batch, Targets

OBJECTS_STEP = 16  # targets are padded to a multiple of it, so that their shape seldom changes


class Sample(NamedTuple):
    """One image as the network sees it, and its objects."""

    image: Tensor  # [3, H, W] uint8, RGB
    boxes: Tensor  # [M, 4] float32 xyxy, px of `image`
    labels: Tensor  # [M] int64: 0..K-1 or IGNORE
    image_index: int  # row of the image in the AnnotationSet
    original_size: tuple[int, int]  # (height, width) of the decoded file


class DetectionDataset(Dataset[Sample]):
    """Opens one image of a split at a time, transforms it, and says what is an object and what the loss leaves out.

    Args:
        annotations: the split.
        transform: what happens to each image; see `SeededTransform`.
        seed: with the epoch and the index of the image it fixes the augmentation, >= 0.
        train_difficult: whether objects flagged as difficult are targets. If not, they are regions that the loss
            leaves out, as crowds always are.
    """

    def __init__(
        self, annotations: AnnotationSet, transform: SeededTransform, *, seed: int = 0, train_difficult: bool = True
    ) -> None:
        self.annotations = annotations
        self.transform = transform
        self.seed = seed
        self.train_difficult = train_difficult

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.annotations)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Load and transform one image.

        Args:
            key: (epoch, index of the image), or the index alone, which stands for epoch 0.

        Raises:
            ImageError: the file cannot be decoded whole; the message names it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        annotations = self.annotations
        height, width = annotations.sizes[index].tolist()
        image = read_image(str(annotations.image_paths[index]), (height, width))
        objects = annotations.objects(index)
        transformed = self.transform(image, annotations.boxes[objects], (self.seed, epoch, index))
        return Sample(
            image=torch.from_numpy(np.ascontiguousarray(transformed.image)).permute(2, 0, 1),
            boxes=torch.from_numpy(transformed.boxes),
            labels=torch.from_numpy(self._labels(objects)[transformed.rows]),
            image_index=index,
            original_size=image.shape[:2],
        )

    def _labels(self, objects: slice) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the labels of an image's objects [M], IGNORE where the loss leaves one out."""
        is_ignored = self.annotations.is_crowd[objects]
        if not self.train_difficult:
            is_ignored = is_ignored | self.annotations.is_difficult[objects]
        return np.where(is_ignored, IGNORE, self.annotations.labels[objects])


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one image size; pad their objects to one length, a multiple of 16 and at least 16.

    The images come out as [B, 3, H, W] in channels_last memory, because that is how they were decoded.
    """
    most = max(len(sample.labels) for sample in samples)
    num_objects = OBJECTS_STEP * max(1, -(-most // OBJECTS_STEP))
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
    )
