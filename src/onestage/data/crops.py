"""SSD's zoom-out and min-IoU crop, which albumentations does not have, as albumentations transforms."""

import math
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.errors import ConfigError

Image = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.floating[Any]]

IMAGENET_MEAN_RGB = (123, 117, 104)  # what the Caffe code fills with; the detector maps it to about zero


class Window(NamedTuple):
    """A rectangle in pixels of the image; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int


class SSDZoomOut(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """Put the image somewhere on a larger canvas of the mean colour, so that objects get small (SSD section 3.6).

    Args:
        max_ratio: the canvas is 1 to `max_ratio` times as wide and as high as the image (16 times the area at 4).
        fill: RGB colour of the canvas, each 0..255.
        p: probability that an image is zoomed out.
    """

    def __init__(self, max_ratio: float = 4.0, fill: tuple[int, int, int] = IMAGENET_MEAN_RGB, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 1 <= max_ratio < math.inf:
            raise ConfigError(f"SSDZoomOut: max_ratio is {max_ratio:g}; it must be at least 1 (1 keeps the image).")
        if len(fill) != 3 or not all(0 <= value <= 255 for value in fill):
            raise ConfigError(f"SSDZoomOut: fill is {fill}; it must be [red, green, blue], each 0..255.")
        self.max_ratio = max_ratio
        self.fill = fill

    def draw(self, random: np.random.Generator, size: tuple[int, int]) -> Window:
        """Draw the canvas of an image of `size` (height, width), as a window around it."""
        height, width = size
        ratio, right, down = random.random(3).tolist()
        ratio = 1 + ratio * (self.max_ratio - 1)
        canvas_width, canvas_height = int(width * ratio), int(height * ratio)
        left, top = int(right * (canvas_width - width)), int(down * (canvas_height - height))
        return Window(-left, -top, canvas_width, canvas_height)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Hand the drawn canvas to the two below, as albumentations wants it."""
        return {"window": self.draw(self.random_generator, params["shape"][:2])}

    def apply(self, img: Image, *, window: Window, **_: Any) -> Image:
        """Return the canvas with the image on it, [canvas height, canvas width, 3]."""
        return _cut_or_pad(img, window, self.fill)

    def apply_to_bboxes(self, bboxes: Boxes, *, window: Window, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the canvas."""
        return into_window(bboxes, window, shape)


class SSDMinIoUCrop(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """Keep the whole image, or a patch that overlaps an object by a minimum, or any patch (SSD section 2.2).

    One of `len(min_ious) + 2` modes is chosen: the whole image; for each value a patch whose IoU with at least one
    object reaches it; any patch. As in the Caffe code the choice is uniform over the modes that find a patch in
    `trials` attempts, and an image without objects stays whole. An object is kept, and clipped, if its centre lies in
    the patch. Objects of which less than a pixel remains are dropped. A patch may hold no object's centre.

    Args:
        min_ious: the minimum overlaps, each 0..1.
        scale: range of the patch's side, relative to the image's: its area is scale squared of the image's.
        aspect_ratio: range of width over height, relative to the image's own aspect ratio.
        trials: attempts in each mode.
        p: probability that a mode is chosen at all.
    """

    def __init__(
        self,
        min_ious: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
        scale: tuple[float, float] = (0.3, 1.0),
        aspect_ratio: tuple[float, float] = (0.5, 2.0),
        trials: int = 50,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if not all(0 <= min_iou <= 1 for min_iou in min_ious):
            raise ConfigError(f"SSDMinIoUCrop: min_ious is {min_ious}; each must be in 0..1.")
        if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ConfigError(f"SSDMinIoUCrop: scale is {scale}; it must be [low, high] with 0 < low <= high <= 1.")
        if not (len(aspect_ratio) == 2 and 0 < aspect_ratio[0] <= 1 <= aspect_ratio[1] < math.inf):
            raise ConfigError(
                f"SSDMinIoUCrop: aspect_ratio is {aspect_ratio}; it must be [low, high] with 0 < low <= 1 <= high, "
                "because a patch as large as the image can only have the image's own."
            )
        if trials < 1:
            raise ConfigError(f"SSDMinIoUCrop: trials is {trials}; it must be at least 1.")
        self.min_ious = min_ious
        self.scale = scale
        self.aspect_ratio = aspect_ratio
        self.trials = trials

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the patch of an image of `size` (height, width), as a window into it.

        boxes: [n, 4] xyxy, relative to the image.
        """
        height, width = size
        patch = self._draw_patch(random, np.asarray(boxes, dtype=np.float64)) if len(boxes) else None
        if patch is None:
            return Window(0, 0, width, height)
        x1, y1, x2, y2 = patch.tolist()
        return Window(
            left=int(x1 * width),
            top=int(y1 * height),
            width=max(int((x2 - x1) * width), 1),
            height=max(int((y2 - y1) * height), 1),
        )

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Hand the drawn patch to the two below, as albumentations wants it."""
        boxes = np.asarray(data.get("bboxes", ()), dtype=np.float64)
        boxes = boxes[:, :4] if len(boxes) else boxes.reshape(0, 4)
        return {"window": self.draw(self.random_generator, params["shape"][:2], boxes)}

    def _draw_patch(
        self, random: np.random.Generator, boxes: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64] | None:
        """Return a patch [4], relative to the image, or None for the whole image.

        Taking the first mode that works, in random order, is the same as choosing among all that work.
        """
        any_patch = 0.0  # IoU >= 0 always holds
        modes = (None, *self.min_ious, any_patch)
        for mode in random.permutation(len(modes)).tolist():
            min_iou = modes[mode]
            if min_iou is None:
                return None
            patches = self._draw_candidates(random)
            reached = np.flatnonzero(_iou(patches, boxes).max(axis=1) >= min_iou)
            if len(reached):
                chosen: npt.NDArray[np.float64] = patches[reached[0]]
                return chosen
        return None

    def _draw_candidates(self, random: np.random.Generator) -> npt.NDArray[np.float64]:
        """Return [trials, 4] patches, xyxy, relative to the image."""
        draws = random.random((self.trials, 4))
        scale = self.scale[0] + draws[:, 0] * (self.scale[1] - self.scale[0])
        aspect_ratio = self.aspect_ratio[0] + draws[:, 1] * (self.aspect_ratio[1] - self.aspect_ratio[0])
        # Beyond these the patch would be wider or higher than the image. The Caffe code (util/sampler.cpp) clamps the
        # drawn ratio too, so that many of the large patches are as wide or as high as the image.
        root = np.sqrt(aspect_ratio.clip(scale**2, 1 / scale**2))
        sides = np.stack([scale * root, scale / root], axis=1).clip(max=1)  # rounding may leave a trace more
        corners = draws[:, 2:] * (1 - sides)
        return np.concatenate([corners, corners + sides], axis=1)

    def apply(self, img: Image, *, window: Window, **_: Any) -> Image:
        """Return the patch [window.height, window.width, 3]."""
        return img[window.top : window.top + window.height, window.left : window.left + window.width]

    def apply_to_bboxes(self, bboxes: Boxes, *, window: Window, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the patch; drop and clip them as the class says."""
        return keep_centred(bboxes, window, shape)


class ScaleJitter(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """Show the image smaller or larger, in a frame of its own size: multi-scale training for a network of one size.

    A network whose anchors belong to one input size cannot be fed others, but its objects can have other sizes: the
    image fills a part of the frame and the rest has the mean colour, or a part of the image fills the frame. Objects
    are kept and clipped as by `SSDMinIoUCrop`. (Large-scale jitter, arXiv:2012.07177, section 3; YOLOv2's changing
    input sizes, arXiv:1612.08242, do the same to the sizes of objects.)

    Args:
        scale: range of the factor on the image's sides, 0.25..4, uniformly distributed.
        fill: RGB colour of the rest, each 0..255.
        p: probability that an image is rescaled.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 1.5),
        fill: tuple[int, int, int] = IMAGENET_MEAN_RGB,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        if not (len(scale) == 2 and 0.25 <= scale[0] <= scale[1] <= 4):
            raise ConfigError(f"ScaleJitter: scale is {scale}; it must be [low, high] with 0.25 <= low <= high <= 4.")
        self.scale = scale
        self.fill = fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the frame, as a window into the image or around it."""
        height, width = params["shape"][:2]
        scale, right, down = self.random_generator.random(3).tolist()
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        frame_width, frame_height = max(round(width / scale), 1), max(round(height / scale), 1)
        left, top = int(right * (width - frame_width)), int(down * (height - frame_height))
        return {"window": Window(left, top, frame_width, frame_height)}

    def apply(self, img: Image, *, window: Window, **_: Any) -> Image:
        """Return the frame [window.height, window.width, 3]."""
        return _cut_or_pad(img, window, self.fill)

    def apply_to_bboxes(self, bboxes: Boxes, *, window: Window, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the frame; drop and clip them as the class says."""
        return keep_centred(bboxes, window, shape)


def into_window(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Express boxes that are relative to an image of `shape` (height, width, ..) relative to a window into it."""
    height, width = shape[:2]
    moved = bboxes.copy()
    moved[:, [0, 2]] = (bboxes[:, [0, 2]] * width - window.left) / window.width
    moved[:, [1, 3]] = (bboxes[:, [1, 3]] * height - window.top) / window.height
    return moved


def keep_centred(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Move boxes into a window as `into_window` does; drop those whose centre is outside, and clip the others.

    Those of which less than a pixel remains are dropped too.
    """
    if window == (0, 0, shape[1], shape[0]):
        return bboxes
    moved = into_window(bboxes, window, shape)
    centres = (moved[:, 0:2] + moved[:, 2:4]) / 2
    moved[:, :4] = np.clip(moved[:, :4], 0, 1)
    sides = (moved[:, 2:4] - moved[:, 0:2]) * (window.width, window.height)
    is_kept = ((centres >= 0) & (centres <= 1) & (sides >= 1)).all(axis=1)
    kept: Boxes = moved[is_kept]
    return kept


def _cut_or_pad(img: Image, window: Window, fill: tuple[int, int, int]) -> Image:
    """Return what a window shows, [window.height, window.width, 3], with `fill` where it is beyond the image."""
    height, width = img.shape[:2]
    left, top, right, bottom = window.left, window.top, window.left + window.width, window.top + window.height
    part = img[max(top, 0) : bottom, max(left, 0) : right]
    borders = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
    return np.asarray(cv2.copyMakeBorder(part, *borders, cv2.BORDER_CONSTANT, value=fill)) if any(borders) else part


def _iou(patches: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return [P, n] IoU of patches [P, 4] and boxes [n, 4], all xyxy with positive area."""
    low = np.maximum(patches[:, None, :2], boxes[:, :2])
    high = np.minimum(patches[:, None, 2:], boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    patch_areas = (patches[:, 2:] - patches[:, :2]).prod(axis=1)
    box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    iou: npt.NDArray[np.float64] = intersection / (patch_areas[:, None] + box_areas - intersection)
    return iou
