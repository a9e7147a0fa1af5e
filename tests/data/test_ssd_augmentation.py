"""The fused recipe against a second implementation that takes the steps of the Caffe code one by one."""

import colorsys
import math
import pickle
import random
from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest
from image_sets import smooth

from onestage.data.augmentation import (
    OPENCV_CODES,
    Distortion,
    SSDAugmentation,
    SSDPhotometricDistort,
    View,
    locate_visible,
)
from onestage.data.crops import ScaleJitter, SSDMinIoUCrop, SSDZoomOut, Window
from onestage.data.resize import MEAN_RGB, Stretch
from onestage.data.transforms import SeededTransform

SIDE = 96
NO_DISTORTION = SSDPhotometricDistort(p=0.0)
BOXES = [[5.0, 5.0, 60.0, 80.0], [50.0, 40.0, 190.0, 140.0], [150.0, 10.0, 170.0, 30.0], [0.0, 100.0, 40.0, 150.0]]


# The reference: draws one number after another, and makes every image in between


def reference_colours(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """DataTransformer::DistortImage, in floating point; hue on a closed circle of 360 degrees."""
    order = rng.random()
    brightness = reference_change(rng, -32, 32, 0)
    contrast = reference_change(rng, 0.5, 1.5, 1)
    saturation = reference_change(rng, 0.5, 1.5, 1)
    hue = reference_change(rng, -18, 18, 0)
    image = (image + brightness).clip(0, 255)
    if order < 0.5:
        image = (image * contrast).clip(0, 255)
    if saturation != 1 or hue != 0:
        image = np.array([[reference_hsv(pixel, saturation, hue) for pixel in row] for row in image.tolist()])
    return image if order < 0.5 else (image * contrast).clip(0, 255)


def reference_change(rng: np.random.Generator, low: float, high: float, nothing: float) -> float:
    chance, value = rng.random(), rng.random()
    return low + value * (high - low) if chance < 0.5 else nothing


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


def reference_recipe(
    rng: np.random.Generator, image: np.ndarray, boxes: list, with_colours: bool
) -> tuple[np.ndarray, list[int], list, bool]:
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
    is_mirrored, interpolation = rng.random() < 0.5, list(OPENCV_CODES.values())[rng.integers(5)]
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


def test_mean_colour_is_not_distorted() -> None:
    recipe = SSDAugmentation(SIDE)
    view = View(Window(-100, -100, 300, 300), False, "linear", Distortion(20.0, 1.2, 0.7, 9.0, True))
    result = recipe.apply(smooth(100, 100), view=view)
    assert np.unique(result[:30], axis=0).tolist() == [[list(MEAN_RGB)] * SIDE]
    # a window that shows nothing of the image
    result = recipe.apply(smooth(100, 100), view=view._replace(window=Window(-50, 0, 40, 40)))
    assert np.unique(result.reshape(-1, 3), axis=0).tolist() == [list(MEAN_RGB)]


def test_boxes_lie_where_the_pixels_are() -> None:
    image = np.zeros((150, 200, 3), dtype=np.uint8)
    image[40:100, 70:130] = 255
    recipe = SSDAugmentation(SIDE, distort=NO_DISTORTION, interpolations=("nearest",), zoom_out=SSDZoomOut(p=1.0))
    num_checked = 0
    for seed in range(80):
        result, rows, boxes = run(recipe, image, [[70, 40, 130, 100]], seed)
        if rows:
            y, x = np.nonzero(result[..., 0] == 255)
            pixels = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert boxes[0] == pytest.approx(np.array(pixels), abs=1.001)
            num_checked += 1
    assert num_checked > 55


def test_window_by_hand() -> None:
    # an image 200 wide, 100 high, at (100, 50) of a canvas of 400 x 200: it fills x 24..72 and y 24..72 of 96
    assert locate_visible(Window(-100, -50, 400, 200), (100, 200), 96) == ((0, 0, 200, 100), (24, 24, 48, 48))
    # its right half, cut from x 100 on and beyond its right border by as much again: the left half of the result
    assert locate_visible(Window(100, 0, 200, 100), (100, 200), 96) == ((100, 0, 100, 100), (0, 0, 48, 96))
    assert locate_visible(Window(200, 0, 10, 100), (100, 200), 96) is None
    # less than half a pixel of the result is rounded up to one
    assert locate_visible(Window(199, 0, 400, 100), (100, 200), 96) == ((199, 0, 1, 100), (0, 0, 1, 96))


def test_parts_can_be_left_out_and_everything_at_once() -> None:
    image = smooth(150, 200)
    nothing = SSDAugmentation(
        SIDE,
        distort=NO_DISTORTION,
        zoom_out=SSDZoomOut(p=0.0),
        crop=SSDMinIoUCrop(p=0.0),
        mirror_p=0.0,
        interpolations=("area",),
    )
    never = SSDAugmentation(SIDE, p=0.0)
    for seed in range(10):
        found, rows, boxes = run(nothing, image, BOXES, seed)
        assert np.array_equal(found, cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        assert rows == [0, 1, 2, 3]
        assert boxes == pytest.approx(np.array(BOXES) * ([SIDE / 200, SIDE / 150] * 2))
        assert np.array_equal(run(never, image, BOXES, seed)[0], cv2.resize(image, (SIDE, SIDE)))


def test_chances_of_zoom_out_mirror_and_interpolations() -> None:
    recipe = SSDAugmentation(SIDE, crop=SSDMinIoUCrop(p=0.0))
    rng = np.random.default_rng(0)
    views = [recipe.draw(rng, (150, 200), np.zeros((0, 4))) for _ in range(4000)]
    assert np.mean([view.is_mirrored for view in views]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([view.window.width > 200 for view in views]) == pytest.approx(0.5, abs=0.03)
    counts = Counter(view.interpolation for view in views)
    assert set(counts) == set(OPENCV_CODES)
    assert min(counts.values()) / 4000 > 0.175  # 0.2 expected, 4 sigma


# Through the adapter


def test_alone_and_among_others_the_recipe_gives_the_same() -> None:
    image = smooth(150, 200)
    boxes = np.array(BOXES, np.float32)
    alone = SeededTransform([SSDAugmentation(SIDE)], Stretch(SIDE))
    among = SeededTransform([SSDAugmentation(SIDE), A.NoOp()], Stretch(SIDE))
    for index in range(50):
        a, b = alone(image, boxes, (3, 1, index)), among(image, boxes, (3, 1, index))
        assert np.array_equal(a.image, b.image)
        assert a.rows.tolist() == b.rows.tolist()
        assert a.boxes == pytest.approx(b.boxes, abs=1e-3)


def test_recipe_of_another_size_is_stretched() -> None:
    result = SeededTransform([SSDAugmentation(40)], Stretch(SIDE))(
        smooth(30, 30), np.zeros((0, 4), np.float32), (0, 0, 0)
    )
    assert result.image.shape == (SIDE, SIDE, 3)


def test_recipe_can_be_pickled_and_given_parts() -> None:
    recipe = SSDAugmentation(SIDE, crop=SSDMinIoUCrop(scale=(0.6, 1.0)), mirror_p=0.1)
    copy = pickle.loads(pickle.dumps(recipe))
    assert np.array_equal(run(copy, smooth(50, 60), [], 3)[0], run(recipe, smooth(50, 60), [], 3)[0])
    assert copy.crop.scale == (0.6, 1.0)


# Many draws of each transform

HARD_BOXES = {
    "on the border": [[0, 0, 90, 70], [0, 0, 5, 5], [85, 65, 90, 70], [0, 30, 90, 31]],
    "one pixel": [[0, 0, 1, 1], [89, 69, 90, 70], [40, 40, 41, 41], [10, 0, 11, 70]],
    "many": [[x, y, x + 8, y + 9] for x in range(0, 80, 27) for y in range(0, 60, 20)],
    "none": [],
}
WINDOWED = {
    "zoom-out": SSDZoomOut(p=1.0),
    "crop": SSDMinIoUCrop(),
    "scale jitter": ScaleJitter(scale=(0.25, 4.0)),
}


def assert_sane(boxes: np.ndarray, width: float, height: float) -> None:
    assert np.isfinite(boxes).all()
    assert (boxes >= 0).all()
    assert (boxes <= (width, height, width, height)).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 1 - 1e-3).all()  # ordered, and a pixel large


@pytest.mark.parametrize("boxes", HARD_BOXES.values(), ids=HARD_BOXES)
@pytest.mark.parametrize("transform", WINDOWED.values(), ids=WINDOWED)
def test_boxes_stay_sane_over_many_draws(transform: A.DualTransform, boxes: list) -> None:
    relative = np.array(boxes, np.float64).reshape(-1, 4) / (90, 70, 90, 70)
    image = smooth(70, 90)
    transform.set_random_state(np.random.default_rng(0), random.Random(0))
    for number in range(300):
        drawn = transform.get_params_dependent_on_data({"shape": (70, 90, 3)}, {"bboxes": relative})
        window = drawn["window"]
        moved = transform.apply_to_bboxes(relative, window=window, shape=(70, 90, 3))
        assert_sane(moved * ([window.width, window.height] * 2), window.width, window.height)
        if number % 50 == 0:
            assert transform.apply(image, window=window).shape == (window.height, window.width, 3)


@pytest.mark.parametrize("boxes", HARD_BOXES.values(), ids=HARD_BOXES)
def test_boxes_of_the_whole_recipe_stay_sane_over_many_draws(boxes: list) -> None:
    transform = SeededTransform([SSDAugmentation(32)], Stretch(32))
    image, given = smooth(70, 90), np.array(boxes, np.float32).reshape(-1, 4)
    for index in range(300):
        result = transform(image, given, (0, 0, index))
        assert_sane(result.boxes, 32, 32)
        assert (result.image.shape, result.image.dtype) == ((32, 32, 3), np.uint8)
        assert len(set(result.rows.tolist())) == len(result.rows) == len(result.boxes)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_images_pass(size: tuple[int, int]) -> None:
    transform = SeededTransform([SSDAugmentation(32)], Stretch(32))
    whole = np.array([[0, 0, size[1], size[0]]], np.float32)
    for index in range(50):
        result = transform(np.zeros((*size, 3), np.uint8), whole, (0, 0, index))
        assert_sane(result.boxes, 32, 32)
