"""A sheet of sampled images with their boxes, each before and after augmentation."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from onestage.data.images import RGBImage, read_image
from onestage.data.resize import Stretch
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError, ImageError, require
from onestage.evaluation.drawing import draw_boxes
from onestage.files import atomic_write, printable
from onestage.types import AnnotationSet

PANEL_SIDE = 300  # px of each picture
MARGIN = 8  # px around a pair
MAX_PAIRS = 400  # 100 megapixels
SEED = 0  # of the choice of images and of their augmentation
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def require_sheet(path: Path, num_images: int) -> None:
    """Check the arguments before any work; raise ConfigError."""
    require(1 <= num_images <= MAX_PAIRS, "num_drawn", num_images, f"in [1, {MAX_PAIRS}]")
    require(path.suffix.lower() in FORMATS, "draw", str(path), f"a file that ends in {', '.join(FORMATS)}")
    if path.exists():
        raise ConfigError(f"draw: {printable(path)} already exists; nothing is overwritten. Give a new name.")


def write_sheet(path: Path, annotations: AnnotationSet, num_images: int, image_size: int) -> int:
    """Draw random images of a split, first those with objects; return their number.

    path: a .jpg or .png file. num_images: limit. image_size: side of the network input, px.
    """
    pairs = list(islice(_pairs(annotations, image_size), num_images))
    num_columns = max(1, round(math.sqrt(len(pairs) / 2)))  # a pair is twice as wide as high
    blank = np.full((PANEL_SIDE + MARGIN, 2 * PANEL_SIDE + MARGIN, 3), 255, dtype=np.uint8)
    tiles = [*pairs, *[blank] * (-len(pairs) % num_columns)] or [blank]
    rows = [np.hstack(tiles[start : start + num_columns]) for start in range(0, len(tiles), num_columns)]
    with atomic_write(path) as temporary:
        Image.fromarray(np.vstack(rows)).save(temporary, format=FORMATS[path.suffix.lower()])
    return len(pairs)


def _pairs(annotations: AnnotationSet, image_size: int) -> Iterator[RGBImage]:
    """Yield each image with its boxes before and after augmentation; skip images that cannot be decoded."""
    stretch = Stretch(image_size)
    pipelines = [SeededTransform([], stretch), SeededTransform(ssd_transforms(stretch), stretch)]
    order = np.random.default_rng(SEED).permutation(len(annotations))
    is_empty = np.diff(annotations.box_offsets)[order] == 0
    for index in np.concatenate([order[~is_empty], order[is_empty]]).tolist():
        height, width = annotations.sizes[index].tolist()
        try:
            image = read_image(str(annotations.image_paths[index]), (height, width))
        except ImageError:
            continue
        objects = annotations.objects(index)
        panels = []
        for pipeline in pipelines:
            result = pipeline(image, annotations.boxes[objects], (SEED, 0, index))
            labels = annotations.labels[objects][result.rows]
            drawn = draw_boxes(result.image, result.boxes, labels, None, annotations.class_names)
            panel = Image.fromarray(drawn).resize((PANEL_SIDE, PANEL_SIDE), Image.Resampling.BILINEAR)
            panels.append(np.asarray(panel))
        yield np.pad(np.hstack(panels), ((0, MARGIN), (0, MARGIN), (0, 0)), constant_values=255)
