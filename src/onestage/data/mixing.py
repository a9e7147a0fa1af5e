"""Mosaic and mixup: training images made of several."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.resize import MEAN_RGB

NUM_TILES = 4
MIXUP_BETA = 32.0  # both parameters of the weight's beta distribution, as in YOLOv5: nearly always 0.4 to 0.6


class Picture(NamedTuple):
    """An image with its objects, before or after it is transformed."""

    pixels: npt.NDArray[np.uint8]  # [H, W, 3] RGB
    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy, px of `pixels`
    objects: npt.NDArray[np.int64]  # [n] rows of the AnnotationSet


def mosaic(pictures: Sequence[Picture], side: int, random: np.random.Generator) -> Picture:
    """Put four pictures around a point, for more, smaller and cut objects (arXiv:2004.10934, figure 3).

    The point lies in the middle half of a square of the mean colour. Each picture is scaled, its shape kept, until its
    longer side is half of the square's, put into its quadrant with a corner at the point, and cut at the border. An
    object is kept, and clipped, if its centre is on the square and a pixel of it remains.

    Args:
        pictures: four: upper left, upper right, lower left, lower right.
        side: of the square, px, >= 2.
        random: draws the point.
    """
    assert len(pictures) == NUM_TILES
    x, y = (round(side * (0.25 + draw / 2)) for draw in random.random(2).tolist())
    canvas = np.full((side, side, 3), MEAN_RGB, dtype=np.uint8)
    boxes, objects = [], []
    for number, picture in enumerate(pictures):
        tile = _scaled(picture, side // 2)
        height, width = tile.pixels.shape[:2]
        left, top = (x - width if number % 2 == 0 else x), (y - height if number < 2 else y)
        shown = tile.pixels[max(-top, 0) : side - top, max(-left, 0) : side - left]
        first_row, first_column = max(top, 0), max(left, 0)
        canvas[first_row : first_row + shown.shape[0], first_column : first_column + shown.shape[1]] = shown
        boxes.append(tile.boxes + np.array([left, top] * 2, dtype=np.float32))
        objects.append(tile.objects)
    return _clipped(Picture(canvas, np.concatenate(boxes), np.concatenate(objects)))


def mixup(first: Picture, second: Picture, random: np.random.Generator) -> Picture:
    """Blend two pictures of one size, about half and half; the objects of both count in full (as in YOLOX).

    The blend is arXiv:1902.04103's, section 3.1, which also weights the losses of the two; a target has no weight here.
    """
    weight = float(random.beta(MIXUP_BETA, MIXUP_BETA))
    return Picture(
        pixels=np.asarray(cv2.addWeighted(first.pixels, weight, second.pixels, 1 - weight, 0), dtype=np.uint8),
        boxes=np.concatenate([first.boxes, second.boxes]),
        objects=np.concatenate([first.objects, second.objects]),
    )


def _scaled(picture: Picture, longer_side: int) -> Picture:
    height, width = picture.pixels.shape[:2]
    factor = longer_side / max(height, width)
    new_width, new_height = max(round(width * factor), 1), max(round(height * factor), 1)
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(picture.pixels, (new_width, new_height), interpolation=interpolation)
    return Picture(
        pixels=np.asarray(pixels, dtype=np.uint8),
        boxes=picture.boxes * np.array([new_width / width, new_height / height] * 2, dtype=np.float32),
        objects=picture.objects,
    )


def _clipped(picture: Picture) -> Picture:
    height, width = picture.pixels.shape[:2]
    centres = (picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2
    boxes = picture.boxes.clip(0, (width, height) * 2)
    is_inside = ((centres >= 0) & (centres <= (width, height))).all(axis=1)
    is_kept = is_inside & (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    return Picture(picture.pixels, boxes[is_kept].astype(np.float32), picture.objects[is_kept])
