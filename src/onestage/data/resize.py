"""Resizing of images to the network's canvas, and the placement that undoes it."""

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

    canvases: tuple[tuple[int, int], ...]  # (height, width), px

    @property
    def longest_side(self) -> int:
        """The longest side of all canvases, px."""
        return max(map(max, self.canvases))

    @abstractmethod
    def place(self, height: int, width: int) -> Placement:
        """Return where an image of this size, px, lies on its canvas."""

    @abstractmethod
    def apply(self, image: RGBImage) -> RGBImage:
        """Return the canvas [canvas height, canvas width, 3] with an image [H, W, 3] on it."""


class Stretch(Resize):
    """Stretch every image to a square, as SSD does.

    Args:
        size: side of the square, px, >= 1.
    """

    def __init__(self, size: int) -> None:
        require(size >= 1, "Stretch: size", size, ">= 1")
        self.size = size
        self.canvases = ((size, size),)

    def place(self, height: int, width: int) -> Placement:
        """Return the scales of the two axes; the offsets are 0."""
        return Placement(self.size / width, self.size / height)

    def apply(self, image: RGBImage) -> RGBImage:
        """Return the stretched image [size, size, 3]."""
        return resample(image, self.size, self.size)


class Letterbox(Resize):
    """Scale every image to fit into a square, keep its aspect ratio, and fill the rest.

    Args:
        size: side of the square, px, >= 1.
        fill: RGB colour of the rest, each in [0, 255].
        centred: whether the image lies in the middle; if not, at the upper left.
    """

    def __init__(self, size: int, fill: tuple[int, int, int] = MEAN_RGB, centred: bool = True) -> None:
        require(size >= 1, "Letterbox: size", size, ">= 1")
        require_colour("Letterbox: fill", fill)
        self.size = size
        self.fill = fill
        self.centred = centred
        self.canvases = ((size, size),)

    def place(self, height: int, width: int) -> Placement:
        """Return scales and offsets; the sides are rounded to whole pixels, so the two scales differ a little."""
        new_height, new_width = self._content(height, width)
        left, top = ((self.size - new_width) // 2, (self.size - new_height) // 2) if self.centred else (0, 0)
        return Placement(new_width / width, new_height / height, left, top)

    def apply(self, image: RGBImage) -> RGBImage:
        """Return the square [size, size, 3] with the scaled image on it."""
        height, width = self._content(*image.shape[:2])
        left, top = map(int, self.place(*image.shape[:2])[2:])
        canvas = np.full((self.size, self.size, 3), self.fill, dtype=np.uint8)
        canvas[top : top + height, left : left + width] = resample(image, height, width)
        return canvas

    def _content(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the scaled image, px."""
        return scaled_size((height, width), self.size / max(height, width))


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
