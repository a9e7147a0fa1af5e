"""JPEG files with boxes, drawn or taken from a folder, as an AnnotationSet."""

from pathlib import Path

import cv2
import numpy as np

from onestage.data.images import read_image
from onestage.types import AnnotationSet

HEIGHT, WIDTH = 480, 640
MEAN_BOXES = 7.25
NOISE = 16.0  # levels; makes the files as large as COCO's, 170 kB, and so as slow to decode
QUALITY = 90


def write_images(folder: Path, count: int, source: Path | None = None) -> AnnotationSet:
    """Return `count` images with random boxes from 16 px to half of the image; the same on every call.

    Args:
        folder: where to draw them, as smooth colours with noise; it is made.
        count: how many images.
        source: a folder of JPEG files to take instead, all of them if there are fewer.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    paths = sorted(source.glob("*.jpg"))[:count] if source else [_draw(folder, number) for number in range(count)]
    if not paths:
        raise SystemExit(f"{source}: holds no *.jpg")
    sizes = [read_image(path).shape[:2] for path in paths]
    boxes = [_boxes(random, size) for size in sizes]
    total = sum(map(len, boxes))
    return AnnotationSet(
        source=str(source or folder),
        image_paths=np.array([str(path) for path in paths]),
        image_ids=np.arange(len(paths)),
        sizes=np.array(sizes, dtype=np.int32),
        box_offsets=np.cumsum([0, *map(len, boxes)]),
        boxes=np.concatenate(boxes),
        labels=random.integers(0, 80, total),
        areas=np.ones(total, dtype=np.float32),
        is_crowd=np.zeros(total, dtype=bool),
        is_difficult=np.zeros(total, dtype=bool),
        class_names=tuple(f"class {number}" for number in range(80)),
        category_ids=tuple(range(1, 81)),
    )


def read_samples(annotations: AnnotationSet) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return all images [H, W, 3] with their boxes [n, 4], decoded."""
    return [
        (read_image(path), annotations.boxes[annotations.objects(index)])
        for index, path in enumerate(annotations.image_paths.tolist())
    ]


def _draw(folder: Path, number: int) -> Path:
    random = np.random.default_rng(number)
    coarse = random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
    smooth = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image = np.clip(smooth + random.normal(0, NOISE, smooth.shape), 0, 255).astype(np.uint8)
    path = folder / f"{number:04}.jpg"
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return path


def _boxes(random: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    height, width = size[:2]
    longest = max(min(height, width) / 2, 17)
    sides = random.uniform(16, longest, (1 + random.poisson(MEAN_BOXES - 1), 2)).clip(max=(width, height))
    corners = random.uniform(0, 1, sides.shape) * ((width, height) - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
