"""Pictures of what was there and what was found."""

import colorsys
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from onestage.evaluation.results import write_file
from onestage.types import PADDING, Detections

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the picture

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

# A label takes about 80 x 12 px. On a shorter side than this it would hide the objects.
MIN_SHORT_SIDE = 300
MAX_LONG_SIDE = 2000  # what enlarging may lead to: a strip of 10 x 5,000 px stays as it is
JPEG_QUALITY = 90


def draw_boxes(
    image: npt.NDArray[np.uint8],
    gt_boxes: npt.NDArray[np.float32],
    gt_labels: npt.NDArray[np.int64],
    detections: Detections,
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.5,
) -> npt.NDArray[np.uint8]:
    """Draw objects as dashed white boxes and detections as solid boxes in the colour of their class.

    A detection is named with its score at its top left corner, an object at its bottom left corner.

    Args:
        image: [H, W, 3] RGB. Enlarged by a whole factor where the short side is under 300 px.
        gt_boxes: [M, 4] xyxy in pixels of the image.
        gt_labels: [M] 0..K-1.
        detections: of this one image: boxes [D, 4] in pixels of the image, scores [D], labels [D].
        class_names: [K].
        score_threshold: detections below it are left out, 0..1.

    Returns:
        [H * factor, W * factor, 3] RGB.

    Raises:
        ValueError: if the image is not [H, W, 3] uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be [H, W, 3] uint8, not {list(image.shape)} {image.dtype}")
    factor = _enlargement(image.shape[0], image.shape[1])
    height, width = image.shape[0] * factor, image.shape[1] * factor
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    pen = _Pen(picture)
    for box, label in zip(gt_boxes.tolist(), gt_labels.tolist(), strict=True):
        pen.draw_object(box, factor, class_names[label])
    rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    for box, score, label in reversed(list(rows)):  # the best last, so that it lies on top
        if label != PADDING and score >= score_threshold:
            pen.draw_detection(box, factor, f"{class_names[label]} {score:.2f}", class_colour(label))
    return np.asarray(picture)


def save_jpeg(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write a [H, W, 3] RGB image as JPEG, whole or not at all.

    Raises:
        ResourceError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    write_file(path, buffer.getvalue())


def class_colour(label: int) -> Colour:
    """Return the RGB colour of a class: always the same, and far from those of its neighbours."""
    hue = (0.02 + label * 0.618034) % 1.0  # steps of the golden ratio never come close to an earlier hue soon
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, (1.0, 0.8)[label // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


class _Pen:
    """Draws on one picture, in lines and letters that suit its size."""

    def __init__(self, picture: Image.Image) -> None:
        self.width, self.height = picture.size
        self.draw = ImageDraw.Draw(picture)
        short_side = min(picture.size)
        self.thickness = max(2, round(short_side / 250))
        self.font = ImageFont.load_default(size=max(11, round(short_side / 36)))

    def draw_object(self, box: list[float], factor: int, name: str) -> None:
        """Draw a dashed white box on a dark line, so that it shows on any ground, named at the bottom."""
        corners = self._inside(box, factor)
        if corners is None:
            return
        x1, y1, x2, y2 = corners
        self.draw.rectangle(corners, outline=BLACK, width=self.thickness)
        dash = 4 * self.thickness
        edge = self.thickness - 1
        for start in range(x1, x2 + 1, 2 * dash):
            end = min(start + dash, x2)
            self.draw.rectangle((start, y1, end, min(y1 + edge, y2)), fill=WHITE)
            self.draw.rectangle((start, max(y2 - edge, y1), end, y2), fill=WHITE)
        for start in range(y1, y2 + 1, 2 * dash):
            end = min(start + dash, y2)
            self.draw.rectangle((x1, start, min(x1 + edge, x2), end), fill=WHITE)
            self.draw.rectangle((max(x2 - edge, x1), start, x2, end), fill=WHITE)
        self._write(name, x1, y2, BLACK, WHITE, above=False)

    def draw_detection(self, box: list[float], factor: int, text: str, colour: Colour) -> None:
        """Draw a solid box, named at the top."""
        corners = self._inside(box, factor)
        if corners is None:
            return
        self.draw.rectangle(corners, outline=colour, width=self.thickness)
        # Luma (BT.601): which of black and white can be read on this colour.
        luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        self._write(text, corners[0], corners[1], colour, BLACK if luma > 128 else WHITE, above=True)

    def _inside(self, box: list[float], factor: int) -> Box | None:
        """Return the corners in whole pixels inside the picture; None for what is no box."""
        if not all(math.isfinite(value) for value in box):
            return None
        x1, x2 = sorted(min(max(round(value * factor), 0), self.width - 1) for value in (box[0], box[2]))
        y1, y2 = sorted(min(max(round(value * factor), 0), self.height - 1) for value in (box[1], box[3]))
        return x1, y1, x2, y2

    def _write(self, text: str, x: int, y: int, ground: Colour, ink: Colour, *, above: bool) -> None:
        """Write text beside the horizontal edge at y, moved and shortened so that it stays inside the picture."""
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        while len(text) > 1 and self.draw.textlength(text, font=self.font) + 4 > self.width:
            text = text[:-2] + "…"
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        width, height = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
        x = max(0, min(x, self.width - width))
        y = y - height if above else y + 1
        y = max(0, min(y, self.height - height))
        self.draw.rectangle((x, y, x + width - 1, y + height - 1), fill=ground)
        self.draw.text((x + 2 - left, y + 2 - top), text, fill=ink, font=self.font)


def _enlargement(height: int, width: int) -> int:
    wanted = math.ceil(MIN_SHORT_SIDE / min(height, width))
    allowed = MAX_LONG_SIDE // max(height, width)
    return max(1, min(wanted, allowed))
