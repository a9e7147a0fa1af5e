"""SSD's photometric distortion, and its whole augmentation in one pass over the visible pixels."""

from typing import Any, Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.crops import Boxes, Image, SSDMinIoUCrop, SSDZoomOut, Window, into_window, keep_centred
from onestage.errors import ConfigError

LEVELS = np.arange(256, dtype=np.float32)  # every value of a uint8 channel
DEGREES_TO_HUE = 256 / 360  # OpenCV's *_FULL conversions spread the circle over 0..255, which wraps like uint8 does


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
        brightness: largest shift of all channels, in levels, 0..255.
        contrast: range of the factor on all channels, around level 0; (1, 1) leaves it out.
        saturation: range of the factor on the saturation.
        hue: largest rotation of the hue, in degrees, 0..180.
        p: probability that the image is touched at all.
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
        _require_range("brightness", brightness, 0, 255)
        _require_range("hue", hue, 0, 180)
        _require_factors("contrast", contrast)
        _require_factors("saturation", saturation)
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
        """Hand the drawn changes to `apply`, as albumentations wants it."""
        return self.draw(self.random_generator)._asdict()

    def apply(
        self,
        img: npt.NDArray[np.uint8],
        *,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        contrast_first: bool,
        **_: Any,  # albumentations adds the shape and more
    ) -> npt.NDArray[np.uint8]:
        """Distort one image, [H, W, 3] uint8 RGB."""
        if img.dtype != np.uint8 or img.shape[2:] != (3,):
            raise ConfigError(
                f"SSDPhotometricDistort got an image of type {img.dtype} and shape {img.shape}; it works on uint8 RGB "
                "images [H, W, 3].\nIn data.train_transforms, leave out what converts images (Normalize, ToFloat, "
                "ToGray): the detector normalises them itself."
            )
        levels = _saturate(LEVELS + brightness)
        if contrast_first:
            levels = _saturate(levels * contrast)
        img = _look_up(img, levels)
        if saturation != 1 or hue != 0:
            img = _change_saturation_and_hue(img, saturation, hue)
        return img if contrast_first else _look_up(img, _saturate(LEVELS * contrast))


def _saturate(levels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.clip(np.rint(levels), 0, 255)


def _look_up(img: npt.NDArray[np.uint8], levels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    if np.array_equal(levels, LEVELS):
        return img
    return np.asarray(cv2.LUT(img, levels.astype(np.uint8)), dtype=np.uint8)


def _change_saturation_and_hue(img: npt.NDArray[np.uint8], saturation: float, hue: float) -> npt.NDArray[np.uint8]:
    hues = np.rint(LEVELS + hue * DEGREES_TO_HUE) % 256
    table = np.stack([hues, _saturate(LEVELS * saturation), LEVELS], axis=-1).astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV_FULL), table[np.newaxis])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"SSDPhotometricDistort: {name} is {value:g}; it must be in {low:g}..{high:g}.")


def _require_factors(name: str, factors: tuple[float, float]) -> None:
    if not (len(factors) == 2 and 0 <= factors[0] <= factors[1]):
        raise ConfigError(f"SSDPhotometricDistort: {name} is {factors}; it must be [low, high] with 0 <= low <= high.")


Interpolation = Literal["linear", "area", "nearest", "cubic", "lanczos4"]

OPENCV_CODES: dict[str, int] = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "nearest": cv2.INTER_NEAREST,
    "cubic": cv2.INTER_CUBIC,
    "lanczos4": cv2.INTER_LANCZOS4,
}


class View(NamedTuple):
    """What was drawn for one image."""

    window: Window  # the part of the image's plane that fills the result
    is_mirrored: bool
    interpolation: Interpolation
    distortion: Distortion | None


class Placement(NamedTuple):
    """The visible pixels of the image, and the pixels of the result that they fill."""

    source: Window
    target: Window


class SSDAugmentation(A.DualTransform):  # type: ignore[misc]  # albumentations is untyped
    """The training augmentation of SSD (arXiv:1512.02325, sections 2.2 and 3.6, and its Caffe code) in one step.

    Colours are distorted, the image is zoomed out, a patch is cropped, mirrored, and stretched to the result with an
    interpolation drawn anew for each image. Everything is drawn first. Then the visible part of the image alone is
    distorted and resized, once, into its place on the mean colour: no canvas of 16 times the image's area is made.

    The distortion works on the image or on the result, whichever has fewer of the visible pixels; the Caffe code
    distorts before it resizes. Where it makes a difference it is one of rounding and saturation.

    Args:
        image_size: side of the square result, px; must be that of the data module.
        distort: the change of colours; null: `SSDPhotometricDistort` with its defaults. `p: 0` leaves a part out.
        zoom_out: the canvas; null: `SSDZoomOut` with its defaults.
        crop: the patch; null: `SSDMinIoUCrop` with its defaults.
        mirror_p: probability that left and right change places.
        interpolations: what to draw from, with equal chances.
        distort_first: distort before resizing always, as the Caffe code does.
        p: probability that anything of this happens to an image; the others are stretched to the result.
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
        if image_size < 1:
            raise ConfigError(f"SSDAugmentation: image_size is {image_size}; it must be at least 1 px.")
        if not 0 <= mirror_p <= 1 or not 0 <= p <= 1:
            raise ConfigError(f"SSDAugmentation: mirror_p is {mirror_p:g} and p {p:g}; both must be in 0..1.")
        if not interpolations or not set(interpolations) <= set(OPENCV_CODES):
            raise ConfigError(
                f"SSDAugmentation: interpolations is {interpolations}; give at least one of {', '.join(OPENCV_CODES)}."
            )
        self.image_size = image_size
        self.distort = distort or SSDPhotometricDistort()
        self.zoom_out = zoom_out or SSDZoomOut()
        self.crop = crop or SSDMinIoUCrop()
        self.mirror_p = mirror_p
        self.interpolations = interpolations
        self.distort_first = distort_first
        self.chance = p  # `p` itself is albumentations' own: with less than 1 it would skip the resize too

    def draw(self, random: np.random.Generator, size: tuple[int, int], boxes: Boxes) -> View:
        """Draw everything for an image of `size` (height, width) with boxes [n, 4] xyxy, relative to it."""
        window = Window(0, 0, size[1], size[0])
        if random.random() >= self.chance:
            return View(window, is_mirrored=False, interpolation="linear", distortion=None)
        distortion = self.distort.draw(random) if random.random() < self.distort.p else None
        if random.random() < self.zoom_out.p:
            window = self.zoom_out.draw(random, size)
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
        """Hand what was drawn to the two below, as albumentations wants it."""
        boxes = np.asarray(data.get("bboxes", ()), dtype=np.float64)
        boxes = boxes[:, :4] if len(boxes) else boxes.reshape(0, 4)
        return {"view": self.draw(self.random_generator, params["shape"][:2], boxes)}

    def apply(self, img: Image, *, view: View, **_: Any) -> Image:
        """Return the view, [image_size, image_size, 3]."""
        side = self.image_size
        placement = place(view.window, img.shape[:2], side)
        if placement is None:
            return np.full((side, side, 3), self.zoom_out.fill, dtype=np.uint8)
        source, target = placement
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
        placement = place(view.window, (shape[0], shape[1]), self.image_size)
        if placement is not None:
            source, target = placement
            frame = np.array([view.window.width, view.window.height] * 2)
            shown = np.array([source.left - view.window.left, source.top - view.window.top] * 2)
            factor = np.array([target.width / source.width, target.height / source.height] * 2)
            moved = (kept[:, :4] * frame - shown) * factor + (target.left, target.top) * 2
            kept[:, :4] = np.clip(moved / self.image_size, 0, 1)
        if view.is_mirrored:
            kept[:, [0, 2]] = 1 - kept[:, [2, 0]]
        return kept

    def _distorted(self, part: Image, view: View) -> Image:
        return part if view.distortion is None else self.distort.apply(part, **view.distortion._asdict())


def place(window: Window, size: tuple[int, int], side: int) -> Placement | None:
    """Tell which pixels of an image a window shows, if any, and which pixels of a square of `side` px they fill.

    A window within the image fills the whole square.
    """
    across = _place_along(window.left, window.width, size[1], side)
    down = _place_along(window.top, window.height, size[0], side)
    if across is None or down is None:
        return None
    return Placement(
        source=Window(across[0], down[0], across[1], down[1]),
        target=Window(across[2], down[2], across[3], down[3]),
    )


def _place_along(start: int, length: int, limit: int, side: int) -> tuple[int, int, int, int] | None:
    """Return start and length of what is visible, in pixels of the image and of the result, along one axis."""
    low, high = max(start, 0), min(start + length, limit)
    if low >= high:
        return None
    first = min(round((low - start) * side / length), side - 1)
    last = max(round((high - start) * side / length), first + 1)  # at least one pixel
    return low, high - low, first, last - first
