"""Training augmentation as a function of a key: the adapter of every albumentations transform."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.augmentation import SSDAugmentation, SSDPhotometricDistort
from onestage.data.crops import ScaleJitter, SSDMinIoUCrop, SSDZoomOut
from onestage.data.resize import Boxes, Resize, RGBImage, Stretch
from onestage.errors import ConfigError, OnestageError, require

MIN_SIDE = 1.0  # px of the network input; a network cannot find less of an object
MAX_CANVASES = 4.0  # longest canvas sides; a larger image is shrunk first, since zooming out of a photo takes gigabytes
MIN_TRACE = 0.01  # px; albumentations raises on a box that rounding has left without width or height


def ssd_transforms(resize: Resize) -> list[A.BasicTransform]:
    """Return SSD's training augmentation (arXiv:1512.02325, sections 2.2 and 3.6) before a resize.

    `SSDAugmentation` stretches what it crops; where images keep their aspect ratio its parts are used instead.
    """
    if isinstance(resize, Stretch):
        return [SSDAugmentation(resize.size)]
    return [SSDPhotometricDistort(), SSDZoomOut(), SSDMinIoUCrop(), A.HorizontalFlip(p=0.5)]


def training_transforms(
    given: Sequence[A.BasicTransform] | None, resize: Resize, scale_jitter: tuple[float, float] | None
) -> list[A.BasicTransform]:
    """Return the given transforms, or SSD's if None, after the scale jitter if there is one.

    Raises:
        ConfigError: the range of `scale_jitter` is invalid.
    """
    transforms = ssd_transforms(resize) if given is None else list(given)
    if scale_jitter is None:
        return transforms
    low, high = scale_jitter
    remedy = "Set data.scale_jitter: [0.5, 1.5], or null."
    rule = "[low, high] with 0.25 <= low <= high <= 4"
    require(0.25 <= low <= high <= 4, "data.scale_jitter", list(scale_jitter), rule, remedy)
    return [ScaleJitter(scale_jitter), *transforms]


class Transformed(NamedTuple):
    """An image on its canvas, with its boxes."""

    image: RGBImage  # [H, W, 3] of one of the canvases
    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy, px of the canvas; inside it, and >= 1 px wide and high
    rows: npt.NDArray[np.int64]  # [n] row of each box among the given ones


class SeededTransform:
    """Albumentations transforms, then a resize; their randomness is a function of a key.

    The same key gives the same result in every process. (albumentations alone repeats its draws in every worker and
    epoch, and gives all transforms of a seeded pipeline the same draws.)

    Args:
        transforms: albumentations transforms for images and boxes, in order; empty in evaluation.
        resize: puts the result on its canvas.
    """

    def __init__(self, transforms: Sequence[A.BasicTransform], resize: Resize) -> None:
        self.resize = resize
        # Alone, SSDAugmentation needs nothing of Compose, whose bookkeeping takes half as long as the augmentation.
        is_alone = len(transforms) == 1 and isinstance(transforms[0], SSDAugmentation)
        self._ssd = transforms[0] if is_alone else None
        # Labels would come back as floats, so only row numbers travel; they are small enough to stay exact.
        params = A.BboxParams(format="pascal_voc", label_fields=["rows"], min_width=MIN_TRACE, min_height=MIN_TRACE)
        self._pipeline = A.Compose(list(transforms), bbox_params=params) if transforms and not is_alone else None

    def __call__(self, image: RGBImage, boxes: Boxes, key: tuple[int, ...]) -> Transformed:
        """Transform an image with its boxes.

        Args:
            image: [H, W, 3] uint8 RGB.
            boxes: [n, 4] xyxy edges in pixels of the image; they are clipped to it.
            key: (seed, epoch, index of the image), each >= 0, and a number that separates several uses of one image.

        Raises:
            ConfigError: a transform fails on this image, or the result is not a uint8 RGB image.
        """
        if self._ssd is not None or self._pipeline is not None:
            image, boxes = _shrink(image, boxes, MAX_CANVASES * self.resize.longest_side)
        height, width = image.shape[:2]
        inside = boxes.clip(0, (width, height) * 2)
        rows = np.flatnonzero((inside[:, 2:] - inside[:, :2] >= MIN_TRACE).all(axis=1))
        image, boxes, rows = self._augment(image, inside[rows], rows, np.random.SeedSequence(key))
        placement = self.resize.place(image.shape[0], image.shape[1])
        canvas = self.resize.apply(image)
        limits = np.array([canvas.shape[1], canvas.shape[0]] * 2, dtype=np.float32)
        boxes = placement.to_canvas(boxes).clip(0, limits)
        is_kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        return Transformed(canvas, boxes[is_kept], rows[is_kept])

    def _augment(
        self, image: RGBImage, boxes: Boxes, rows: npt.NDArray[np.int64], sequence: np.random.SeedSequence
    ) -> tuple[RGBImage, Boxes, npt.NDArray[np.int64]]:
        """Apply the transforms, and name the key in the error if one fails."""
        try:
            if self._ssd is not None:
                return self._augment_with_ssd(image, boxes, rows, sequence)
            if self._pipeline is None:
                return image, boxes, rows
            # One generator for all: seeding each transform by itself would correlate their draws.
            seed = random.Random(int(sequence.generate_state(1)[0]))
            self._pipeline.set_random_state(np.random.default_rng(sequence), seed)
            result: dict[str, Any] = self._pipeline(image=image, bboxes=boxes, rows=rows)
        except OnestageError:
            raise
        except Exception as reason:  # transforms raise exceptions of any kind
            raise ConfigError(
                f"data.train_transforms failed on an image of {image.shape[1]} x {image.shape[0]} pixels with "
                f"{len(boxes)} objects: {type(reason).__name__}: {reason}\n"
                "Remove or change the transform that cannot handle it."
            ) from reason
        new_boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)  # an empty result is a list
        return _checked(result["image"]), new_boxes, np.asarray(result["rows"], dtype=np.int64).reshape(-1)

    def _augment_with_ssd(
        self, image: RGBImage, boxes: Boxes, rows: npt.NDArray[np.int64], sequence: np.random.SeedSequence
    ) -> tuple[RGBImage, Boxes, npt.NDArray[np.int64]]:
        assert self._ssd is not None
        height, width = image.shape[:2]
        relative = np.empty((len(boxes), 5))  # with the row number behind, as Compose passes it
        relative[:, :4], relative[:, 4] = boxes / ((width, height) * 2), rows
        view = self._ssd.draw(np.random.default_rng(sequence), (height, width), relative[:, :4])
        moved = self._ssd.apply_to_bboxes(relative, view=view, shape=image.shape)
        return self._ssd.apply(image, view=view), moved[:, :4] * self._ssd.image_size, moved[:, 4].astype(np.int64)


def _checked(image: object) -> RGBImage:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ConfigError(
        f"data.train_transforms gave an image of type {found}; it must be a uint8 array [H, W, 3].\n"
        "Remove what converts images (Normalize, ToFloat, ToTensorV2, ToGray): the detector normalises them."
    )


def _shrink(image: RGBImage, boxes: Boxes, max_side: float) -> tuple[RGBImage, Boxes]:
    """Scale an image down until its longer side is `max_side` px; SSD's smallest crop of 0.3 keeps its detail."""
    height, width = image.shape[:2]
    factor = max_side / max(height, width)
    if factor >= 1:
        return image, boxes
    new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
    small = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    return np.asarray(small, dtype=np.uint8), boxes * scale
