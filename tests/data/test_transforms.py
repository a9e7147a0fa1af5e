import colorsys
import math
import pickle
import random
from collections import Counter

import albumentations as A
import numpy as np
import pytest

from onestage.data.augmentation import SSDPhotometricDistort
from onestage.data.crops import IMAGENET_MEAN_RGB, ScaleJitter, SSDMinIoUCrop, SSDZoomOut, Window
from onestage.data.resize import Stretch
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError

NO_BOXES = np.zeros((0, 4), dtype=np.float32)


class FixedDraws:
    """Stands in for numpy's generator: hands out the given numbers."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self, size: int) -> np.ndarray:
        taken, self.draws = self.draws[:size], self.draws[size:]
        return np.array(taken)


def compose(*transforms: A.BasicTransform, seed: int = 0) -> A.Compose:
    params = A.BboxParams(format="pascal_voc", label_fields=["rows"])
    pipeline = A.Compose([*transforms, A.NoOp()], bbox_params=params)  # boxes need a transform that takes boxes
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline


def run(pipeline: A.Compose, image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    result = pipeline(image=image, bboxes=boxes, rows=np.arange(len(boxes)))
    return (
        result["image"],
        np.asarray(result["bboxes"], np.float32).reshape(-1, 4),
        np.asarray(result["rows"]).reshape(-1).astype(int),
    )


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- photometric distortion --------------------------------------------------------------------------------------------


def reference_distort(
    rgb: tuple[int, ...], brightness: float, contrast: float, saturation: float, hue: float, contrast_first: bool
) -> list[float]:
    """One pixel in floating point, channel by channel, with the standard library's HSV."""

    def saturate(values: list[float]) -> list[float]:
        return [min(max(value, 0.0), 255.0) for value in values]

    values = saturate([value + brightness for value in rgb])
    if contrast_first:
        values = saturate([value * contrast for value in values])
    h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in values))
    values = [value * 255 for value in colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v)]
    return values if contrast_first else saturate([value * contrast for value in values])


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"),
    [(20, 1.4, 0.6, 12), (-32, 0.5, 1.5, -18), (5, 1.2, 1.3, 18), (0, 1, 1, -9), (0, 1, 0.5, 0)],
)
def test_distort_agrees_with_the_standard_librarys_hsv(
    contrast_first: bool, brightness: float, contrast: float, saturation: float, hue: float
) -> None:
    image = random_image(20, 20)
    distorted = SSDPhotometricDistort().apply(
        image,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        contrast_first=contrast_first,
        shape=image.shape,
    )
    expected = [
        [
            reference_distort(tuple(map(int, pixel)), brightness, contrast, saturation, hue, contrast_first)
            for pixel in row
        ]
        for row in image
    ]
    difference = np.abs(distorted - np.array(expected))
    # 8-bit hue and saturation have steps of 1.4 degrees and 1/255; a later contrast of 1.4 magnifies the error.
    assert difference.mean() < 1.5
    assert difference.max() < 12


def test_distort_fixed_draws_give_the_drawn_changes() -> None:
    transform = SSDPhotometricDistort()
    # order, then chance and value of brightness, contrast, saturation, hue; a chance below 0.5 applies it
    transform.random_generator = FixedDraws(0.7, 0.4, 0.75, 0.6, 0.9, 0.49, 0.25, 0.5, 0.9)
    assert transform.get_params() == {
        "brightness": 16.0,  # -32 + 0.75 * 64
        "contrast": 1.0,
        "saturation": 0.75,  # 0.5 + 0.25 * 1
        "hue": 0.0,
        "contrast_first": False,
    }


def test_distort_brightness_and_contrast_saturate_and_round() -> None:
    image = np.array([[[0, 101, 250]]], dtype=np.uint8)
    settings = {"saturation": 1.0, "hue": 0.0, "contrast_first": True}
    brighter = SSDPhotometricDistort().apply(image, brightness=16.0, contrast=1.0, **settings)
    assert brighter.tolist() == [[[16, 117, 255]]]
    flatter = SSDPhotometricDistort().apply(image, brightness=0.0, contrast=0.75, **settings)
    assert flatter.tolist() == [[[0, 76, 188]]]  # 75.75, 187.5 to even


def test_distort_gray_pixels_have_no_hue_to_turn() -> None:
    image = np.full((2, 2, 3), 77, dtype=np.uint8)
    distorted = SSDPhotometricDistort().apply(
        image, brightness=0.0, contrast=1.0, saturation=1.5, hue=18.0, contrast_first=True
    )
    assert np.array_equal(distorted, image)


def test_distort_applies_each_change_half_the_time() -> None:
    transform = SSDPhotometricDistort()
    transform.random_generator = np.random.default_rng(0)
    drawn = [transform.get_params() for _ in range(2000)]
    for name, nothing in {"brightness": 0, "contrast": 1, "saturation": 1, "hue": 0}.items():
        applied = [params[name] for params in drawn if params[name] != nothing]
        assert len(applied) / 2000 == pytest.approx(0.5, abs=0.05)  # 4.5 sigma
        assert np.mean(applied) == pytest.approx(nothing, abs={"brightness": 2.5, "hue": 1.5}.get(name, 0.04))
    assert np.mean([params["contrast_first"] for params in drawn]) == pytest.approx(0.5, abs=0.05)


def test_distort_leaves_the_given_image_alone() -> None:
    image = random_image(10, 10)
    before = image.copy()
    compose(SSDPhotometricDistort())(image=image, bboxes=NO_BOXES, rows=np.arange(0))
    assert np.array_equal(image, before)


def test_distort_of_a_float_image_says_what_to_leave_out() -> None:
    pipeline = compose(A.Normalize(), SSDPhotometricDistort())
    with pytest.raises(ConfigError, match=r"uint8 RGB.*\n.*Normalize"):
        pipeline(image=random_image(8, 8), bboxes=NO_BOXES, rows=np.arange(0))


# -- zoom-out ----------------------------------------------------------------------------------------------------------


def test_zoom_out_fixed_draws_give_hand_computed_canvas() -> None:
    zoom_out = SSDZoomOut(p=1.0)
    pipeline = compose(zoom_out)
    zoom_out.random_generator = FixedDraws(
        1 / 3, 0.5, 0.25
    )  # ratio 1 + 3 / 3 = 2; half of 200 right, a quarter of 100 down
    image = random_image(100, 200)
    canvas, boxes, rows = run(pipeline, image, np.array([[10, 20, 30, 60]], np.float32))
    assert canvas.shape == (200, 400, 3)
    assert np.array_equal(canvas[25:125, 100:300], image)
    assert boxes == pytest.approx(np.array([[110, 45, 130, 85]]), abs=1e-4)
    assert rows.tolist() == [0]
    is_border = np.ones(canvas.shape[:2], dtype=bool)
    is_border[25:125, 100:300] = False
    assert np.unique(canvas[is_border], axis=0).tolist() == [list(IMAGENET_MEAN_RGB)]


def test_zoom_out_ratio_and_place_are_uniform() -> None:
    pipeline = compose(SSDZoomOut(p=0.5))
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    sides, places = [], []
    for _ in range(1000):
        canvas, boxes, _ = run(pipeline, image, np.array([[0, 0, 100, 100]], np.float32))
        if canvas.shape != image.shape:
            sides.append(canvas.shape[0])
            places.append(boxes[0, 0] / (canvas.shape[1] - 100))
    assert len(sides) / 1000 == pytest.approx(0.5, abs=0.06)
    assert min(sides) >= 100
    assert max(sides) <= 400
    assert np.mean(sides) == pytest.approx(250, abs=15)
    assert np.mean(places) == pytest.approx(0.49, abs=0.05)  # rounding down takes a little


# -- min-IoU crop ------------------------------------------------------------------------------------------------------


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def sample_patch(draws: list[float]) -> list[float]:
    """The Caffe code's sampler, one patch at a time, sides relative to the image."""
    scale = 0.3 + draws[0] * 0.7
    ratio = min(max(0.5 + draws[1] * 1.5, scale**2), 1 / scale**2)
    width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
    left, top = draws[2] * (1 - width), draws[3] * (1 - height)
    return [left, top, left + width, top + height]


def reference_crop(
    rng: np.random.Generator, size: tuple[int, int], boxes: list[list[float]]
) -> tuple[tuple[int, int, int, int], list[tuple[int, list[float]]]]:
    """Window (left, top, width, height) and kept (row, box), in plain loops. boxes: xyxy in pixels."""
    height, width = size
    relative = [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in boxes]
    modes: list[float | None] = [None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0]
    window = (0, 0, width, height)
    for mode in rng.permutation(7) if boxes else []:
        min_iou = modes[mode]
        if min_iou is None:
            return window, list(enumerate(boxes))
        draws = rng.random((50, 4)).tolist()
        patch = next((p for p in map(sample_patch, draws) if max(overlap(p, b) for b in relative) >= min_iou), None)
        if patch is not None:
            x1, y1, x2, y2 = patch
            window = (int(x1 * width), int(y1 * height), int((x2 - x1) * width), int((y2 - y1) * height))
            break
    left, top, w, h = window
    kept = []
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        if left <= (x1 + x2) / 2 <= left + w and top <= (y1 + y2) / 2 <= top + h:
            clipped = [max(x1 - left, 0), max(y1 - top, 0), min(x2 - left, w), min(y2 - top, h)]
            if clipped[2] - clipped[0] >= 1 and clipped[3] - clipped[1] >= 1:
                kept.append((row, clipped))
    return window, kept


def test_crop_agrees_with_a_loop_over_modes_and_trials() -> None:
    image = random_image(150, 200)
    boxes = [[5.0, 5.0, 60.0, 80.0], [50.0, 40.0, 190.0, 140.0], [150.0, 10.0, 170.0, 30.0]]
    num_cropped = 0
    for seed in range(300):
        crop = SSDMinIoUCrop()
        pipeline = compose(crop)
        crop.random_generator = np.random.default_rng(seed)
        patch, new_boxes, rows = run(pipeline, image, np.array(boxes, np.float32))
        (left, top, width, height), kept = reference_crop(np.random.default_rng(seed), (150, 200), boxes)
        assert np.array_equal(patch, image[top : top + height, left : left + width])
        assert rows.tolist() == [row for row, _ in kept]
        assert new_boxes == pytest.approx(np.array([box for _, box in kept]).reshape(-1, 4), abs=1e-3)
        num_cropped += patch.shape != image.shape
    assert 150 < num_cropped < 290  # neither path was tested alone


def test_crop_chooses_like_the_caffe_code_which_tries_every_mode_first() -> None:
    boxes = np.array([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]])
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(400):
        draws = [[sample_patch(d) for d in rng.random((50, 4)).tolist()] for _ in range(5)]
        found = [
            any(max(overlap(patch, box) for box in boxes.tolist()) >= min_iou for patch in patches)
            for patches, min_iou in zip(draws, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True)
        ]
        expected.append(1 / (2 + sum(found)))  # the whole image is one of those that work
    crop = SSDMinIoUCrop()
    crop.random_generator = np.random.default_rng(1)
    drawn = [crop._draw_patch(crop.random_generator, boxes) for _ in range(3000)]
    share = np.mean([patch is None for patch in drawn])
    assert share == pytest.approx(np.mean(expected), abs=0.03)  # 4 sigma


def test_crop_share_of_each_mode_where_all_work() -> None:
    crop = SSDMinIoUCrop(min_ious=(0.1, 0.2))
    crop.random_generator = np.random.default_rng(0)
    modes = Counter()
    for _ in range(2000):
        state = crop.random_generator.bit_generator.state
        first = crop.random_generator.permutation(4)[0]  # what the crop is about to draw
        crop.random_generator.bit_generator.state = state
        patch = crop._draw_patch(crop.random_generator, np.array([[0.2, 0.2, 0.8, 0.8]]))
        assert (patch is None) == (first == 0)
        modes[int(first)] += 1
        if patch is not None:
            assert overlap(patch.tolist(), [0.2, 0.2, 0.8, 0.8]) >= (0.0, 0.1, 0.2, 0.0)[first]
    assert [modes[mode] / 2000 for mode in range(4)] == pytest.approx([0.25] * 4, abs=0.04)


def test_crop_of_an_object_too_small_for_any_overlap_is_whole_or_any_patch() -> None:
    crop = SSDMinIoUCrop()
    crop.random_generator = np.random.default_rng(0)
    drawn = [crop._draw_patch(crop.random_generator, np.array([[0.5, 0.5, 0.501, 0.501]])) for _ in range(1000)]
    assert np.mean([patch is None for patch in drawn]) == pytest.approx(0.5, abs=0.06)


def test_crop_patch_sides_stay_in_range() -> None:
    crop = SSDMinIoUCrop()
    crop.random_generator = np.random.default_rng(0)
    patches = np.concatenate([crop._draw_candidates(crop.random_generator) for _ in range(100)])
    width, height = patches[:, 2] - patches[:, 0], patches[:, 3] - patches[:, 1]
    assert patches.min() >= 0
    assert patches.max() <= 1
    assert 0.5 <= (width / height).min() <= (width / height).max() <= 2
    scale = np.sqrt(width * height)
    assert 0.3 <= scale.min() <= scale.max() <= 1
    assert scale.mean() == pytest.approx(0.65, abs=0.02)
    # The drawn ratio r, 0.5..2, is clamped to s^2..1 / s^2. So a patch is as wide as the image where r > 1 / s^2, which
    # takes s > 0.707: P = integral over s of (2 - 1 / s^2) / 1.5 / 0.7 = 0.163; and as high where r < s^2: P = 0.066.
    assert np.mean(width > 1 - 1e-9) == pytest.approx(0.163, abs=0.02)
    assert np.mean(height > 1 - 1e-9) == pytest.approx(0.066, abs=0.014)


def test_crop_of_an_image_without_objects_is_the_image() -> None:
    image = random_image(30, 40)
    for seed in range(20):
        patch, boxes, _ = run(compose(SSDMinIoUCrop(), seed=seed), image, NO_BOXES)
        assert np.array_equal(patch, image)
        assert boxes.shape == (0, 4)


def test_crop_drops_objects_whose_centre_is_outside_and_clips_the_rest() -> None:
    crop = SSDMinIoUCrop()
    boxes = np.array([[10, 10, 40, 40], [35, 10, 60, 30], [15, 15, 25, 25], [19.5, 12, 20.4, 30]]) / 100
    moved = crop.apply_to_bboxes(boxes, window=Window(20, 0, 30, 100), shape=(100, 100, 3))
    # the window is x 20..50: centres at 25, 47.5, 20 (on the edge: inside) and 19.95 (outside)
    expected = np.array([[0, 10, 20, 40], [15, 10, 30, 30], [0, 15, 5, 25]])
    assert moved * (30, 100, 30, 100) == pytest.approx(expected)


# -- scale jitter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "shape", "box"),
    [
        # 0.5 + 0 * 1.5 = a half: a frame of 200 x 400, the image half of the 200 free columns and 1/4 of the rows in
        ((0.0, 0.5, 0.25), (200, 400), [110, 45, 130, 85]),
        # 0.5 + 1 * 1.5 = twice: 50 x 100 of the image from column 0.5 * 100 and row 0; the box is cut at column 50
        ((1.0, 0.5, 0.0), (50, 100), [0, 10, 30, 20]),
    ],
)
def test_jitter_fixed_draws_give_hand_computed_frame(draws: tuple, shape: tuple, box: list) -> None:
    jitter = ScaleJitter(scale=(0.5, 2.0))
    pipeline = compose(jitter)
    jitter.random_generator = FixedDraws(*draws)
    given = [[10, 20, 30, 60]] if shape[0] == 200 else [[40, 10, 80, 20], [0, 0, 20, 20], [20, 10, 60, 20]]
    frame, boxes, rows = run(pipeline, random_image(100, 200), np.array(given, np.float32))
    assert frame.shape == (*shape, 3)
    assert boxes == pytest.approx(np.array([box]), abs=1e-4)
    assert rows.tolist() == [0]  # of the others the centre is outside


def test_jitter_factor_is_uniform_and_batches_keep_one_size() -> None:
    pipeline = compose(ScaleJitter(scale=(0.5, 2.0)))
    image = random_image(100, 100)
    factors = [100 / run(pipeline, image, NO_BOXES)[0].shape[0] for _ in range(1000)]
    assert 0.5 <= min(factors) <= max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.06)  # 4 sigma
    transform = SeededTransform([ScaleJitter(), *ssd_transforms(Stretch(48))], Stretch(48))
    assert {transform(image, NO_BOXES, (0, 0, index)).image.shape for index in range(20)} == {(48, 48, 3)}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SSDZoomOut(max_ratio=0.5), "max_ratio is 0.5; it must be at least 1"),
        (lambda: SSDZoomOut(max_ratio=float("nan")), "max_ratio is nan"),
        (lambda: SSDZoomOut(fill=(0, 0, 300)), r"fill is \(0, 0, 300\)"),
        (lambda: SSDMinIoUCrop(min_ious=(0.5, 1.5)), "min_ious"),
        (lambda: SSDMinIoUCrop(scale=(0.0, 1.0)), "scale"),
        (lambda: SSDMinIoUCrop(aspect_ratio=(1.5, 2.0)), "aspect_ratio"),
        (lambda: SSDMinIoUCrop(trials=0), "trials is 0; it must be at least 1"),
        (lambda: ScaleJitter(scale=(0.1, 1.0)), r"scale is \(0.1, 1.0\); it must be \[low, high\]"),
        (lambda: ScaleJitter(scale=(1.5, 0.5)), "ScaleJitter: scale"),
        (lambda: SSDPhotometricDistort(brightness=-1), r"brightness is -1; it must be in 0\.\.255"),
        (lambda: SSDPhotometricDistort(contrast=(1.5, 0.5)), "contrast"),
        (lambda: SSDPhotometricDistort(hue=200), "hue is 200"),
    ],
)
def test_settings_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# -- the adapter -------------------------------------------------------------------------------------------------------

BOXES = np.array([[5, 5, 60, 80], [50, 40, 190, 140], [150, 10, 170, 30]], np.float32)


def test_resize_scales_both_axes_by_hand() -> None:
    transformed = SeededTransform([], Stretch(100))(random_image(150, 200), BOXES, (0, 0, 0))
    assert transformed.image.shape == (100, 100, 3)
    # x by 1/2, y by 2/3
    expected = [[2.5, 10 / 3, 30, 160 / 3], [25, 80 / 3, 95, 280 / 3], [75, 20 / 3, 85, 20]]
    assert transformed.boxes == pytest.approx(np.array(expected), abs=1e-3)
    assert transformed.rows.tolist() == [0, 1, 2]
    assert (transformed.boxes.dtype, transformed.rows.dtype) == (np.float32, np.int64)


def test_same_key_gives_the_same_result_whatever_ran_before() -> None:
    image = random_image(150, 200)
    first, second = (
        SeededTransform(ssd_transforms(Stretch(64)), Stretch(64)),
        SeededTransform(ssd_transforms(Stretch(64)), Stretch(64)),
    )
    for index in range(5):
        second(image, BOXES, (7, 3, index + 100))
        a, b = first(image, BOXES, (7, 3, index)), second(image, BOXES, (7, 3, index))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_part_of_the_key_changes_the_result() -> None:
    transform = SeededTransform(ssd_transforms(Stretch(64)), Stretch(64))
    image = random_image(150, 200)
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    assert len({transform(image, BOXES, key).image.tobytes() for key in keys}) == len(keys)


def test_transforms_of_one_pipeline_draw_independently() -> None:
    transform = SeededTransform([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], Stretch(32))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    corner = np.array([[0, 0, 4, 4]], np.float32)
    seen = Counter(tuple(transform(image, corner, (0, 0, index)).boxes[0, :2].tolist()) for index in range(400))
    assert sorted(seen) == [(0, 0), (0, 28), (28, 0), (28, 28)]
    assert min(seen.values()) > 60  # 100 expected


def test_rows_say_which_boxes_are_left() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [90, 90, 100, 100]], np.float32)
    transform = SeededTransform([A.Crop(x_min=40, y_min=40, x_max=100, y_max=100)], Stretch(60))
    transformed = transform(np.zeros((100, 100, 3), np.uint8), boxes, (0, 0, 0))
    assert transformed.rows.tolist() == [1, 2]
    assert transformed.boxes == pytest.approx(np.array([[10, 10, 20, 20], [50, 50, 60, 60]]), abs=1e-3)


def test_objects_under_a_pixel_of_the_network_input_are_dropped() -> None:
    boxes = np.array([[0, 0, 9, 400], [0, 0, 11, 400]], np.float32)  # 0.9 and 1.1 px wide after the resize
    transformed = SeededTransform([], Stretch(40))(np.zeros((400, 400, 3), np.uint8), boxes, (0, 0, 0))
    assert transformed.rows.tolist() == [1]


def test_boxes_beyond_the_image_are_clipped_and_empty_ones_dropped() -> None:
    nan = float("nan")
    boxes = np.array(
        [[-5, -5, 20, 20], [10, 10, 10, 30], [30, 30, 70, 70], [50, 50, 60, 60], [nan, 0, 9, 9]], np.float32
    )
    transformed = SeededTransform([], Stretch(40))(np.zeros((40, 40, 3), np.uint8), boxes, (0, 0, 0))
    assert transformed.rows.tolist() == [0, 2]
    assert transformed.boxes == pytest.approx(np.array([[0, 0, 20, 20], [30, 30, 40, 40]]), abs=1e-3)


@pytest.mark.parametrize("transforms", [ssd_transforms(Stretch(48)), [], [SSDZoomOut(p=1.0)]])
def test_image_without_objects_passes(transforms: list[A.BasicTransform]) -> None:
    transform = SeededTransform(transforms, Stretch(48))
    for index in range(20):
        transformed = transform(random_image(40, 60), NO_BOXES, (0, 0, index))
        assert transformed.image.shape == (48, 48, 3)
        assert (transformed.boxes.shape, transformed.boxes.dtype) == ((0, 4), np.float32)
        assert (transformed.rows.shape, transformed.rows.dtype) == ((0,), np.int64)


def test_default_augmentation_gives_valid_boxes_over_many_draws() -> None:
    transform = SeededTransform(ssd_transforms(Stretch(300)), Stretch(300))
    image = random_image(75, 100)
    boxes = np.array([[0, 0, 100, 75], [0, 0, 1, 1], [99, 74, 100, 75], [30, 20, 70, 50]], np.float32)
    for index in range(200):
        new_boxes = transform(image, boxes, (0, 0, index)).boxes
        assert ((new_boxes >= 0) & (new_boxes <= 300)).all()
        assert (new_boxes[:, 2:] - new_boxes[:, :2] >= 1).all()


def test_pipeline_that_converts_the_image_says_what_to_leave_out() -> None:
    with pytest.raises(ConfigError, match=r"data.train_transforms gave .*float32.*\n.*Normalize"):
        SeededTransform([A.Normalize()], Stretch(32))(random_image(32, 32), NO_BOXES, (0, 0, 0))


def test_transform_that_fails_on_an_image_is_named_with_the_image() -> None:
    transform = SeededTransform([A.RandomCrop(height=500, width=500, pad_if_needed=False)], Stretch(32))
    with pytest.raises(
        ConfigError, match=r"data.train_transforms failed on an image of 128 x 96 pixels with 3 objects"
    ):
        transform(random_image(150, 200), BOXES, (0, 0, 0))


def test_adapter_can_be_pickled() -> None:
    transform = SeededTransform(ssd_transforms(Stretch(32)), Stretch(32))
    copy = pickle.loads(pickle.dumps(transform))
    image = random_image(150, 200)
    assert np.array_equal(copy(image, BOXES, (1, 2, 3)).image, transform(image, BOXES, (1, 2, 3)).image)


def test_large_image_is_shrunk_before_anything_else_and_its_boxes_with_it():
    seen = []

    class Look(A.ImageOnlyTransform):
        def apply(self, img, **params):
            seen.append(img.shape)
            return img

    image = np.zeros((1000, 2000, 3), np.uint8)
    boxes = np.array([[1000, 500, 2000, 1000]], np.float32)
    result = SeededTransform([Look(p=1.0)], Stretch(100))(image, boxes, (0, 0, 0))
    assert seen == [(200, 400, 3)]  # the longer side is four times the network's
    assert result.boxes.tolist() == [[50, 50, 100, 100]]
