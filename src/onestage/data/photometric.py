"""SSD's colour changes as one albumentations transform. Geometry lives in `crops.py`."""

from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt

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
