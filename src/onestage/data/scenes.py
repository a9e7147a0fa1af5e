"""Draw one scene of the embedded data set: textured shapes on a cluttered background."""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.images import RGBImage

SHAPE_NAMES = ("circle", "cross", "ring", "square", "star", "triangle")
CANVAS_SIZES = ((200, 240), (240, 180), (200, 200), (176, 256), (232, 208))  # (height, width), px
EMPTY_FRACTION = 0.06  # of the scenes show clutter alone
MAX_OBJECTS = 6
DIAMETERS = (26.0, 120.0)  # px, of the circle around a shape; small ones are as frequent as large ones
MAX_STRETCH = 1.3  # between the two axes of a shape
MAX_HIDDEN = 0.35  # of a shape may lie behind others, so that it can still be recognised
MARGIN = 80  # px around the canvas; no stretched shape has a longer radius
MIN_INSIDE = 0.8  # of a shape lies within the canvas
MIN_CONTRAST = 70.0  # between the mean colours of a shape and of what lies under it, in the worst channel
PLACEMENT_TRIALS = 12
BLOB_BLUR = (13, 13)  # px; twice, so that no edge is left
SUBPIXEL_BITS = 4  # cv2 draws with coordinates in 1/16 px

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class Scene(NamedTuple):
    """One image and its objects."""

    image: RGBImage  # [H, W, 3]
    boxes: npt.NDArray[np.int64]  # [M, 4] xyxy edges, tight around the whole shape, hidden parts included
    labels: npt.NDArray[np.int64]  # [M] index into SHAPE_NAMES
    areas: npt.NDArray[np.int64]  # [M] pixels of the whole shape


def draw_scene(seed: int, index: int, max_objects: int = MAX_OBJECTS, clutter: int = 1) -> Scene:
    """Draw scene `index` of the data set `seed`: the same numbers give the same scene.

    clutter: times the usual number of spots and strokes that are no object, >= 0.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    height, width = CANVAS_SIZES[rng.integers(len(CANVAS_SIZES))]
    canvas = _draw_background(rng, height, width, clutter)
    num_objects = 0 if rng.random() < EMPTY_FRACTION else int(rng.integers(1, max_objects + 1))
    labels: list[int] = []
    masks: list[Mask] = []
    visible: list[Mask] = []
    for _ in range(num_objects):
        label = int(rng.integers(len(SHAPE_NAMES)))
        coverage = _place_shape(rng, SHAPE_NAMES[label], masks, visible, (height, width))
        if coverage is None:
            continue
        _paint(rng, canvas, coverage)
        mask = coverage >= 0.5
        visible = [*(other & ~mask for other in visible), mask]
        masks.append(mask)
        labels.append(label)
    return Scene(
        image=_photograph(rng, canvas),
        boxes=np.array([_tight_box(mask) for mask in masks], dtype=np.int64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        areas=np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64),
    )


def _place_shape(
    rng: np.random.Generator, name: str, masks: list[Mask], visible: list[Mask], size: tuple[int, int]
) -> Array | None:
    """Return the coverage [H, W] in 0..1 of a shape where it hides too little of the others, or None."""
    height, width = size
    for _ in range(PLACEMENT_TRIALS):
        radius = 0.5 * np.exp(rng.uniform(*np.log(DIAMETERS)))
        centre = rng.uniform((0, 0), (width, height))
        angle = rng.uniform(0, 2 * np.pi)
        stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(MAX_STRETCH))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        axes = turn @ np.diag([radius * stretch, radius / stretch])
        contours = [(outline @ axes.T).astype(np.float32) for outline in _unit_contours(rng, name)]
        whole = _rasterise(contours, centre + MARGIN, (height + 2 * MARGIN, width + 2 * MARGIN))
        coverage = whole[MARGIN:-MARGIN, MARGIN:-MARGIN]
        if coverage.sum() < MIN_INSIDE * whole.sum():
            continue
        mask = coverage >= 0.5
        if all(
            np.count_nonzero(seen & ~mask) >= (1 - MAX_HIDDEN) * np.count_nonzero(other)
            for seen, other in zip(visible, masks, strict=True)
        ):
            return coverage
    return None


def _unit_contours(rng: np.random.Generator, name: str) -> list[npt.NDArray[np.float64]]:
    """Return the outlines of a shape that touches the unit circle; a second one is a hole."""
    if name == "circle":
        return [_polygon(48)]
    if name == "ring":
        return [_polygon(48), rng.uniform(0.45, 0.65) * _polygon(48)]
    if name == "square":
        return [_polygon(4)]
    if name == "triangle":
        return [_polygon(3)]
    if name == "star":
        return [np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)[:, None] * _polygon(10)]
    arm = rng.uniform(0.22, 0.32)  # half the width of a cross's arm
    tip = np.sqrt(1 - arm**2)
    quarter = np.array([[tip, -arm], [tip, arm], [arm, arm]])
    turns = [np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), n) for n in range(4)]
    return [np.concatenate([quarter @ turn.T for turn in turns])]


def _polygon(num_corners: int) -> npt.NDArray[np.float64]:
    """Return the corners of a regular polygon in the unit circle, [num_corners, 2]."""
    angles = np.arange(num_corners) * 2 * np.pi / num_corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rasterise(contours: list[Array], centre: npt.NDArray[np.float64], size: tuple[int, int]) -> Array:
    """Fill outlines with soft edges: [H, W] in 0..1, the part of each pixel that is covered, a 1 px rim included."""
    points = [np.round((contour + centre) * (1 << SUBPIXEL_BITS)).astype(np.int32) for contour in contours]
    canvas = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(canvas, points, 255, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)
    return canvas.astype(np.float32) / np.float32(255)


def _tight_box(mask: Mask) -> tuple[int, int, int, int]:
    """Return the edges x1, y1, x2, y2 around the pixels of a mask."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return x, y, x + width, y + height


def _paint(rng: np.random.Generator, canvas: Array, coverage: Array) -> None:
    """Lay a texture over the canvas where the shape is, in colours that stand out from what was there."""
    x1, y1, x2, y2 = _tight_box(coverage > 0)
    canvas, coverage = canvas[y1:y2, x1:x2], coverage[y1:y2, x1:x2]
    under = cv2.mean(canvas, (coverage >= 0.5).astype(np.uint8))[:3]
    colours = rng.uniform(0, 255, (16, 3))
    distance = np.abs(colours - under).max(axis=1)
    first = colours[np.argmax(distance > MIN_CONTRAST)]  # the first of 16 that is far enough; nearly always one is
    second = np.clip(first + rng.uniform(-70, 70, 3), 0, 255)
    pattern = _texture(rng, *coverage.shape)[..., None]
    texture = first.astype(np.float32) + (second - first).astype(np.float32) * pattern
    if rng.random() < 0.4:  # a darker or lighter rim
        kernel = np.ones((3, 3), dtype=np.uint8)
        rim = coverage - cv2.erode(coverage, kernel, iterations=int(rng.integers(1, 3)))
        texture += rim[..., None] * np.float32(rng.choice([-80.0, 80.0]))
    canvas += coverage[..., None] * (texture.clip(0, 255) - canvas)


def _blend(canvas: Array, coverage: Array, colour: Array) -> None:
    """Mix a colour [3] into the canvas where the coverage [H, W] is above 0, mostly a small part of it."""
    x1, y1, x2, y2 = _tight_box(coverage > 0)
    part = canvas[y1:y2, x1:x2]
    part += coverage[y1:y2, x1:x2, None] * (colour - part)


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a pattern [H, W] in 0..1: plain, stripes, checks, a gradient, or noise."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    angle = rng.uniform(0, np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = x * cosine + y * sine, y * cosine - x * sine
    period = rng.uniform(5, 14)
    patterns: tuple[Callable[[], Array], ...] = (
        lambda: np.zeros((height, width), dtype=np.float32),
        lambda: (along % period < period / 2).astype(np.float32),
        lambda: ((along % period < period / 2) ^ (across % period < period / 2)).astype(np.float32),
        lambda: np.asarray((along - along.min()) / max(np.ptp(along), 1), dtype=np.float32),
        lambda: _smooth_noise(rng, height, width, int(period)),
    )
    return patterns[rng.integers(len(patterns))]()


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> Array:
    """Return noise [H, W] in 0..1 with bumps of about `cell` px."""
    coarse = rng.random((height // cell + 2, width // cell + 2), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32).clip(0, 1)


def _draw_background(rng: np.random.Generator, height: int, width: int, clutter: int) -> Array:
    """Return a canvas [H, W, 3] in 0..255: two blended textures, and clutter that is no object."""
    first, second, third = rng.uniform(20, 235, (3, 3)).astype(np.float32)
    blend = _smooth_noise(rng, height, width, int(rng.integers(24, 90)))[..., None]
    canvas = np.asarray(first + (second - first) * blend, dtype=np.float32)
    _blend(canvas, np.float32(rng.uniform(0.1, 0.45)) * _texture(rng, height, width), third)
    for _ in range(clutter * rng.integers(2, 7)):
        _draw_blob(rng, canvas)
    for _ in range(clutter * rng.integers(2, 10)):
        _draw_stroke(rng, canvas)
    return canvas


def _draw_blob(rng: np.random.Generator, canvas: Array) -> None:
    """Lay a spot without edges over the canvas: as large as an object, but of no shape."""
    height, width = canvas.shape[:2]
    radii = rng.uniform(0.3, 1.0, 9) * rng.uniform(10, 45)
    outline = (_polygon(9) * radii[:, None]).astype(np.float32)
    spot = _rasterise([outline], rng.uniform((0, 0), (width, height)), (height, width))
    spot = np.asarray(cv2.blur(cv2.blur(spot, BLOB_BLUR), BLOB_BLUR), dtype=np.float32)
    _blend(canvas, spot, rng.uniform(0, 255, 3).astype(np.float32))


def _draw_stroke(rng: np.random.Generator, canvas: Array) -> None:
    """Draw a line with two bends, as thick as the rim of a shape at most."""
    height, width = canvas.shape[:2]
    start = rng.uniform((0, 0), (width, height))
    steps = rng.normal(0, rng.uniform(10, 60), (3, 2))
    points = np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
    line = np.zeros((height, width), dtype=np.uint8)
    scaled = np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.polylines(line, [scaled], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA, SUBPIXEL_BITS)
    _blend(canvas, line.astype(np.float32) / np.float32(255), rng.uniform(0, 255, 3).astype(np.float32))


def _photograph(rng: np.random.Generator, canvas: Array) -> RGBImage:
    """Return the canvas as a camera gives it: a little out of focus at times, with grain, too dark or too bright."""
    if rng.random() < 0.4:
        canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 0.9)), dtype=np.float32)
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 9))
    exposed = (canvas - 128) * np.float32(rng.uniform(0.75, 1.1)) + np.float32(128 + rng.uniform(-20, 20))
    return np.asarray((exposed + grain).clip(0, 255), dtype=np.uint8)
