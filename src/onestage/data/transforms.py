"""Transforms of training images: the adapter of albumentations, scale jitter, mosaic and mixup."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.augmentation import (
    SSDAugmentation,
    SSDMinIoUCrop,
    SSDPhotometricDistort,
    SSDZoomOut,
    Window,
    WindowTransform,
    require_rgb,
)
from onestage.data.images import RGBImage
from onestage.data.resize import MEAN_RGB, Boxes, Canvas, Resize, Stretch, scale_image
from onestage.errors import ConfigError, OnestageError, require

MIN_SIDE = 1.0  # px of the network input; a network cannot find less of an object
MAX_CANVASES = 4.0  # longest canvas sides; a larger image is shrunk first, since zooming out of a photo takes gigabytes
MIN_TRACE = 0.01  # px; albumentations raises on a box that rounding has left without width or height
MIXUP_BETA = 32.0  # both parameters of the weight's beta distribution, as in YOLOv5: nearly always 0.4 to 0.6


def ssd_transforms(resize: Resize) -> list[A.BasicTransform]:
    """Return SSD's training augmentation (arXiv:1512.02325, sections 2.2 and 3.6) before a resize.

    `SSDAugmentation` stretches what it crops; where images keep their aspect ratio its parts are used instead.
    """
    if isinstance(resize, Stretch):
        return [SSDAugmentation(resize.size)]
    return [SSDPhotometricDistort(), SSDZoomOut(), SSDMinIoUCrop(), A.HorizontalFlip(p=0.5)]


class ScaleJitter(WindowTransform):
    """Show the image smaller or larger, in a frame of its own size: multi-scale training for a network of one size.

    The image fills a part of the frame and the rest has the mean colour, or a part of the image fills the frame.
    (Large-scale jitter, arXiv:2012.07177, section 3; YOLOv2's changing input sizes, arXiv:1612.08242, do the same to
    the sizes of objects.)

    Args:
        scale: range of the factor on the image's sides, in [0.25, 4], uniformly distributed.
        p: probability that an image is rescaled.
    """

    def __init__(self, scale: tuple[float, float] = (0.5, 1.5), p: float = 1.0) -> None:
        super().__init__(p=p)
        is_range = len(scale) == 2 and 0.25 <= scale[0] <= scale[1] <= 4
        rule = "[low, high] with 0.25 <= low <= high <= 4"
        require(is_range, "ScaleJitter: scale (data.scale_jitter)", scale, rule)
        self.scale = scale

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the frame, as a window into the image or around it."""
        height, width = size
        scale, right, down = random.random(3).tolist()
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        frame_width, frame_height = max(round(width / scale), 1), max(round(height / scale), 1)
        left, top = int(right * (width - frame_width)), int(down * (height - frame_height))
        return Window(left, top, frame_width, frame_height)


class Picture(NamedTuple):
    """An image with its objects, before or after it is transformed."""

    image: RGBImage  # [H, W, 3]
    boxes: npt.NDArray[np.float32]  # [n, 4] xyxy, px of `image`
    rows: npt.NDArray[np.int64]  # [n] of each box: in the AnnotationSet, or among the boxes that were transformed


class SeededTransform:
    """Albumentations transforms, then a resize; their randomness is a function of a key.

    The same key gives the same result in every process. (albumentations alone repeats its draws in every worker and
    epoch, and gives all transforms of a seeded pipeline the same draws.)

    Args:
        transforms: albumentations transforms for images and boxes, in order; empty in evaluation.
        resize: puts the result on its canvas.
    """

    def __init__(self, transforms: Sequence[A.BasicTransform], resize: Resize) -> None:
        self.resize = resize
        # Alone, SSDAugmentation needs nothing of Compose, whose bookkeeping takes half as long as the augmentation.
        is_ssd = len(transforms) == 1 and isinstance(transforms[0], SSDAugmentation)
        self._ssd = transforms[0] if is_ssd else None
        # Labels would come back as floats, so only row numbers travel; they are small enough to stay exact.
        params = A.BboxParams(format="pascal_voc", label_fields=["rows"], min_width=MIN_TRACE, min_height=MIN_TRACE)
        self._pipeline = A.Compose(list(transforms), bbox_params=params) if transforms and not is_ssd else None

    def __call__(self, image: RGBImage, boxes: Boxes, key: tuple[int, ...], canvas: Canvas | None = None) -> Picture:
        """Transform an image [H, W, 3] uint8 RGB with its boxes [n, 4] xyxy, px, which are clipped to it.

        Raises ConfigError if a transform fails, or gives no uint8 RGB image. key: (seed, epoch, index of the image),
        each >= 0, and a number that separates several uses of one image. canvas: one of the resize; None: that of the
        image's size.
        """
        canvas = canvas or self.resize.canvas_of(image.shape[0], image.shape[1])
        has_transforms = self._ssd is not None or self._pipeline is not None
        max_factor = MAX_CANVASES * self.resize.longest_side / max(image.shape[:2])
        if has_transforms and max_factor < 1:  # SSD's smallest crop of 0.3 keeps its detail
            image, boxes = scale_image(image, boxes, max_factor)
        boxes = boxes.clip(0, (image.shape[1], image.shape[0]) * 2)
        rows = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= MIN_TRACE).all(axis=1))
        boxes = boxes[rows]
        if has_transforms:
            image, boxes, rows = self._augment(Picture(image, boxes, rows), np.random.SeedSequence(key))
        placement = self.resize.place(image.shape[0], image.shape[1], canvas)
        boxes = placement.to_canvas(boxes).clip(0, np.array([canvas[1], canvas[0]] * 2, dtype=np.float32))
        is_kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        return Picture(self.resize.apply(image, canvas), boxes[is_kept], rows[is_kept])

    def _augment(self, picture: Picture, sequence: np.random.SeedSequence) -> Picture:
        image, boxes, rows = picture
        generator = np.random.default_rng(sequence)
        height, width = image.shape[:2]
        try:
            if self._ssd is not None:
                relative = np.column_stack([boxes / ((width, height) * 2), rows])  # as Compose passes them
                view = self._ssd.draw(generator, (height, width), relative[:, :4])
                moved = self._ssd.apply_to_bboxes(relative, view=view, shape=image.shape)
                side = self._ssd.image_size
                return Picture(self._ssd.apply(image, view=view), moved[:, :4] * side, moved[:, 4].astype(np.int64))
            assert self._pipeline is not None
            # One generator for all: seeding each transform by itself would correlate their draws.
            self._pipeline.set_random_state(generator, random.Random(int(sequence.generate_state(1)[0])))
            result: dict[str, Any] = self._pipeline(image=image, bboxes=boxes, rows=rows)
        except OnestageError:
            raise
        except Exception as reason:  # transforms raise exceptions of any kind
            raise ConfigError(
                f"data.train_transforms failed on an image of {width} x {height} pixels with {len(boxes)} objects: "
                f"{type(reason).__name__}: {reason}\nRemove or change the transform that cannot handle it."
            ) from reason
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)  # an empty result is a list
        rows = np.asarray(result["rows"], dtype=np.int64).reshape(-1)
        return Picture(require_rgb("data.train_transforms", result["image"]), boxes, rows)


def mosaic(pictures: Sequence[Picture], side: int, random: np.random.Generator) -> Picture:
    """Put four pictures around a point, for more, smaller and cut objects (arXiv:2004.10934, figure 3).

    The point lies in the middle half of a square of the mean colour. Each picture is scaled, its shape kept, until its
    longer side is half of the square's, put into its quadrant with a corner at the point, and cut at the border. An
    object is kept, and clipped, if its centre is on the square and a pixel of it remains.

    pictures: upper left, upper right, lower left, lower right. side: of the square, px, >= 2. random: draws the point.
    """
    x, y = (round(side * (0.25 + draw / 2)) for draw in random.random(2).tolist())
    canvas = np.full((side, side, 3), MEAN_RGB, dtype=np.uint8)
    parts = []
    for number, picture in enumerate(pictures):
        tile, tile_boxes = scale_image(picture.image, picture.boxes, (side // 2) / max(picture.image.shape[:2]))
        height, width = tile.shape[:2]
        left, top = (x - width if number % 2 == 0 else x), (y - height if number < 2 else y)
        shown = canvas[max(top, 0) : top + height, max(left, 0) : left + width]
        shown[:] = tile[max(-top, 0) : side - top, max(-left, 0) : side - left]
        parts.append(tile_boxes + np.array([left, top] * 2, dtype=np.float32))
    boxes, rows = np.concatenate(parts), np.concatenate([picture.rows for picture in pictures])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = boxes.clip(0, side)
    is_kept = ((centres >= 0) & (centres <= side) & (boxes[:, 2:] - boxes[:, :2] >= 1)).all(axis=1)
    return Picture(canvas, boxes[is_kept].astype(np.float32), rows[is_kept])


def mixup(first: Picture, second: Picture, random: np.random.Generator) -> Picture:
    """Blend two pictures of one size, about half and half; the objects of both count in full (as in YOLOX).

    The blend is arXiv:1902.04103's, section 3.1, which also weights the losses of the two; a target has no weight here.
    """
    weight = float(random.beta(MIXUP_BETA, MIXUP_BETA))
    blend = np.asarray(cv2.addWeighted(first.image, weight, second.image, 1 - weight, 0), dtype=np.uint8)
    return Picture(blend, np.concatenate([first.boxes, second.boxes]), np.concatenate([first.rows, second.rows]))
