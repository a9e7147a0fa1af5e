"""How a data set gets its images: the file, decoded anew each time. The caches read through this too."""

from typing import NamedTuple, Protocol

import cv2
import numpy as np

from onestage.data.images import RGBImage, read_image
from onestage.types import AnnotationSet


class ReadImage(NamedTuple):
    """An image, perhaps smaller than in its file."""

    pixels: RGBImage  # [H, W, 3]
    original_size: tuple[int, int]  # (height, width) of the decoded file


class ImageReader(Protocol):
    """Gives the images of a split by their row."""

    def read(self, index: int) -> ReadImage:
        """Return image `index`.

        Raises:
            ImageError: its file cannot be decoded whole; the message names it.
        """


class FileReader:
    """Decodes the file anew each time.

    Args:
        annotations: the split.
    """

    def __init__(self, annotations: AnnotationSet) -> None:
        self.annotations = annotations

    def read(self, index: int) -> ReadImage:
        """Decode image `index` in its own size."""
        height, width = self.annotations.sizes[index].tolist()
        pixels = read_image(str(self.annotations.image_paths[index]), (height, width))
        return ReadImage(pixels, (pixels.shape[0], pixels.shape[1]))


def copy_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return (height, width) of the copy of an image of `size`: short side `short_side`, or as it is if not larger."""
    height, width = size
    factor = min(short_side / max(min(height, width), 1), 1.0)
    return round(height * factor), round(width * factor)


def resized(pixels: RGBImage, size: tuple[int, int]) -> RGBImage:
    """Return an image as small as `size`, (height, width)."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def written_bytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
