"""SSD's augmentation: its steps as transforms, and all of them in one pass over the visible pixels."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.images import RGBImage
from onestage.data.resize import MEAN_RGB, Boxes, require_colour
from onestage.errors import ConfigError, require

LEVELS = np.arange(256, dtype=np.float32)  # every value of a uint8 channel
DEGREES_TO_HUE = 256 / 360  # OpenCV's *_FULL conversions spread the circle over 0..255, which wraps like uint8

INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)


class Distortion(NamedTuple):
    """The changes drawn for one image; 0 or 1 stands for none."""

    brightness: float  # added to all channels, levels
    contrast: float  # factor on all channels
    saturation: float  # factor on the saturation
    hue: float  # added to the hue, degrees
    contrast_first: bool  # contrast comes before saturation and hue, not after them


class SSDPhotometricDistort(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations is untyped
    """Change brightness, contrast, saturation and hue, each with probability 0.5 (SSD section 2.2, its Caffe code).

    Contrast comes before saturation and hue, or after them, with equal chance. Everything is a table look-up on uint8
    levels, rounded and saturated after each change as in the Caffe code. One difference: that code adds up to 18 to
    OpenCV's 8-bit hue, which counts in steps of two degrees and does not wrap; here, as in most later
    implementations, 18 means degrees and the colour circle is closed.

    Args:
        brightness: largest shift of all channels, in levels, in [0, 255].
        contrast: range of the factor on all channels, around level 0; (1, 1) disables it.
        saturation: range of the factor on the saturation.
        hue: largest rotation of the hue, in degrees, in [0, 180].
        p: probability that the image is changed at all.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        name = "SSDPhotometricDistort"
        require(0 <= brightness <= 255, f"{name}: brightness", brightness, "in [0, 255]")
        require(0 <= hue <= 180, f"{name}: hue", hue, "in [0, 180]")
        for key, factors in (("contrast", contrast), ("saturation", saturation)):
            is_range = len(factors) == 2 and 0 <= factors[0] <= factors[1]
            require(is_range, f"{name}: {key}", factors, "[low, high] with 0 <= low <= high")
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def draw(self, random: np.random.Generator) -> Distortion:
        """Draw the changes of one image."""
        order, *draws = random.random(9).tolist()
        ranges = ((-self.brightness, self.brightness), self.contrast, self.saturation, (-self.hue, self.hue))
        brightness, contrast, saturation, hue = (
            low + value * (high - low) if chance < 0.5 else unchanged
            for chance, value, (low, high), unchanged in zip(draws[::2], draws[1::2], ranges, (0, 1, 1, 0), strict=True)
        )
        return Distortion(brightness, contrast, saturation, hue, contrast_first=order < 0.5)

    def get_params(self) -> dict[str, Any]:
        """Draw the changes; albumentations passes them to `apply`."""
        return {"distortion": self.draw(self.random_generator)}

    def apply(self, img: RGBImage, *, distortion: Distortion, **_: Any) -> RGBImage:
        """Distort one image, [H, W, 3] uint8 RGB."""
        img = require_rgb("SSDPhotometricDistort", img)
        brightness, contrast, saturation, hue, contrast_first = distortion
        levels = _saturate(LEVELS + brightness)
        img = _look_up(img, _saturate(levels * contrast) if contrast_first else levels)
        if saturation != 1 or hue != 0:
            hues = np.rint(LEVELS + hue * DEGREES_TO_HUE) % 256
            table = np.stack([hues, _saturate(LEVELS * saturation), LEVELS], axis=-1).astype(np.uint8)
            hsv = cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV_FULL), table[np.newaxis])
            img = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)
        return img if contrast_first else _look_up(img, _saturate(LEVELS * contrast))


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
        return {"window": self.draw(self.random_generator, params["shape"][:2], _boxes_of(data))}

    def apply(self, img: RGBImage, *, window: Window, **_: Any) -> RGBImage:
        """Return the window [window.height, window.width, 3]."""
        height, width = img.shape[:2]
        left, top, right, bottom = window.left, window.top, window.left + window.width, window.top + window.height
        part = img[max(top, 0) : bottom, max(left, 0) : right]
        borders = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
        return _with_borders(part, borders, self.fill)

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
        require_colour("SSDZoomOut: fill", fill)
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

    The modes are the whole image, a patch whose IoU with an object reaches each of `min_ious`, and any patch. As in the
    Caffe code the choice is uniform over the modes that find a patch in `trials` attempts, and an image without objects
    stays whole. A patch may hold no object's centre.

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
        require(is_range, f"{name}: aspect_ratio", aspect_ratio, "[low, high] with 0 < low <= 1 <= high")
        require(trials >= 1, f"{name}: trials", trials, ">= 1")
        self.min_ious = min_ious
        self.scale = scale
        self.aspect_ratio = aspect_ratio
        self.trials = trials

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> Window:
        """Draw the patch, as a window into the image.

        Taking the first mode that works, in random order, is the same as choosing among all that work.
        """
        height, width = size
        modes = (None, *self.min_ious, 0.0)  # None: the whole image; 0: any patch
        for mode in random.permutation(len(modes)).tolist() if len(boxes) else ():
            min_iou = modes[mode]
            if min_iou is None:
                break
            patches = self._draw_candidates(random)
            reached = np.flatnonzero(_iou(patches, boxes).max(axis=1) >= min_iou)
            if len(reached):
                x1, y1, x2, y2 = patches[reached[0]].tolist()
                sides = max(int((x2 - x1) * width), 1), max(int((y2 - y1) * height), 1)
                return Window(int(x1 * width), int(y1 * height), *sides)
        return Window(0, 0, width, height)

    def _draw_candidates(self, random: np.random.Generator) -> npt.NDArray[np.float64]:
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


class View(NamedTuple):
    """Everything drawn for one image."""

    window: Window  # the part of the image's plane that fills the result
    is_mirrored: bool
    interpolation: int  # OpenCV's code
    distortion: Distortion | None


class SSDAugmentation(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """The training augmentation of SSD (arXiv:1512.02325, sections 2.2 and 3.6, and its Caffe code) in one step.

    Colours are distorted, the image is zoomed out, a patch is cropped, mirrored, and stretched to the result with an
    interpolation drawn for each image. Everything is drawn first; then only the visible part of the image is distorted
    and resized, once, into its place on the mean colour. The distortion comes before or after the resize, whichever
    has fewer pixels; the Caffe code distorts first. They differ by rounding and saturation.

    Args:
        image_size: side of the square result, px, >= 1.
        distort: the change of colours; null: `SSDPhotometricDistort` with its defaults. `p: 0` disables a part.
        zoom_out: the canvas; null: `SSDZoomOut` with its defaults.
        crop: the patch; null: `SSDMinIoUCrop` with its defaults.
        mirror_p: probability of a horizontal flip.
        distort_first: always distort before resizing, as the Caffe code does.
        p: probability that an image is augmented; the others are stretched to the result.
    """

    def __init__(
        self,
        image_size: int,
        distort: SSDPhotometricDistort | None = None,
        zoom_out: SSDZoomOut | None = None,
        crop: SSDMinIoUCrop | None = None,
        mirror_p: float = 0.5,
        distort_first: bool = False,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=1.0)
        name = "SSDAugmentation"
        require(image_size >= 1, f"{name}: image_size", image_size, ">= 1")
        require(0 <= mirror_p <= 1, f"{name}: mirror_p", mirror_p, "in [0, 1]")
        require(0 <= p <= 1, f"{name}: p", p, "in [0, 1]")
        self.image_size = image_size
        self.distort = distort or SSDPhotometricDistort()
        self.zoom_out = zoom_out or SSDZoomOut()
        self.crop = crop or SSDMinIoUCrop()
        self.mirror_p = mirror_p
        self.distort_first = distort_first
        self.augment_p = p  # `p` itself is albumentations' own: below 1 it would skip the resize too

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> View:
        """Draw everything for an image of `size` (height, width) with boxes [n, 4] xyxy, relative to it."""
        window = Window(0, 0, size[1], size[0])
        if random.random() >= self.augment_p:
            return View(window, is_mirrored=False, interpolation=cv2.INTER_LINEAR, distortion=None)
        distortion = self.distort.draw(random) if random.random() < self.distort.p else None
        if random.random() < self.zoom_out.p:
            window = self.zoom_out.draw(random, size, boxes)
        if random.random() < self.crop.p:
            patch = self.crop.draw(random, (window.height, window.width), into_window(boxes, window, size))
            window = Window(window.left + patch.left, window.top + patch.top, patch.width, patch.height)
        is_mirrored = bool(random.random() < self.mirror_p)
        return View(window, is_mirrored, INTERPOLATIONS[random.integers(len(INTERPOLATIONS))], distortion)

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the view; albumentations passes it to the two methods below."""
        return {"view": self.draw(self.random_generator, params["shape"][:2], _boxes_of(data))}

    def apply(self, img: RGBImage, *, view: View, **_: Any) -> RGBImage:
        """Return the view, [image_size, image_size, 3]."""
        side = self.image_size
        visible = locate_visible(view.window, img.shape[:2], side)
        if visible is None:
            return np.full((side, side, 3), self.zoom_out.fill, dtype=np.uint8)
        (left, top, width, height), target = visible
        part = img[top : top + height, left : left + width]
        is_distorted_first = self.distort_first or width * height <= target.width * target.height
        if view.distortion is not None and is_distorted_first:
            part = self.distort.apply(part, distortion=view.distortion)
        size = (target.width, target.height)
        part = np.asarray(cv2.resize(part, size, interpolation=view.interpolation), dtype=np.uint8)
        if view.distortion is not None and not is_distorted_first:
            part = self.distort.apply(part, distortion=view.distortion)
        below, right = side - target.top - target.height, side - target.left - target.width
        part = _with_borders(part, (target.top, below, target.left, right), self.zoom_out.fill)
        return np.asarray(cv2.flip(part, 1), dtype=np.uint8) if view.is_mirrored else part

    def apply_to_bboxes(self, bboxes: Boxes, *, view: View, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the view; keep and clip them as `SSDMinIoUCrop` does.

        They follow the pixels, whose place in the result is rounded to whole pixels.
        """
        kept = keep_centred(bboxes, view.window, shape).copy()
        visible = locate_visible(view.window, shape, self.image_size)
        if visible is not None:
            source, target = visible
            frame = np.array([view.window.width, view.window.height] * 2)
            shown = np.array([source.left - view.window.left, source.top - view.window.top] * 2)
            factor = np.array([target.width / source.width, target.height / source.height] * 2)
            moved = (kept[:, :4] * frame - shown) * factor + (target.left, target.top) * 2
            kept[:, :4] = np.clip(moved / self.image_size, 0, 1)
        if view.is_mirrored:
            kept[:, [0, 2]] = 1 - kept[:, [2, 0]]
        return kept


def require_rgb(place: str, image: object) -> RGBImage:
    """Return an image that is uint8 RGB [H, W, 3]; raise ConfigError for anything else."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return image
    found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ConfigError(
        f"{place}: an image must be uint8 RGB [H, W, 3], got {found}.\nIn data.train_transforms, remove what converts "
        "images (Normalize, ToFloat, ToTensorV2, ToGray): the detector normalises them."
    )


def locate_visible(window: Window, size: tuple[int, ...], side: int) -> tuple[Window, Window] | None:
    """Return the pixels of an image that a window shows, and those of a square of `side` px that they fill.

    A window within the image fills the whole square; None: it shows nothing of the image.
    """
    spans = []
    for start, length, limit in ((window.left, window.width, size[1]), (window.top, window.height, size[0])):
        low, high = max(start, 0), min(start + length, limit)
        if low >= high:
            return None
        first = min(round((low - start) * side / length), side - 1)
        last = max(round((high - start) * side / length), first + 1)  # at least one pixel
        spans.append((low, high - low, first, last - first))
    (left, width, target_left, target_width), (top, height, target_top, target_height) = spans
    return Window(left, top, width, height), Window(target_left, target_top, target_width, target_height)


def into_window(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Express boxes that are relative to an image of `shape` (height, width, ...) relative to a window into it."""
    moved = bboxes.copy()
    moved[:, [0, 2]] = (bboxes[:, [0, 2]] * shape[1] - window.left) / window.width
    moved[:, [1, 3]] = (bboxes[:, [1, 3]] * shape[0] - window.top) / window.height
    return moved


def keep_centred(bboxes: Boxes, window: Window, shape: tuple[int, ...]) -> Boxes:
    """Move boxes into a window; drop those whose centre is outside or that lose all but a pixel, clip the others."""
    if window == (0, 0, shape[1], shape[0]):
        return bboxes
    moved = into_window(bboxes, window, shape)
    centres = (moved[:, 0:2] + moved[:, 2:4]) / 2
    moved[:, :4] = np.clip(moved[:, :4], 0, 1)
    sides = (moved[:, 2:4] - moved[:, 0:2]) * (window.width, window.height)
    kept: Boxes = moved[((centres >= 0) & (centres <= 1) & (sides >= 1)).all(axis=1)]
    return kept


def _boxes_of(data: dict[str, Any]) -> Boxes:
    """Return the boxes [n, 4] that albumentations passes: with their labels, or an empty array of any shape."""
    boxes = np.asarray(data.get("bboxes", ()), dtype=np.float64)
    return boxes[:, :4] if len(boxes) else boxes.reshape(0, 4)


def _with_borders(image: RGBImage, borders: tuple[int, int, int, int], fill: tuple[int, int, int]) -> RGBImage:
    """Add borders: (top, bottom, left, right), px."""
    if not any(borders):
        return image
    return np.asarray(cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=fill), dtype=np.uint8)


def _saturate(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.clip(np.rint(levels), 0, 255)


def _look_up(img: RGBImage, levels: npt.NDArray[np.float32]) -> RGBImage:
    if np.array_equal(levels, LEVELS):
        return img
    return np.asarray(cv2.LUT(img, levels.astype(np.uint8)), dtype=np.uint8)


def _iou(patches: Boxes, boxes: Boxes) -> npt.NDArray[np.float64]:
    """Return [P, n] IoU of patches [P, 4] and boxes [n, 4], all xyxy with positive area."""
    low = np.maximum(patches[:, None, :2], boxes[:, :2])
    high = np.minimum(patches[:, None, 2:], boxes[:, 2:])
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(axis=1) for corners in (patches, boxes)]
    return np.asarray(intersection / (areas[0][:, None] + areas[1] - intersection))
