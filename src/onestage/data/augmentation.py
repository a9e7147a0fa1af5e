"""SSD's photometric distortion, and its whole augmentation in one pass over the visible pixels."""

from typing import Any, Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.crops import SSDMinIoUCrop, SSDZoomOut, Window, into_window, keep_centred
from onestage.data.resize import Boxes, RGBImage
from onestage.errors import ConfigError, require

LEVELS = np.arange(256, dtype=np.float32)  # every value of a uint8 channel
DEGREES_TO_HUE = 256 / 360  # OpenCV's *_FULL conversions spread the circle over 0..255, which wraps like uint8

Interpolation = Literal["linear", "area", "nearest", "cubic", "lanczos4"]
OPENCV_CODES: dict[str, int] = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "cubic": cv2.INTER_CUBIC,
    "lanczos4": cv2.INTER_LANCZOS4,
}


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
        chances, values = draws[0::2], draws[1::2]
        ranges = ((-self.brightness, self.brightness), self.contrast, self.saturation, (-self.hue, self.hue))
        drawn = [low + value * (high - low) for (low, high), value in zip(ranges, values, strict=True)]
        brightness, contrast, saturation, hue = (
            value if chance < 0.5 else nothing
            for value, chance, nothing in zip(drawn, chances, (0.0, 1.0, 1.0, 0.0), strict=True)
        )
        return Distortion(brightness, contrast, saturation, hue, contrast_first=order < 0.5)

    def get_params(self) -> dict[str, Any]:
        """Draw the changes; albumentations passes them to `apply`."""
        return {"distortion": self.draw(self.random_generator)}

    def apply(self, img: RGBImage, *, distortion: Distortion, **_: Any) -> RGBImage:
        """Distort one image, [H, W, 3] uint8 RGB."""
        if img.dtype != np.uint8 or img.shape[2:] != (3,):
            raise ConfigError(
                f"SSDPhotometricDistort got an image of type {img.dtype} and shape {img.shape}; it must be uint8 RGB "
                "[H, W, 3].\nIn data.train_transforms, leave out what converts images (Normalize, ToFloat, ToGray): "
                "the detector normalises them itself."
            )
        brightness, contrast, saturation, hue, contrast_first = distortion
        levels = _saturate(LEVELS + brightness)
        if contrast_first:
            levels = _saturate(levels * contrast)
        img = _look_up(img, levels)
        if saturation != 1 or hue != 0:
            img = _change_saturation_and_hue(img, saturation, hue)
        return img if contrast_first else _look_up(img, _saturate(LEVELS * contrast))


class View(NamedTuple):
    """Everything drawn for one image."""

    window: Window  # the part of the image's plane that fills the result
    is_mirrored: bool
    interpolation: Interpolation
    distortion: Distortion | None


class SSDAugmentation(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """The training augmentation of SSD (arXiv:1512.02325, sections 2.2 and 3.6, and its Caffe code) in one step.

    Colours are distorted, the image is zoomed out, a patch is cropped, mirrored, and stretched to the result with an
    interpolation drawn for each image. Everything is drawn first. Then only the visible part of the image is distorted
    and resized, once, into its place on the mean colour, so no canvas of 16 times the image's area is made.

    The distortion works on the image or on the result, whichever has fewer of the visible pixels; the Caffe code
    distorts before it resizes. They differ by rounding and saturation.

    Args:
        image_size: side of the square result, px, >= 1.
        distort: the change of colours; null: `SSDPhotometricDistort` with its defaults. `p: 0` disables a part.
        zoom_out: the canvas; null: `SSDZoomOut` with its defaults.
        crop: the patch; null: `SSDMinIoUCrop` with its defaults.
        mirror_p: probability of a horizontal flip.
        interpolations: what to draw from, with equal chances.
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
        interpolations: tuple[Interpolation, ...] = ("linear", "area", "nearest", "cubic", "lanczos4"),
        distort_first: bool = False,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=1.0)
        name = "SSDAugmentation"
        require(image_size >= 1, f"{name}: image_size", image_size, ">= 1")
        require(0 <= mirror_p <= 1, f"{name}: mirror_p", mirror_p, "in [0, 1]")
        require(0 <= p <= 1, f"{name}: p", p, "in [0, 1]")
        is_known = bool(interpolations) and set(interpolations) <= set(OPENCV_CODES)
        require(is_known, f"{name}: interpolations", interpolations, f"at least one of {', '.join(OPENCV_CODES)}")
        self.image_size = image_size
        self.distort = distort or SSDPhotometricDistort()
        self.zoom_out = zoom_out or SSDZoomOut()
        self.crop = crop or SSDMinIoUCrop()
        self.mirror_p = mirror_p
        self.interpolations = interpolations
        self.distort_first = distort_first
        self.augment_p = p  # `p` itself is albumentations' own: below 1 it would skip the resize too

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> View:
        """Draw everything for an image of `size` (height, width) with boxes [n, 4] xyxy, relative to it."""
        window = Window(0, 0, size[1], size[0])
        if random.random() >= self.augment_p:
            return View(window, is_mirrored=False, interpolation="linear", distortion=None)
        distortion = self.distort.draw(random) if random.random() < self.distort.p else None
        if random.random() < self.zoom_out.p:
            window = self.zoom_out.draw(random, size, boxes)
        if random.random() < self.crop.p:
            patch = self.crop.draw(random, (window.height, window.width), into_window(boxes, window, size))
            window = Window(window.left + patch.left, window.top + patch.top, patch.width, patch.height)
        return View(
            window=window,
            is_mirrored=bool(random.random() < self.mirror_p),
            interpolation=self.interpolations[int(random.integers(len(self.interpolations)))],
            distortion=distortion,
        )

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the view; albumentations passes it to the two methods below."""
        boxes = np.asarray(data.get("bboxes", ()), dtype=np.float64)
        boxes = boxes[:, :4] if len(boxes) else boxes.reshape(0, 4)
        return {"view": self.draw(self.random_generator, params["shape"][:2], boxes)}

    def apply(self, img: RGBImage, *, view: View, **_: Any) -> RGBImage:
        """Return the view, [image_size, image_size, 3]."""
        side = self.image_size
        visible = locate_visible(view.window, img.shape[:2], side)
        if visible is None:
            return np.full((side, side, 3), self.zoom_out.fill, dtype=np.uint8)
        source, target = visible
        part = img[source.top : source.top + source.height, source.left : source.left + source.width]
        is_enlarged = source.width * source.height <= target.width * target.height
        if self.distort_first or is_enlarged:
            part = self._distorted(part, view)
        size, code = (target.width, target.height), OPENCV_CODES[view.interpolation]
        part = np.asarray(cv2.resize(part, size, interpolation=code), dtype=np.uint8)
        if not (self.distort_first or is_enlarged):
            part = self._distorted(part, view)
        left, top = target.left, target.top
        borders = (top, side - top - target.height, left, side - left - target.width)
        if any(borders):
            part = np.asarray(cv2.copyMakeBorder(part, *borders, cv2.BORDER_CONSTANT, value=self.zoom_out.fill))
        return np.asarray(cv2.flip(part, 1), dtype=np.uint8) if view.is_mirrored else part

    def apply_to_bboxes(self, bboxes: Boxes, *, view: View, shape: tuple[int, ...], **_: Any) -> Boxes:
        """Move boxes [n, 4 or more], relative to the image, into the view; keep and clip them as `SSDMinIoUCrop` does.

        They follow the pixels, whose place in the result is rounded to whole pixels.
        """
        kept = keep_centred(bboxes, view.window, shape).copy()
        visible = locate_visible(view.window, (shape[0], shape[1]), self.image_size)
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

    def _distorted(self, part: RGBImage, view: View) -> RGBImage:
        return part if view.distortion is None else self.distort.apply(part, distortion=view.distortion)


def locate_visible(window: Window, size: tuple[int, int], side: int) -> tuple[Window, Window] | None:
    """Return the pixels of an image that a window shows, and those of a square of `side` px that they fill.

    A window within the image fills the whole square; None: it shows nothing of the image.
    """
    across = _locate_along(window.left, window.width, size[1], side)
    down = _locate_along(window.top, window.height, size[0], side)
    if across is None or down is None:
        return None
    return Window(across[0], down[0], across[1], down[1]), Window(across[2], down[2], across[3], down[3])


def _locate_along(start: int, length: int, limit: int, side: int) -> tuple[int, int, int, int] | None:
    """Return start and length of the visible pixels, in the image and in the result, along one axis."""
    low, high = max(start, 0), min(start + length, limit)
    if low >= high:
        return None
    first = min(round((low - start) * side / length), side - 1)
    last = max(round((high - start) * side / length), first + 1)  # at least one pixel
    return low, high - low, first, last - first


def _saturate(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.clip(np.rint(levels), 0, 255)


def _look_up(img: RGBImage, levels: npt.NDArray[np.float32]) -> RGBImage:
    if np.array_equal(levels, LEVELS):
        return img
    return np.asarray(cv2.LUT(img, levels.astype(np.uint8)), dtype=np.uint8)


def _change_saturation_and_hue(img: RGBImage, saturation: float, hue: float) -> RGBImage:
    hues = np.rint(LEVELS + hue * DEGREES_TO_HUE) % 256
    table = np.stack([hues, _saturate(LEVELS * saturation), LEVELS], axis=-1).astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV_FULL), table[np.newaxis])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)
