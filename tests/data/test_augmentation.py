"""SSD's steps by hand, and the fused recipe against a second implementation of the Caffe code, step by step."""

import colorsys
import math
import random
from collections import Counter

import albumentations as A
import cv2
import numpy as np
import pytest
from draws import FixedDraws
from image_sets import noise, smooth

from onestage.data.augmentation import (
    OPENCV_CODES,
    Distortion,
    SSDAugmentation,
    SSDMinIoUCrop,
    SSDPhotometricDistort,
    SSDZoomOut,
    View,
    Window,
    locate_visible,
)
from onestage.data.resize import MEAN_RGB, Stretch
from onestage.data.transforms import ScaleJitter, SeededTransform
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


def reference_distort(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, contrast_first: bool
) -> np.ndarray:
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


# Photometric distortion


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("changes", [(20, 1.4, 0.6, 12), (-32, 0.5, 1.5, -18), (5, 1.2, 1.3, 18), (0, 1, 1, -9)])
def test_distort_agrees_with_the_standard_librarys_hsv(contrast_first: bool, changes: tuple) -> None:
    image = noise(20, 20)
    distorted = SSDPhotometricDistort().apply(image, distortion=Distortion(*changes, contrast_first))
    difference = np.abs(distorted - reference_distort(image.astype(float), *changes, contrast_first))
    # 8-bit hue and saturation have steps of 1.4 degrees and 1/255; a later contrast of 1.4 magnifies the error.
    assert difference.mean() < 1.5
    assert difference.max() < 12


def test_distort_fixed_draws_give_the_drawn_changes() -> None:
    # order, then chance and value of brightness, contrast, saturation, hue; a chance below 0.5 applies it
    drawn = SSDPhotometricDistort().draw(FixedDraws(0.7, 0.4, 0.75, 0.6, 0.9, 0.49, 0.25, 0.5, 0.9))
    # brightness -32 + 0.75 * 64, saturation 0.5 + 0.25 * 1
    assert drawn == Distortion(16.0, 1.0, 0.75, 0.0, False)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (Distortion(16.0, 1.0, 1.0, 0.0, True), [16, 117, 255]),
        (Distortion(0.0, 0.75, 1.0, 0.0, True), [0, 76, 188]),  # 75.75, 187.5 to even
    ],
)
def test_distort_brightness_and_contrast_saturate_and_round(drawn: Distortion, expected: list) -> None:
    image = np.array([[[0, 101, 250]]], dtype=np.uint8)
    assert SSDPhotometricDistort().apply(image, distortion=drawn).tolist() == [[expected]]


def test_distort_applies_each_change_half_the_time() -> None:
    rng = np.random.default_rng(0)
    drawn = [SSDPhotometricDistort().draw(rng) for _ in range(2000)]
    for name, nothing in {"brightness": 0, "contrast": 1, "saturation": 1, "hue": 0}.items():
        applied = [getattr(changes, name) for changes in drawn if getattr(changes, name) != nothing]
        assert len(applied) / 2000 == pytest.approx(0.5, abs=0.05)  # 4.5 sigma
        assert np.mean(applied) == pytest.approx(nothing, abs={"brightness": 2.5, "hue": 1.5}.get(name, 0.04))
    assert np.mean([changes.contrast_first for changes in drawn]) == pytest.approx(0.5, abs=0.05)


def test_distort_of_a_float_image_says_what_to_leave_out() -> None:
    with pytest.raises(ConfigError, match=r"SSDPhotometricDistort: .* uint8 RGB .*, got float32.*\n.*Normalize"):
        A.Compose([A.Normalize(), SSDPhotometricDistort()])(image=noise(8, 8))


# Windows: zoom-out, crop, scale jitter


def run_alone(transform: A.DualTransform, image: np.ndarray, boxes: list) -> tuple[np.ndarray, np.ndarray, list[int]]:
    params = A.BboxParams(format="pascal_voc", label_fields=["rows"])
    result = A.Compose([transform], bbox_params=params)(
        image=image, bboxes=np.array(boxes).reshape(-1, 4), rows=[*range(len(boxes))]
    )
    return result["image"], np.array(result["bboxes"]).reshape(-1, 4), [int(row) for row in result["rows"]]


def test_zoom_out_fixed_draws_give_hand_computed_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    zoom_out, image = SSDZoomOut(p=1.0), noise(100, 200)
    # ratio 1 + 3 / 3 = 2; half of 200 right, a quarter of 100 down
    window = zoom_out.draw(FixedDraws(1 / 3, 0.5, 0.25), (100, 200), NO_BOXES)
    monkeypatch.setattr(zoom_out, "draw", lambda *_: window)
    canvas, boxes, rows = run_alone(zoom_out, image, [[10, 20, 30, 60]])
    assert canvas.shape == (200, 400, 3)
    assert np.array_equal(canvas[25:125, 100:300], image)
    assert boxes == pytest.approx(np.array([[110, 45, 130, 85]]), abs=1e-4)
    assert rows == [0]
    is_border = np.ones(canvas.shape[:2], dtype=bool)
    is_border[25:125, 100:300] = False
    assert np.unique(canvas[is_border], axis=0).tolist() == [list(MEAN_RGB)]


@pytest.mark.parametrize(
    ("draws", "shape", "given", "box"),
    [
        # 0.5 + 0 * 1.5 = a half: a frame of 200 x 400, the image half of the 200 free columns and 1/4 of the rows in
        ((0.0, 0.5, 0.25), (200, 400), [[10, 20, 30, 60]], [110, 45, 130, 85]),
        # 0.5 + 1 * 1.5 = twice: 50 x 100 of the image from column 0.5 * 100 and row 0; the box is cut at column 50
        ((1.0, 0.5, 0.0), (50, 100), [[40, 10, 80, 20], [0, 0, 20, 20], [20, 10, 60, 20]], [0, 10, 30, 20]),
    ],
)
def test_jitter_fixed_draws_give_hand_computed_frame(
    draws: tuple, shape: tuple, given: list, box: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    jitter = ScaleJitter(scale=(0.5, 2.0))
    window = jitter.draw(FixedDraws(*draws), (100, 200), NO_BOXES)
    monkeypatch.setattr(jitter, "draw", lambda *_: window)
    frame, boxes, rows = run_alone(jitter, noise(100, 200), given)
    assert frame.shape == (*shape, 3)
    assert boxes == pytest.approx(np.array([box]), abs=1e-4)
    assert rows == [0]  # of the others the centre is outside


def test_sizes_of_zoom_out_and_jitter_are_uniform() -> None:
    rng = np.random.default_rng(0)
    windows = [SSDZoomOut().draw(rng, (100, 100), NO_BOXES) for _ in range(1000)]
    sides = [window.width for window in windows]
    assert 100 <= min(sides) <= max(sides) <= 400
    assert np.mean(sides) == pytest.approx(250, abs=11)  # 4 sigma
    assert np.mean([-window.left / (window.width - 99.9) for window in windows]) == pytest.approx(0.49, abs=0.05)
    factors = [100 / ScaleJitter(scale=(0.5, 2.0)).draw(rng, (100, 100), NO_BOXES).height for _ in range(1000)]
    assert 0.49 <= min(factors) <= max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.06)  # 4 sigma


def test_crop_share_of_each_mode_where_all_work() -> None:
    crop, side, modes = SSDMinIoUCrop(min_ious=(0.1, 0.2)), 10_000, Counter()
    for seed in range(2000):
        first = int(np.random.default_rng(seed).permutation(4)[0])  # what the crop is about to draw
        box = [0.2, 0.2, 0.8, 0.8]
        left, top, width, height = crop.draw(np.random.default_rng(seed), (side, side), np.array([box]))
        assert ((left, top, width, height) == (0, 0, side, side)) == (first == 0)
        patch = [left / side, top / side, (left + width) / side, (top + height) / side]
        assert reference_jaccard(patch, box) > (0.0, 0.0999, 0.1999, -1.0)[first]
        modes[first] += 1
    assert [modes[mode] / 2000 for mode in range(4)] == pytest.approx([0.25] * 4, abs=0.04)


def test_crop_of_an_object_too_small_for_any_overlap_is_whole_or_any_patch() -> None:
    rng, box = np.random.default_rng(0), np.array([[0.5, 0.5, 0.501, 0.501]])
    drawn = [SSDMinIoUCrop().draw(rng, (1000, 1000), box) for _ in range(1000)]
    assert np.mean([patch == (0, 0, 1000, 1000) for patch in drawn]) == pytest.approx(0.5, abs=0.06)


def test_crop_patch_sides_stay_in_range() -> None:
    rng, any_patch = np.random.default_rng(0), SSDMinIoUCrop(min_ious=(0.0,) * 50, trials=1)
    size, box = 100_000, np.array([[0, 0, 1, 1]])
    patches = np.array([any_patch.draw(rng, (size, size), box) for _ in range(5000)]) / size
    patches = patches[patches[:, 2:].min(axis=1) < 1]  # without whole images
    width, height = patches[:, 2], patches[:, 3]
    assert patches.min() >= 0
    assert (patches[:, :2] + patches[:, 2:]).max() <= 1
    assert 0.499 <= (width / height).min() <= (width / height).max() <= 2.001
    scale = np.sqrt(width * height)
    assert 0.299 <= scale.min() <= scale.max() <= 1
    assert scale.mean() == pytest.approx(0.65, abs=0.02)
    # The drawn ratio r, 0.5..2, is clamped to s^2..1 / s^2. So a patch is as wide as the image where r > 1 / s^2, which
    # takes s > 0.707: P = integral over s of (2 - 1 / s^2) / 1.5 / 0.7 = 0.163; and as high where r < s^2: P = 0.066.
    assert np.mean(width > 1 - 1e-4) == pytest.approx(0.163, abs=0.02)
    assert np.mean(height > 1 - 1e-4) == pytest.approx(0.066, abs=0.014)


def test_crop_of_an_image_without_objects_is_the_image() -> None:
    image = noise(30, 40)
    for _ in range(20):
        patch, boxes, _ = run_alone(SSDMinIoUCrop(), image, [])
        assert np.array_equal(patch, image)
        assert boxes.shape == (0, 4)


def test_crop_drops_objects_whose_centre_is_outside_and_clips_the_rest() -> None:
    crop = SSDMinIoUCrop()
    boxes = np.array([[10, 10, 40, 40], [35, 10, 60, 30], [15, 15, 25, 25], [19.5, 12, 20.4, 30]]) / 100
    moved = crop.apply_to_bboxes(boxes, window=Window(20, 0, 30, 100), shape=(100, 100, 3))
    # the window is x 20..50: centres at 25, 47.5, 20 (on the edge: inside) and 19.95 (outside)
    expected = np.array([[0, 10, 20, 40], [15, 10, 30, 30], [0, 15, 5, 25]])
    assert moved * (30, 100, 30, 100) == pytest.approx(expected)


# The whole recipe


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


def test_recipe_of_another_size_is_stretched() -> None:
    result = SeededTransform([SSDAugmentation(40)], Stretch(SIDE))(smooth(30, 30), NO_BOXES, (0, 0, 0))
    assert result.image.shape == (SIDE, SIDE, 3)


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
    for number in range(100):
        drawn = transform.get_params_dependent_on_data({"shape": (70, 90, 3)}, {"bboxes": relative})
        window = drawn["window"]
        moved = transform.apply_to_bboxes(relative, window=window, shape=(70, 90, 3))
        assert_sane(moved * ([window.width, window.height] * 2), window.width, window.height)
        if number % 50 == 0:
            assert transform.apply(image, window=window).shape == (window.height, window.width, 3)


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        *(((70, 90), boxes) for boxes in HARD_BOXES.values()),
        *((size, []) for size in [(1, 1), (1, 300), (300, 1), (2, 3)]),
    ],
)
def test_boxes_of_the_whole_recipe_stay_sane_over_many_draws(size: tuple[int, int], boxes: list) -> None:
    transform = SeededTransform([SSDAugmentation(32)], Stretch(32))
    image = smooth(*size)
    given = np.array(boxes or [[0, 0, size[1], size[0]]][: size != (70, 90)], np.float32).reshape(-1, 4)
    for index in range(100):
        result = transform(image, given, (0, 0, index))
        assert_sane(result.boxes, 32, 32)
        assert (result.image.shape, result.image.dtype) == ((32, 32, 3), np.uint8)
        assert len(set(result.rows.tolist())) == len(result.rows) == len(result.boxes)


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SSDZoomOut(max_ratio=0.5), "SSDZoomOut: max_ratio must be >= 1; 1 keeps the image, got 0.5"),
        (lambda: SSDZoomOut(max_ratio=float("nan")), "max_ratio must be .*, got nan"),
        (lambda: SSDZoomOut(fill=(0, 0, 300)), r"fill must be .*, got \(0, 0, 300\)"),
        (lambda: SSDMinIoUCrop(min_ious=(0.5, 1.5)), r"min_ious must be each in \[0, 1\]"),
        (lambda: SSDMinIoUCrop(scale=(0.0, 1.0)), "SSDMinIoUCrop: scale must be"),
        (lambda: SSDMinIoUCrop(aspect_ratio=(1.5, 2.0)), "aspect_ratio must be"),
        (lambda: SSDMinIoUCrop(trials=0), "trials must be >= 1, got 0"),
        (lambda: ScaleJitter(scale=(0.1, 1.0)), r"scale .* must be \[low, high\] .*, got \(0.1, 1.0\)"),
        (lambda: ScaleJitter(scale=(1.5, 0.5)), r"ScaleJitter: scale \(data.scale_jitter\) must be"),
        (lambda: SSDPhotometricDistort(brightness=-1), r"brightness must be in \[0, 255\], got -1"),
        (lambda: SSDPhotometricDistort(contrast=(1.5, 0.5)), "contrast must be"),
        (lambda: SSDPhotometricDistort(hue=200), r"hue must be in \[0, 180\], got 200"),
        (lambda: SSDAugmentation(0), "SSDAugmentation: image_size must be >= 1, got 0"),
        (lambda: SSDAugmentation(32, mirror_p=1.5), r"mirror_p must be in \[0, 1\], got 1.5"),
        (lambda: SSDAugmentation(32, p=-1), r"SSDAugmentation: p must be in \[0, 1\], got -1"),
        (lambda: SSDAugmentation(32, interpolations=("bilinear",)), "interpolations must be at least one of linear"),
        (lambda: SSDAugmentation(32, interpolations=()), "interpolations must be at least one of"),
    ],
)
def test_settings_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
