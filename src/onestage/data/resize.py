"""Resizing of images to the network's canvas, and the placement that undoes it."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.images import RGBImage
from onestage.errors import require

MEAN_RGB = (123, 117, 104)  # ImageNet's mean, as SSD's Caffe code fills with it: about zero once normalised
MAX_SHRINK = 4.0  # beyond this factor pixels are averaged first, because bilinear sampling would skip them

Boxes = npt.NDArray[np.floating[Any]]
Canvas = tuple[int, int]  # (height, width), px


class Placement(NamedTuple):
    """Where an image lies on a canvas: canvas px = image px * scale + offset."""

    scale_x: float
    scale_y: float
    left: float = 0.0  # px
    top: float = 0.0  # px

    def to_canvas(self, boxes: Boxes) -> npt.NDArray[np.float32]:
        """Move boxes [n, 4] xyxy from image pixels to canvas pixels."""
        scales, offsets = np.array([self[:2] * 2, self[2:] * 2])
        return np.asarray(boxes * scales + offsets, dtype=np.float32)


class Resize(ABC):
    """Fits images of any size to one of a few canvases."""

    canvases: tuple[Canvas, ...]  # (height, width), px
    fill: tuple[int, int, int] = MEAN_RGB  # RGB colour of what the image leaves free

    @property
    def longest_side(self) -> int:
        """The longest side of all canvases, px."""
        return max(map(max, self.canvases))

    def canvas_of(self, height: int, width: int) -> Canvas:
        """Return the canvas of images of this size, px, >= 1."""
        return self.canvases[0]

    @abstractmethod
    def place(self, height: int, width: int, canvas: Canvas) -> Placement:
        """Return where an image of this size, px, lies on a canvas; augmentation may have changed the size."""

    def apply(self, image: RGBImage, canvas: Canvas) -> RGBImage:
        """Return the canvas [canvas height, canvas width, 3] with an image [H, W, 3] on it."""
        placement = self.place(image.shape[0], image.shape[1], canvas)
        height, width = round(image.shape[0] * placement.scale_y), round(image.shape[1] * placement.scale_x)
        if (height, width) == canvas:
            return resample(image, height, width)
        left, top = int(placement.left), int(placement.top)
        filled = np.full((*canvas, 3), self.fill, dtype=np.uint8)
        filled[top : top + height, left : left + width] = resample(image, height, width)
        return filled


class Stretch(Resize):
    """Stretch every image to a square, as SSD does.

    Args:
        size: side of the square, px, >= 1.
    """

    def __init__(self, size: int) -> None:
        require(size >= 1, "Stretch: size", size, ">= 1")
        self.size = size
        self.canvases = ((size, size),)

    def place(self, height: int, width: int, canvas: Canvas) -> Placement:
        """Return the scales of the two axes; the offsets are 0."""
        return Placement(self.size / width, self.size / height)


class Letterbox(Resize):
    """Scale every image to fit into the middle of a square, keep its aspect ratio, and fill the rest.

    Args:
        size: side of the square, px, >= 1.
        fill: RGB colour of the rest, each in [0, 255].
    """

    def __init__(self, size: int, fill: tuple[int, int, int] = MEAN_RGB) -> None:
        require(size >= 1, "Letterbox: size", size, ">= 1")
        require_colour("Letterbox: fill", fill)
        self.size = size
        self.fill = fill
        self.canvases = ((size, size),)

    def place(self, height: int, width: int, canvas: Canvas) -> Placement:
        """Return scales and offsets; the sides are rounded to whole pixels, so the two scales differ a little."""
        new_height, new_width = scaled_size((height, width), self.size / max(height, width))
        left, top = (self.size - new_width) // 2, (self.size - new_height) // 2
        return Placement(new_width / width, new_height / height, left, top)


class ShortestEdge(Resize):
    """Scale the shorter side of every image to one length unless the longer becomes too long; fill a canvas.

    The resize of Faster R-CNN (arXiv:1506.01497) and RetinaNet, on few canvases, so that shapes repeat. An image lies
    at the upper left of the smallest canvas on which it is largest. A batch holds images of one canvas.

    Args:
        shortest: length of the shorter side, px, >= 1.
        longest: limit of the longer side, px, >= `shortest`.
        canvases: (height, width) of each, px; null: a wide and a tall one, `shortest` and `longest` rounded up to
            multiples of 32.
        fill: RGB colour of the rest, each in [0, 255].
    """

    def __init__(
        self,
        shortest: int = 800,
        longest: int = 1333,
        canvases: list[tuple[int, int]] | None = None,
        fill: tuple[int, int, int] = MEAN_RGB,
    ) -> None:
        require(1 <= shortest <= longest, "ShortestEdge: shortest", shortest, f"in [1, longest], longest is {longest}")
        require_colour("ShortestEdge: fill", fill)
        low, high = (-(-length // 32) * 32 for length in (shortest, longest))
        canvases = [(low, high), (high, low)] if canvases is None else canvases
        is_valid = len(canvases) > 0 and all(side >= 1 for canvas in canvases for side in canvas)
        require(is_valid, "ShortestEdge: canvases", canvases, "at least one (height, width), each >= 1")
        self.shortest, self.longest, self.fill = shortest, longest, fill
        self.canvases = tuple(sorted(dict.fromkeys((height, width) for height, width in canvases), key=math.prod))

    def canvas_of(self, height: int, width: int) -> Canvas:
        """Return the smallest canvas on which an image of this size, px, >= 1, is largest."""
        return max(self.canvases, key=lambda canvas: self._scale(height, width, canvas))  # the first of equal ones

    def place(self, height: int, width: int, canvas: Canvas) -> Placement:
        """Return the scales; the sides are rounded to whole pixels, so the two differ a little. The offsets are 0."""
        new_height, new_width = scaled_size((height, width), self._scale(height, width, canvas))
        return Placement(new_width / width, new_height / height)

    def _scale(self, height: int, width: int, canvas: Canvas) -> float:
        limit = min(self.shortest / min(height, width), self.longest / max(height, width))
        return min(limit, canvas[0] / height, canvas[1] / width)


def require_colour(name: str, colour: tuple[int, int, int]) -> None:
    """Raise ConfigError unless `colour` is an RGB colour."""
    is_colour = len(colour) == 3 and all(0 <= value <= 255 for value in colour)
    require(is_colour, name, colour, "[red, green, blue], each in [0, 255]")


def scaled_size(size: tuple[int, ...], factor: float) -> tuple[int, int]:
    """Return a (height, width), px, times a factor: whole pixels, at least one."""
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def scale_image(image: RGBImage, boxes: Boxes, factor: float) -> tuple[RGBImage, Boxes]:
    """Scale an image [H, W, 3], averaging pixels if it shrinks, and boxes [n, 4] in its pixels."""
    height, width = scaled_size(image.shape, factor)
    scales = np.array([width / image.shape[1], height / image.shape[0]] * 2, dtype=np.float32)
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), dtype=np.uint8), boxes * scales


def resample(image: RGBImage, height: int, width: int) -> RGBImage:
    """Resize an image [H, W, 3]: bilinear, after averaging down to four times the size if it is larger."""
    factor = max(image.shape[0] / height, image.shape[1] / width)
    if factor > MAX_SHRINK:
        middle = (min(round(width * MAX_SHRINK), image.shape[1]), min(round(height * MAX_SHRINK), image.shape[0]))
        image = np.asarray(cv2.resize(image, middle, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
