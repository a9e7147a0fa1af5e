"""SSD's whole recipe as one transform that touches no more pixels than the network will see."""

from typing import Any, Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np

from onestage.data.crops import Boxes, Image, SSDMinIoUCrop, SSDZoomOut, Window, into_window, keep_centred
from onestage.data.photometric import Distortion, SSDPhotometricDistort
from onestage.errors import ConfigError

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
