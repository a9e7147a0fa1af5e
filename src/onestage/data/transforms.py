"""The default pipelines, and the one adapter through which every albumentations transform runs."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.crops import Boxes, ScaleJitter
from onestage.data.ssd_augmentation import SSDAugmentation
from onestage.errors import ConfigError, OnestageError

MIN_SIDE = 1.0  # px of the network input; less of an object is nothing that a network could find
MAX_SIDES = 4.0  # network inputs; a larger image is shrunk first: zooming out of a phone's photo takes gigabytes
MIN_TRACE = 0.01  # px; albumentations stops at a box that rounding has left without width or height

RGBImage = npt.NDArray[np.uint8]


def ssd_transforms(image_size: int) -> list[A.BasicTransform]:
    """Return SSD's training augmentation (arXiv:1512.02325, sections 2.2 and 3.6).

    Args:
        image_size: side of the square result, px.
    """
    return [SSDAugmentation(image_size)]


def training_transforms(
    given: Sequence[A.BasicTransform] | None, image_size: int, scale_jitter: tuple[float, float] | None
) -> list[A.BasicTransform]:
    """Return the given transforms, or SSD's where there are none, behind a change of scale if one is asked for.

    Args:
        given: albumentations transforms; None: `ssd_transforms`.
        image_size: side of the square result, px.
        scale_jitter: range of the factor of `ScaleJitter`; None: no change.

    Raises:
        ConfigError: the range is not one.
    """
    transforms = ssd_transforms(image_size) if given is None else list(given)
    if scale_jitter is None:
        return transforms
    if not 0.25 <= scale_jitter[0] <= scale_jitter[1] <= 4:
        raise ConfigError(
            f"data.scale_jitter is [{scale_jitter[0]:g}, {scale_jitter[1]:g}]; it must be [low, high] with "
            "0.25 <= low <= high <= 4.\nSet data.scale_jitter: [0.5, 1.5], or null."
        )
    return [ScaleJitter(scale_jitter), *transforms]


def resize_transforms(image_size: int) -> list[A.BasicTransform]:
    """Return what evaluation does: stretch the whole image to a square of side `image_size`, px."""
    return [A.Resize(image_size, image_size)]


class Transformed(NamedTuple):
    """What a pipeline makes of an image and its boxes."""

    image: npt.NDArray[np.uint8]  # [image_size, image_size, 3] RGB
    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy, px of the new image; inside it and at least one pixel wide and high
    rows: npt.NDArray[np.int64]  # [n] which of the given boxes each one was


class SeededTransform:
    """A pipeline of albumentations transforms whose randomness is a function of a key.

    The same key gives the same result in every process, whatever ran before. (albumentations alone repeats its draws
    in every worker and every epoch, and gives all transforms of a seeded pipeline the same draws.)

    Args:
        transforms: albumentations transforms for images and boxes, in order.
        image_size: side of the square result, px. Whatever has another size at the end is stretched to it.
    """

    def __init__(self, transforms: Sequence[A.BasicTransform], image_size: int) -> None:
        self.image_size = image_size
        # Alone, the recipe needs none of Compose, whose bookkeeping takes half as long as the recipe itself.
        is_alone = len(transforms) == 1 and isinstance(transforms[0], SSDAugmentation)
        self._recipe = transforms[0] if is_alone and transforms[0].image_size == image_size else None
        self._pipeline = A.Compose(
            [*transforms, A.Resize(image_size, image_size)],  # no work where the last transform has resized already
            # Labels would come back as floats, so only row numbers travel, which are small enough to stay exact.
            bbox_params=A.BboxParams(
                format="pascal_voc", label_fields=["rows"], min_width=MIN_TRACE, min_height=MIN_TRACE
            ),
        )

    def __call__(self, image: RGBImage, boxes: npt.NDArray[np.float32], key: tuple[int, ...]) -> Transformed:
        """Transform an image with its boxes.

        Args:
            image: [H, W, 3] uint8 RGB.
            boxes: [n, 4] xyxy edges in pixels of the image. What lies outside the image is cut off.
            key: (seed, epoch, index of the image), each >= 0, and what else tells one use of it from another.

        Raises:
            ConfigError: a transform fails on this image, or they do not leave a uint8 RGB image.
        """
        image, boxes = _shrunk(image, boxes, MAX_SIDES * self.image_size)
        height, width = image.shape[:2]
        inside = boxes.clip(0, (width, height, width, height))
        given = np.flatnonzero((inside[:, 2:] - inside[:, :2] >= MIN_TRACE).all(axis=1))
        transform = self._transform_with_compose if self._recipe is None else self._transform_alone
        try:
            new_image, new_boxes, rows = transform(image, inside[given], given, np.random.SeedSequence(key))
        except OnestageError:
            raise
        except Exception as reason:  # each transform of albumentations and OpenCV fails in a way of its own
            raise ConfigError(
                f"data.train_transforms failed on an image of {width} x {height} pixels with {len(given)} objects: "
                f"{type(reason).__name__}: {reason}\nTake out or change the transform that cannot handle it."
            ) from reason
        new_boxes = np.asarray(new_boxes, dtype=np.float32).reshape(-1, 4).clip(0, self.image_size)
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)  # an empty result comes back as a list
        is_kept = (new_boxes[:, 2:] - new_boxes[:, :2] >= MIN_SIDE).all(axis=1)
        return Transformed(self._checked(new_image), new_boxes[is_kept], rows[is_kept])

    def _transform_with_compose(
        self, image: RGBImage, boxes: Boxes, rows: npt.NDArray[np.int64], sequence: np.random.SeedSequence
    ) -> tuple[Any, Any, Any]:
        # One generator for all: seeding each transform by itself would correlate their draws.
        self._pipeline.set_random_state(
            np.random.default_rng(sequence), random.Random(int(sequence.generate_state(1)[0]))
        )
        result = self._pipeline(image=image, bboxes=boxes, rows=rows)
        return result["image"], result["bboxes"], result["rows"]

    def _transform_alone(
        self, image: RGBImage, boxes: Boxes, rows: npt.NDArray[np.int64], sequence: np.random.SeedSequence
    ) -> tuple[Any, Any, Any]:
        assert self._recipe is not None
        height, width = image.shape[:2]
        relative = np.empty((len(boxes), 5))  # with the row number behind, as Compose passes it
        relative[:, :4], relative[:, 4] = boxes / ((width, height) * 2), rows
        view = self._recipe.draw(np.random.default_rng(sequence), (height, width), relative[:, :4])
        moved = self._recipe.apply_to_bboxes(relative, view=view, shape=image.shape)
        return self._recipe.apply(image, view=view), moved[:, :4] * self.image_size, moved[:, 4]

    def _checked(self, image: object) -> RGBImage:
        expected = (self.image_size, self.image_size, 3)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == expected:
            return image
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ConfigError(
            f"data.train_transforms gave an image of type {found}; it must be a uint8 array of shape {expected}.\n"
            "Leave out what converts images (Normalize, ToFloat, ToTensorV2, ToGray): the detector normalises them."
        )


def _shrunk(
    image: RGBImage, boxes: npt.NDArray[np.float32], max_side: float
) -> tuple[RGBImage, npt.NDArray[np.float32]]:
    """Bring the longer side down to `max_side` px where it is longer; SSD's smallest crop of 0.3 keeps its detail."""
    height, width = image.shape[:2]
    factor = max_side / max(height, width)
    if factor >= 1:
        return image, boxes
    new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    return np.asarray(small, dtype=np.uint8), boxes * scale
