"""SSD's steps by hand, and the fused recipe against a second implementation of the Caffe code, step by step."""

import colorsys
import math
from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest
from image_sets import noise, smooth

from onestage.data.augmentation import INTERPOLATIONS, SSDAugmentation, SSDPhotometricDistort
from onestage.data.resize import MEAN_RGB, Stretch
from onestage.data.transforms import SeededTransform
from onestage.errors import ConfigError

SIDE = 96
NO_DISTORTION = SSDPhotometricDistort(p=0.0)
NO_BOXES = np.zeros((0, 4), dtype=np.float32)
BOXES = [[5.0, 5.0, 60.0, 80.0], [50.0, 40.0, 190.0, 140.0], [150.0, 10.0, 170.0, 30.0], [0.0, 100.0, 40.0, 150.0]]


# The reference: draws one number after another, and makes every image in between


def reference_colours(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    order = rng.random()
    ranges = ((-32, 32, 0), (0.5, 1.5, 1), (0.5, 1.5, 1), (-18, 18, 0))
    return reference_distort(image, *(reference_change(rng, *limits) for limits in ranges), order < 0.5)


def reference_change(rng: np.random.Generator, low: float, high: float, nothing: float) -> float:
    chance, value = rng.random(), rng.random()
    return low + value * (high - low) if chance < 0.5 else nothing


def reference_distort(image, brightness, contrast, saturation, hue, contrast_first) -> np.ndarray:
    """DataTransformer::DistortImage, in floating point; hue on a closed circle of 360 degrees."""
    image = (image + brightness).clip(0, 255)
    if contrast_first:
        image = (image * contrast).clip(0, 255)
    image = np.array([[reference_hsv(pixel, saturation, hue) for pixel in row] for row in image.tolist()])
    return image if contrast_first else (image * contrast).clip(0, 255)


def reference_hsv(pixel: list[float], saturation: float, hue: float) -> list[float]:
    h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
    return [255 * level for level in colorsys.hsv_to_rgb((h + hue / 360) % 1, min(1.0, s * saturation), v)]


def reference_expand(rng: np.random.Generator, image: np.ndarray, boxes: list) -> tuple[np.ndarray, list]:
    """DataTransformer::ExpandImage: a canvas of 1 to 4 times the sides, filled with the mean."""
    height, width = image.shape[:2]
    ratio, right, down = 1 + 3 * rng.random(), rng.random(), rng.random()
    canvas = np.empty((int(height * ratio), int(width * ratio), 3))
    canvas[:] = MEAN_RGB
    left = math.floor(right * (canvas.shape[1] - width))
    top = math.floor(down * (canvas.shape[0] - height))
    canvas[top : top + height, left : left + width] = image
    return canvas, [[x1 + left, y1 + top, x2 + left, y2 + top] for x1, y1, x2, y2 in boxes]


def reference_patch(rng: np.random.Generator, size: tuple[int, int], boxes: list) -> tuple[int, int, int, int]:
    """GenerateBatchSamples and CropImage: left, top, width, height of the patch."""
    height, width = size
    modes = [None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0]
    for mode in rng.permutation(7) if boxes else []:
        if modes[mode] is None:
            break
        trials = [reference_trial(draws) for draws in rng.random((50, 4)).tolist()]
        relative = [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in boxes]
        good = [patch for patch in trials if max(reference_jaccard(patch, box) for box in relative) >= modes[mode]]
        if good:
            x1, y1, x2, y2 = good[0]
            return int(x1 * width), int(y1 * height), int((x2 - x1) * width), int((y2 - y1) * height)
    return 0, 0, width, height


def reference_trial(draws: list[float]) -> list[float]:
    """SampleBBox: the aspect ratio is drawn from 0.5..2, then clamped, and no side is longer than the image's."""
    scale = 0.3 + 0.7 * draws[0]
    ratio = min(max(0.5 + 1.5 * draws[1], scale**2), 1 / scale**2)
    width, height = min(scale * math.sqrt(ratio), 1.0), min(scale / math.sqrt(ratio), 1.0)
    left, top = draws[2] * (1 - width), draws[3] * (1 - height)
    return [left, top, left + width, top + height]


def reference_jaccard(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width < 0 or height < 0:
        return 0.0
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (total - width * height)


def reference_recipe(rng, image: np.ndarray, boxes: list, with_colours: bool) -> tuple[np.ndarray, list, list, bool]:
    """The result [SIDE, SIDE, 3], the kept rows, their boxes, and whether the image was zoomed out."""
    rng.random()  # p of the whole
    image = image.astype(float)
    if rng.random() < (1.0 if with_colours else 0.0):
        image = reference_colours(rng, image)
    is_zoomed_out = rng.random() < 0.5
    if is_zoomed_out:
        image, boxes = reference_expand(rng, image, boxes)
    rng.random()  # p of the crop
    left, top, width, height = reference_patch(rng, image.shape[:2], boxes)
    image = image[top : top + height, left : left + width]
    kept, rows = [], []
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        if left <= (x1 + x2) / 2 <= left + width and top <= (y1 + y2) / 2 <= top + height:
            x1, x2 = max(x1 - left, 0) * SIDE / width, min(x2 - left, width) * SIDE / width
            y1, y2 = max(y1 - top, 0) * SIDE / height, min(y2 - top, height) * SIDE / height
            kept.append([x1, y1, x2, y2])
            rows.append(row)
    is_mirrored, interpolation = rng.random() < 0.5, INTERPOLATIONS[rng.integers(5)]
    image = cv2.resize(np.rint(image).astype(np.uint8), (SIDE, SIDE), interpolation=interpolation)
    if is_mirrored:
        image = image[:, ::-1]
        kept = [[SIDE - x2, y1, SIDE - x1, y2] for x1, y1, x2, y2 in kept]
    return image, rows, kept, is_zoomed_out


def run(recipe: SSDAugmentation, image: np.ndarray, boxes: list, seed: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    height, width = image.shape[:2]
    relative = np.array([[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in boxes])
    numbered = np.column_stack([relative.reshape(-1, 4), np.arange(len(boxes))])
    view = recipe.draw(np.random.default_rng(seed), (height, width), numbered[:, :4])
    moved = recipe.apply_to_bboxes(numbered, view=view, shape=image.shape)
    return recipe.apply(image, view=view), moved[:, 4].astype(int).tolist(), moved[:, :4] * recipe.image_size


def test_distort_of_a_float_image_says_what_to_leave_out() -> None:
    with pytest.raises(ConfigError, match=r"SSDPhotometricDistort: .* uint8 RGB .*, got float32.*\n.*Normalize"):
        A.Compose([A.Normalize(), SSDPhotometricDistort()])(image=noise(8, 8))


def test_geometry_with_fixed_draws_is_that_of_the_caffe_code() -> None:
    image = smooth(150, 200)
    recipe = SSDAugmentation(SIDE, distort=NO_DISTORTION)
    seen = Counter()
    for seed in range(150):
        expected, rows, boxes, is_zoomed_out = reference_recipe(np.random.default_rng(seed), image, BOXES, False)
        found, found_rows, found_boxes = run(recipe, image, BOXES, seed)
        assert found_rows == rows
        # the image's place on the canvas is rounded to whole pixels of the result, and the boxes follow the pixels
        assert found_boxes == pytest.approx(np.array(boxes).reshape(-1, 4), abs=0.501 if is_zoomed_out else 1e-6)
        difference = np.abs(found.astype(int) - expected)
        assert difference.mean() < 4 if is_zoomed_out else np.array_equal(found, expected)
        seen[is_zoomed_out, len(rows)] += 1
    assert len(seen) >= 8  # with and without zoom-out, 0 to 4 objects left


def test_colours_with_fixed_draws_are_those_of_the_caffe_code() -> None:
    image = smooth(60, 80)
    boxes = [[5.0, 5.0, 40.0, 50.0], [30.0, 20.0, 80.0, 60.0]]
    first = SSDAugmentation(SIDE, distort_first=True)
    whichever = SSDAugmentation(SIDE)
    small = SSDAugmentation(SIDE // 4)  # most images are shrunk, so distorted after the resize
    small_first = SSDAugmentation(SIDE // 4, distort_first=True)
    for seed in range(12):
        expected, _, _, is_zoomed_out = reference_recipe(np.random.default_rng(seed), image, boxes, True)
        limit = 8 if is_zoomed_out else 2  # OpenCV's 8-bit hue and saturation; the place on the canvas
        for recipe in (first, whichever):
            assert np.abs(run(recipe, image, boxes, seed)[0].astype(int) - expected).mean() < limit
        after, before = run(small, image, boxes, seed)[0], run(small_first, image, boxes, seed)[0]
        assert np.abs(after.astype(int) - before).mean() < 4  # what the order of the two is worth


def test_recipe_of_another_size_is_stretched() -> None:
    result = SeededTransform([SSDAugmentation(40)], Stretch(SIDE))(smooth(30, 30), NO_BOXES, (0, 0, 0))
    assert result.image.shape == (SIDE, SIDE, 3)


EDGES = [[0, 0, 90, 70], [0, 0, 5, 5], [85, 65, 90, 70], [0, 30, 90, 31]]
PIXELS = [[0, 0, 1, 1], [89, 69, 90, 70], [40, 40, 41, 41], [10, 0, 11, 70]]
MANY = [[x, y, x + 8, y + 9] for x in range(0, 80, 27) for y in range(0, 60, 20)]
WHOLE = [((height, width), [[0, 0, width, height]]) for height, width in [(1, 1), (1, 300), (300, 1), (2, 3)]]


@pytest.mark.parametrize(("size", "boxes"), [*(((70, 90), boxes) for boxes in (EDGES, PIXELS, MANY, [])), *WHOLE])
def test_boxes_of_the_whole_recipe_stay_sane_over_many_draws(size, boxes) -> None:
    transform, image = SeededTransform([SSDAugmentation(32)], Stretch(32)), smooth(*size)
    given = np.array(boxes, np.float32).reshape(-1, 4)
    for index in range(100):
        result = transform(image, given, (0, 0, index))
        assert ((result.boxes >= 0) & (result.boxes <= 32)).all()
        assert (result.boxes[:, 2:] - result.boxes[:, :2] > 1 - 1e-3).all()  # ordered, and a pixel large
        assert (result.image.shape, result.image.dtype) == ((32, 32, 3), np.uint8)
        assert len(set(result.rows.tolist())) == len(result.rows) == len(result.boxes)
