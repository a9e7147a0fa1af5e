"""Small data sets of image files, made by hand."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from annotation_sets import hand_written
from PIL import Image

from onestage.types import AnnotationSet


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random RGB pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random colours that change slowly, as in a photograph."""
    return cv2.resize(noise(5, 6, seed), (width, height), interpolation=cv2.INTER_CUBIC)


def exif_of(orientation: int) -> Image.Exif:
    """Return metadata that say how to turn an image, 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def image_set(
    folder: Path,
    pixels: Sequence[np.ndarray],
    boxes: Sequence[Sequence[Sequence[float]]] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
) -> AnnotationSet:
    """Write <number>.png for each image; by default image i has one object of class i that covers it."""
    paths = [str(folder / f"{number}.png") for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        cv2.imwrite(path, image[..., ::-1])
    boxes = boxes or [[[0, 0, image.shape[1], image.shape[0]]] for image in pixels]
    labels = labels or [[number] for number in range(len(pixels))]
    sizes = np.array([image.shape[:2] for image in pixels], dtype=np.int32)
    return hand_written(labels, boxes, image_paths=np.array(paths), sizes=sizes)
