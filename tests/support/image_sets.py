"""Small data sets of image files, made by hand."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from onestage.types import AnnotationSet


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random RGB pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random colours that change slowly, as in a photograph."""
    return cv2.resize(noise(5, 6, seed), (width, height), interpolation=cv2.INTER_CUBIC)


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
    flat = np.array([label for image in labels for label in image], dtype=np.int64)
    num_classes = int(flat.max(initial=0)) + 1
    return AnnotationSet(
        source="hand-written",
        image_paths=np.array(paths),
        image_ids=np.arange(1, len(pixels) + 1),
        sizes=np.array([image.shape[:2] for image in pixels], dtype=np.int32),
        box_offsets=np.concatenate([[0], np.cumsum([len(image) for image in boxes])]).astype(np.int64),
        boxes=np.array([box for image in boxes for box in image], dtype=np.float32).reshape(-1, 4),
        labels=flat,
        areas=np.ones(len(flat), dtype=np.float32),
        is_crowd=np.zeros(len(flat), dtype=bool),
        is_difficult=np.zeros(len(flat), dtype=bool),
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        category_ids=tuple(range(1, num_classes + 1)),
    )
