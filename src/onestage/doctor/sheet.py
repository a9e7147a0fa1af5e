"""A sheet of sampled images with their boxes: each as it is, and beside it as a training sees it."""

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onestage.data.images import read_image
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError, ImageError
from onestage.files import write_new_file
from onestage.types import AnnotationSet

PANEL_SIDE = 300  # px of each of the two pictures
MARGIN = 8  # px around a pair
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
LETTER_HEIGHT = 14  # px, with a margin
MAX_PAIRS = 400  # 100 megapixels
GOLDEN_RATIO = 0.618034  # steps of it around the colour wheel never come close to an earlier hue soon
GROUND = (255, 255, 255)


def require_sheet_name(path: Path, num_images: int) -> None:
    """Check what was asked for before anything is read.

    Raises:
        ConfigError: the number or the suffix cannot be.
    """
    if not 1 <= num_images <= MAX_PAIRS:
        raise ConfigError(f"--draw is {num_images}; it must be 1..{MAX_PAIRS} images.\nTry: --draw 16 sheet.jpg")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--draw writes {path.name!r}; it must end in {', '.join(FORMATS)}.\nTry: --draw 16 sheet.jpg"
        )


def write_sheet(path: Path, annotations: AnnotationSet, num_images: int, image_size: int, seed: int = 0) -> int:
    """Draw images of a split, chosen by `seed`, those with objects first; return how many.

    Args:
        path: a new .jpg or .png file.
        annotations: the split.
        num_images: at most so many.
        image_size: side of the network input, px.
        seed: of the choice and of the augmentation, which is SSD's.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    pairs = list(_pairs(annotations, num_images, image_size, seed))
    num_columns = max(1, round(math.sqrt(len(pairs) / 2)))  # a pair is twice as wide as high
    width, height = 2 * PANEL_SIDE + MARGIN, PANEL_SIDE + MARGIN
    sheet = Image.new("RGB", (num_columns * width, max(1, math.ceil(len(pairs) / num_columns)) * height), GROUND)
    for number, (left, right) in enumerate(pairs):
        row, column = divmod(number, num_columns)
        sheet.paste(left, (column * width, row * height))
        sheet.paste(right, (column * width + PANEL_SIDE, row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, format=FORMATS[path.suffix.lower()])
    write_new_file(path, buffer.getvalue())
    return len(pairs)


def _pairs(
    annotations: AnnotationSet, num_images: int, image_size: int, seed: int
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Yield an image before and after augmentation, both with boxes; one that cannot be decoded is passed over."""
    transform = SeededTransform(ssd_transforms(image_size), image_size)
    whole = SeededTransform([], image_size)
    num_drawn = 0
    for index in _chosen(annotations, seed):
        if num_drawn == num_images:
            return
        height, width = annotations.sizes[index].tolist()
        try:
            image = read_image(str(annotations.image_paths[index]), (height, width))
        except ImageError:
            continue
        objects = annotations.objects(index)
        panels = []
        for pipeline in (whole, transform):
            result = pipeline(image, annotations.boxes[objects], (seed, 0, index))
            labels = annotations.labels[objects][result.rows]
            panels.append(_panel(result.image, result.boxes, labels, annotations.class_names))
        num_drawn += 1
        yield panels[0], panels[1]


def _chosen(annotations: AnnotationSet, seed: int) -> list[int]:
    """Return the images in the order in which they are drawn."""
    order = np.random.default_rng(seed).permutation(len(annotations))
    is_empty = np.diff(annotations.box_offsets)[order] == 0
    return [int(index) for index in np.concatenate([order[~is_empty], order[is_empty]])]


def _panel(
    image: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> Image.Image:
    """Draw boxes [n, 4] xyxy of a square image, named by their class."""
    picture = Image.fromarray(image).resize((PANEL_SIDE, PANEL_SIDE), Image.Resampling.BILINEAR)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        x1, y1, x2, y2 = (round(value * (PANEL_SIDE - 1) / len(image)) for value in box)
        colour = f"hsv({round(360 * label * GOLDEN_RATIO) % 360}, 90%, 95%)"
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
        name = "".join(letter for letter in class_names[label] if letter.isprintable())[:24]
        corner = (x1 + 2, y1 - LETTER_HEIGHT if y1 >= LETTER_HEIGHT else y1 + 2)  # beside small objects, not on them
        left, top, right, bottom = draw.textbbox(corner, name, font=font)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
        draw.text(corner, name, fill="black", font=font)
    draw.rectangle((0, 0, PANEL_SIDE - 1, PANEL_SIDE - 1), outline="gray")
    return picture
