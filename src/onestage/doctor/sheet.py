"""A sheet of sampled images with their boxes, each before and after augmentation."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from onestage.data.images import read_image
from onestage.data.resize import Stretch
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError, ImageError, require
from onestage.evaluation.drawing import draw_boxes
from onestage.files import atomic_write, printable
from onestage.types import AnnotationSet

PANEL_SIDE = 300  # px of each picture
MARGIN = 8  # px around a pair
MAX_PAIRS = 400  # 100 megapixels
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def require_sheet(path: Path, num_images: int) -> None:
    """Check the arguments before any work; raise ConfigError."""
    require(1 <= num_images <= MAX_PAIRS, "num_drawn", num_images, f"in [1, {MAX_PAIRS}]")
    require(path.suffix.lower() in FORMATS, "draw", str(path), f"a file that ends in {', '.join(FORMATS)}")
    if path.exists():
        raise ConfigError(f"draw: {printable(path)} already exists; nothing is overwritten. Give a new name.")


def write_sheet(path: Path, annotations: AnnotationSet, num_images: int, image_size: int, seed: int = 0) -> int:
    """Draw images of a split, chosen by `seed`, first those with objects; return their number.

    Args:
        path: a .jpg or .png file.
        annotations: the split.
        num_images: limit.
        image_size: side of the network input, px.
        seed: of the choice and of SSD's augmentation.
    """
    pairs = list(_pairs(annotations, num_images, image_size, seed))
    num_columns = max(1, round(math.sqrt(len(pairs) / 2)))  # a pair is twice as wide as high
    width, height = 2 * PANEL_SIDE + MARGIN, PANEL_SIDE + MARGIN
    sheet = Image.new("RGB", (num_columns * width, max(1, math.ceil(len(pairs) / num_columns)) * height), "white")
    for number, panels in enumerate(pairs):
        row, column = divmod(number, num_columns)
        for position, panel in enumerate(panels):
            sheet.paste(panel, (column * width + position * PANEL_SIDE, row * height))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format=FORMATS[path.suffix.lower()])
    return len(pairs)


def _pairs(annotations: AnnotationSet, num_images: int, image_size: int, seed: int) -> Iterator[list[Image.Image]]:
    """Yield an image with its boxes before and after augmentation; skip images that cannot be decoded."""
    stretch = Stretch(image_size)
    pipelines = [SeededTransform([], stretch), SeededTransform(ssd_transforms(stretch), stretch)]
    order = np.random.default_rng(seed).permutation(len(annotations))
    is_empty = np.diff(annotations.box_offsets)[order] == 0
    num_drawn = 0
    for index in np.concatenate([order[~is_empty], order[is_empty]]).tolist():
        if num_drawn == num_images:
            return
        height, width = annotations.sizes[index].tolist()
        try:
            image = read_image(str(annotations.image_paths[index]), (height, width))
        except ImageError:
            continue
        objects = annotations.objects(index)
        panels = []
        for pipeline in pipelines:
            result = pipeline(image, annotations.boxes[objects], (seed, 0, index))
            labels = annotations.labels[objects][result.rows]
            drawn = draw_boxes(result.image, result.boxes, labels, None, annotations.class_names)
            panels.append(Image.fromarray(drawn).resize((PANEL_SIDE, PANEL_SIDE), Image.Resampling.BILINEAR))
        num_drawn += 1
        yield panels
