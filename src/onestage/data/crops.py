"""SSD's zoom-out and min-IoU crop, and scale jitter, as albumentations transforms of one kind: windows."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.resize import MEAN_RGB, Boxes, RGBImage
from onestage.errors import require

Patches = npt.NDArray[np.float64]


class Window(NamedTuple):
    """A rectangle in pixels of the image; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int


class WindowTransform(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """Shows a window of the image, or around it, with a fill colour where there is no image.

    Objects are kept, and clipped, if their centre lies in the window and at least a pixel of them remains.
    """

    fill: tuple[int, int, int] = MEAN_RGB

    @abstractmethod
    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the window for an image of (height, width) `size` with boxes [n, 4] xyxy, relative to it."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window; albumentations passes it to the two methods below."""
        boxes = np.asarray(data.get("bboxes", ()), dtype=np.float64)
        boxes = boxes[:, :4] if len(boxes) else boxes.reshape(0, 4)
        return {"window": self.draw(self.random_generator, params["shape"][:2], boxes)}

    def apply(self, img: RGBImage, *, window: Window, **_: Any) -> RGBImage:
        """Return the window [window.height, window.width, 3]."""
        height, width = img.shape[:2]
        left, top, right, bottom = window.left, window.top, window.left + window.width, window.top + window.height
        part = img[max(top, 0) : bottom, max(left, 0) : right]
        borders = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
        if not any(borders):
            return part
        return np.asarray(cv2.copyMakeBorder(part, *borders, cv2.BORDER_CONSTANT, value=self.fill))

    def apply_to_bboxes(self, bboxes: Boxes, *, window: Window, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the window."""
        return keep_centred(bboxes, window, shape)


class SSDZoomOut(WindowTransform):
    """Put the image somewhere on a larger canvas of the mean colour, so that objects get small (SSD section 3.6).

    Args:
        max_ratio: the canvas is 1 to `max_ratio` times as wide and as high as the image (16 times the area at 4).
        fill: RGB colour of the canvas, each in [0, 255].
        p: probability that an image is zoomed out.
    """

    def __init__(self, max_ratio: float = 4.0, fill: tuple[int, int, int] = MEAN_RGB, p: float = 0.5) -> None:
        super().__init__(p=p)
        require(1 <= max_ratio < math.inf, "SSDZoomOut: max_ratio", max_ratio, ">= 1; 1 keeps the image")
        require_colour("SSDZoomOut", fill)
        self.max_ratio = max_ratio
        self.fill = fill

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the canvas, as a window around the image."""
        height, width = size
        ratio, right, down = random.random(3).tolist()
        ratio = 1 + ratio * (self.max_ratio - 1)
        canvas_width, canvas_height = int(width * ratio), int(height * ratio)
        left, top = int(right * (canvas_width - width)), int(down * (canvas_height - height))
        return Window(-left, -top, canvas_width, canvas_height)

    def apply_to_bboxes(self, bboxes: Boxes, *, window: Window, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the canvas; all are kept."""
        return into_window(bboxes, window, shape)


class SSDMinIoUCrop(WindowTransform):
    """Keep the whole image, or a patch that overlaps an object by a minimum, or any patch (SSD section 2.2).

    One of `len(min_ious) + 2` modes is chosen: the whole image; for each value a patch whose IoU with at least one
    object reaches it; any patch. As in the Caffe code the choice is uniform over the modes that find a patch in
    `trials` attempts, and an image without objects stays whole. A patch may hold no object's centre.

    Args:
        min_ious: the minimum overlaps, each in [0, 1].
        scale: range of the patch's side, relative to the image's: its area is scale squared of the image's.
        aspect_ratio: range of width over height, relative to the image's own aspect ratio.
        trials: attempts in each mode, >= 1.
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
        name = "SSDMinIoUCrop"
        require(all(0 <= min_iou <= 1 for min_iou in min_ious), f"{name}: min_ious", min_ious, "each in [0, 1]")
        is_range = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        require(is_range, f"{name}: scale", scale, "[low, high] with 0 < low <= high <= 1")
        is_range = len(aspect_ratio) == 2 and 0 < aspect_ratio[0] <= 1 <= aspect_ratio[1] < math.inf
        rule = "[low, high] with 0 < low <= 1 <= high, as a patch of full size has the image's own"
        require(is_range, f"{name}: aspect_ratio", aspect_ratio, rule)
        require(trials >= 1, f"{name}: trials", trials, ">= 1")
        self.min_ious = min_ious
        self.scale = scale
        self.aspect_ratio = aspect_ratio
        self.trials = trials

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the patch, as a window into the image."""
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

    def _draw_patch(self, random: np.random.Generator, boxes: Patches) -> Patches | None:
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
                chosen: Patches = patches[reached[0]]
                return chosen
        return None

    def _draw_candidates(self, random: np.random.Generator) -> Patches:
        """Return [trials, 4] patches, xyxy, relative to the image."""
        draws = random.random((self.trials, 4))
        scale = self.scale[0] + draws[:, 0] * (self.scale[1] - self.scale[0])
        aspect_ratio = self.aspect_ratio[0] + draws[:, 1] * (self.aspect_ratio[1] - self.aspect_ratio[0])
        # Beyond these the patch would be wider or higher than the image. The Caffe code (util/sampler.cpp) clamps the
        # drawn ratio too, so that many of the large patches are as wide or as high as the image.
        root = np.sqrt(aspect_ratio.clip(scale**2, 1 / scale**2))
        sides = np.stack([scale * root, scale / root], axis=1).clip(max=1)  # rounding may leave slightly more
        corners = draws[:, 2:] * (1 - sides)
        return np.concatenate([corners, corners + sides], axis=1)


class ScaleJitter(WindowTransform):
    """Show the image smaller or larger, in a frame of its own size: multi-scale training for a network of one size.

    The image fills a part of the frame and the rest has the mean colour, or a part of the image fills the frame.
    (Large-scale jitter, arXiv:2012.07177, section 3; YOLOv2's changing input sizes, arXiv:1612.08242, do the same to
    the sizes of objects.)

    Args:
        scale: range of the factor on the image's sides, in [0.25, 4], uniformly distributed.
        fill: RGB colour of the rest, each in [0, 255].
        p: probability that an image is rescaled.
    """

    def __init__(
        self, scale: tuple[float, float] = (0.5, 1.5), fill: tuple[int, int, int] = MEAN_RGB, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        is_range = len(scale) == 2 and 0.25 <= scale[0] <= scale[1] <= 4
        require(is_range, "ScaleJitter: scale", scale, "[low, high] with 0.25 <= low <= high <= 4")
        require_colour("ScaleJitter", fill)
        self.scale = scale
        self.fill = fill

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the frame, as a window into the image or around it."""
        height, width = size
        scale, right, down = random.random(3).tolist()
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        frame_width, frame_height = max(round(width / scale), 1), max(round(height / scale), 1)
        left, top = int(right * (width - frame_width)), int(down * (height - frame_height))
        return Window(left, top, frame_width, frame_height)


def require_colour(name: str, fill: tuple[int, int, int]) -> None:
    """Raise ConfigError unless `fill` is an RGB colour."""
    is_colour = len(fill) == 3 and all(0 <= value <= 255 for value in fill)
    require(is_colour, f"{name}: fill", fill, "[red, green, blue], each in [0, 255]")


def into_window(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Express boxes that are relative to an image of `shape` (height, width, ...) relative to a window into it."""
    height, width = shape[:2]
    moved = bboxes.copy()
    moved[:, [0, 2]] = (bboxes[:, [0, 2]] * width - window.left) / window.width
    moved[:, [1, 3]] = (bboxes[:, [1, 3]] * height - window.top) / window.height
    return moved


def keep_centred(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Move boxes into a window; drop those whose centre is outside or that lose all but a pixel, clip the others."""
    if window == (0, 0, shape[1], shape[0]):
        return bboxes
    moved = into_window(bboxes, window, shape)
    centres = (moved[:, 0:2] + moved[:, 2:4]) / 2
    moved[:, :4] = np.clip(moved[:, :4], 0, 1)
    sides = (moved[:, 2:4] - moved[:, 0:2]) * (window.width, window.height)
    is_kept = ((centres >= 0) & (centres <= 1) & (sides >= 1)).all(axis=1)
    kept: Boxes = moved[is_kept]
    return kept


def _iou(patches: Patches, boxes: Patches) -> Patches:
    """Return [P, n] IoU of patches [P, 4] and boxes [n, 4], all xyxy with positive area."""
    low = np.maximum(patches[:, None, :2], boxes[:, :2])
    high = np.minimum(patches[:, None, 2:], boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(axis=1) for corners in (patches, boxes)]
    iou: Patches = intersection / (areas[0][:, None] + areas[1] - intersection)
    return iou
