"""Drawing of objects and detections on images."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onestage.files import atomic_write
from onestage.types import PADDING, Detections

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

MIN_SHORT_SIDE = 300  # a label takes about 80 x 12 px; on a smaller image it would hide the objects
MAX_LONG_SIDE = 2000  # limit of enlarging: a strip of 10 x 5,000 px is not enlarged
JPEG_QUALITY = 90
BATCH_FILE = "train_batch.jpg"  # of a run
NUM_BEST = 10  # detections of an image that are drawn while no threshold is known


def draw_boxes(
    image: npt.NDArray[np.uint8],
    gt_boxes: npt.NDArray[np.float32],
    gt_labels: npt.NDArray[np.int64],
    detections: Detections | None,
    class_names: Sequence[str],
    *,
    score_threshold: float | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw objects as dashed white boxes and detections as solid boxes in the colour of their class.

    Args:
        image: [H, W, 3] RGB. Enlarged by a whole factor if the short side is under 300 px, and so is the result.
        gt_boxes: [M, 4] xyxy in pixels of the image.
        gt_labels: [M] 0..K-1.
        detections: of this image: boxes [D, 4] in its pixels, scores [D], labels [D]; None: only objects are drawn.
        class_names: [K].
        score_threshold: detections below it are not drawn, in [0, 1]; None: the NUM_BEST best are.
    """
    height, width = image.shape[:2]
    factor = max(1, min(math.ceil(MIN_SHORT_SIDE / min(height, width)), MAX_LONG_SIDE // max(height, width)))
    picture = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    pen = _Pen(picture, factor)
    for box, label in zip(gt_boxes.tolist(), gt_labels.tolist(), strict=True):
        pen.draw(box, class_names[label], None)
    number = NUM_BEST if score_threshold is None else None
    rows = zip(*(column[:number].flip(0).tolist() for column in detections), strict=True) if detections else ()
    for box, score, label in rows:  # the best last, so that it is on top
        if label != PADDING and score >= (score_threshold or 0.0):
            pen.draw(box, f"{class_names[label]} {score:.2f}", class_colour(label))
    return np.asarray(picture)


def draw_sheet(
    images: npt.NDArray[np.uint8],
    objects: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]],
    class_names: Sequence[str],
) -> npt.NDArray[np.uint8]:
    """Draw images of one size, [N, H, W, 3] RGB, in a square of rows and columns, each with its (boxes, labels)."""
    drawn = [draw_boxes(image, *own, None, class_names) for image, own in zip(images, objects, strict=True)]
    columns = math.ceil(math.sqrt(len(drawn)))
    drawn += [np.full_like(drawn[0], 255)] * (-len(drawn) % columns)
    return np.vstack([np.hstack(drawn[start : start + columns]) for start in range(0, len(drawn), columns)])


def save_jpeg(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write a [H, W, 3] RGB image as JPEG, atomically."""
    with atomic_write(path) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=JPEG_QUALITY)


def class_colour(label: int) -> Colour:
    """Return the fixed RGB colour of a class, far from the colours of neighbouring classes."""
    hue = (0.02 + label * 0.618034) % 1.0  # steps of the golden ratio stay far from recent hues
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, (1.0, 0.8)[label // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


class _Pen:
    """Draw boxes and their names on a picture that was enlarged by `factor`."""

    def __init__(self, picture: Image.Image, factor: int) -> None:
        self.canvas = ImageDraw.Draw(picture)
        self.width, self.height = picture.size
        self.factor, short_side = factor, min(picture.size)
        self.thickness = max(2, round(short_side / 250))
        font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Pillow's own lacks é, Greek and Cyrillic
        self.font = ImageFont.truetype(font, max(11, round(short_side / 36)))

    def draw(self, box: list[float], text: str, colour: Colour | None) -> None:
        """Draw a solid box with its text above; without a colour dashed white on black, with its text below."""
        if not all(math.isfinite(value) for value in box):
            return
        x1, x2 = sorted(min(max(round(value * self.factor), 0), self.width - 1) for value in box[0::2])
        y1, y2 = sorted(min(max(round(value * self.factor), 0), self.height - 1) for value in box[1::2])
        self.canvas.rectangle((x1, y1, x2, y2), outline=colour or BLACK, width=self.thickness)
        if colour is not None:
            luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # BT.601
            self._write(text, x1, y1, colour, BLACK if luma > 128 else WHITE, above=True)
            return
        dash, edge = 4 * self.thickness, self.thickness - 1
        for x in range(x1, x2 + 1, 2 * dash):
            for y in (y1, max(y2 - edge, y1)):
                self.canvas.rectangle((x, y, min(x + dash, x2), min(y + edge, y2)), fill=WHITE)
        for y in range(y1, y2 + 1, 2 * dash):
            for x in (x1, max(x2 - edge, x1)):
                self.canvas.rectangle((x, y, min(x + edge, x2), min(y + dash, y2)), fill=WHITE)
        self._write(text, x1, y2, BLACK, WHITE, above=False)

    def _write(self, text: str, x: int, y: int, ground: Colour, ink: Colour, *, above: bool) -> None:
        """Write text beside the horizontal edge at y, moved and shortened to stay inside the picture."""
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        while len(text) > 1 and self.canvas.textlength(text, font=self.font) + 4 > self.width:
            text = text[:-2] + "…"
        left, top, right, bottom = self.canvas.textbbox((0, 0), text, font=self.font)
        width, height = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
        x = max(0, min(x, self.width - width))
        y = max(0, min(y - height if above else y + 1, self.height - height))
        self.canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
        self.canvas.text((x + 2 - left, y + 2 - top), text, fill=ink, font=self.font)
