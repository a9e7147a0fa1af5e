import colorsys
import pickle
import random
from collections import Counter

import albumentations as A
import numpy as np
import pytest

from onestage.data.augmentation import Distortion, SSDAugmentation, SSDPhotometricDistort
from onestage.data.crops import ScaleJitter, SSDMinIoUCrop, SSDZoomOut, Window
from onestage.data.resize import MEAN_RGB, Letterbox, Stretch
from onestage.data.transforms import SeededTransform, ssd_transforms, training_transforms
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


# Photometric distortion


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
    drawn = Distortion(brightness, contrast, saturation, hue, contrast_first)
    distorted = SSDPhotometricDistort().apply(image, distortion=drawn, shape=image.shape)
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
    # brightness -32 + 0.75 * 64, saturation 0.5 + 0.25 * 1
    assert transform.get_params() == {"distortion": Distortion(16.0, 1.0, 0.75, 0.0, False)}


def test_distort_brightness_and_contrast_saturate_and_round() -> None:
    image = np.array([[[0, 101, 250]]], dtype=np.uint8)
    brighter = SSDPhotometricDistort().apply(image, distortion=Distortion(16.0, 1.0, 1.0, 0.0, True))
    assert brighter.tolist() == [[[16, 117, 255]]]
    flatter = SSDPhotometricDistort().apply(image, distortion=Distortion(0.0, 0.75, 1.0, 0.0, True))
    assert flatter.tolist() == [[[0, 76, 188]]]  # 75.75, 187.5 to even


def test_distort_gray_pixels_have_no_hue_to_turn() -> None:
    image = np.full((2, 2, 3), 77, dtype=np.uint8)
    distorted = SSDPhotometricDistort().apply(image, distortion=Distortion(0.0, 1.0, 1.5, 18.0, True))
    assert np.array_equal(distorted, image)


def test_distort_applies_each_change_half_the_time() -> None:
    transform = SSDPhotometricDistort()
    transform.random_generator = np.random.default_rng(0)
    drawn = [transform.get_params()["distortion"]._asdict() for _ in range(2000)]
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


# Zoom-out


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
    assert np.unique(canvas[is_border], axis=0).tolist() == [list(MEAN_RGB)]


def test_zoom_out_ratio_and_place_are_uniform() -> None:
    rng = np.random.default_rng(0)
    windows = [SSDZoomOut().draw(rng, (100, 100), NO_BOXES) for _ in range(1000)]
    sides = [window.width for window in windows]
    assert 100 <= min(sides) <= max(sides) <= 400
    assert np.mean(sides) == pytest.approx(250, abs=11)  # 4 sigma
    assert np.mean([-window.left / (window.width - 99.9) for window in windows]) == pytest.approx(0.49, abs=0.05)


# Min-IoU crop


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


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


# Scale jitter


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


def test_jitter_factor_is_uniform_and_samples_keep_one_size() -> None:
    rng = np.random.default_rng(0)
    factors = [100 / ScaleJitter(scale=(0.5, 2.0)).draw(rng, (100, 100), NO_BOXES).height for _ in range(1000)]
    assert 0.49 <= min(factors) <= max(factors) <= 2
    assert np.mean(factors) == pytest.approx(1.25, abs=0.06)  # 4 sigma
    transform = SeededTransform([ScaleJitter(), *ssd_transforms(Stretch(48))], Stretch(48))
    image = random_image(100, 100)
    assert {transform(image, NO_BOXES, (0, 0, index)).image.shape for index in range(10)} == {(48, 48, 3)}


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
        (lambda: ScaleJitter(scale=(0.1, 1.0)), r"scale must be \[low, high\] .*, got \(0.1, 1.0\)"),
        (lambda: ScaleJitter(scale=(1.5, 0.5)), "ScaleJitter: scale must be"),
        (lambda: SSDPhotometricDistort(brightness=-1), r"brightness must be in \[0, 255\], got -1"),
        (lambda: SSDPhotometricDistort(contrast=(1.5, 0.5)), "contrast must be"),
        (lambda: SSDPhotometricDistort(hue=200), r"hue must be in \[0, 180\], got 200"),
        (lambda: SSDAugmentation(0), "SSDAugmentation: image_size must be >= 1, got 0"),
        (lambda: SSDAugmentation(32, mirror_p=1.5), r"mirror_p must be in \[0, 1\], got 1.5"),
        (lambda: SSDAugmentation(32, p=-1), r"SSDAugmentation: p must be in \[0, 1\], got -1"),
        (lambda: SSDAugmentation(32, interpolations=("bilinear",)), "interpolations must be at least one of linear"),
        (lambda: SSDAugmentation(32, interpolations=()), "interpolations must be at least one of"),
        (lambda: training_transforms(None, Stretch(48), (0.01, 2.0)), r"data.scale_jitter must be .*\n.*\[0.5, 1.5\]"),
    ],
)
def test_settings_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# The adapter

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
    first, second = (SeededTransform(ssd_transforms(Stretch(64)), Stretch(64)) for _ in range(2))
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


def test_default_augmentation_keeps_the_aspect_ratio_under_a_letterbox() -> None:
    names = [type(transform).__name__ for transform in training_transforms(None, Letterbox(48), (0.5, 1.5))]
    assert names == ["ScaleJitter", "SSDPhotometricDistort", "SSDZoomOut", "SSDMinIoUCrop", "HorizontalFlip"]
    transform = SeededTransform([A.HorizontalFlip(p=1.0)], Letterbox(50))
    result = transform(random_image(20, 100), np.array([[0, 0, 30, 20]], np.float32), (0, 0, 0))
    # 100 x 20 becomes 50 x 10, 20 px below the upper edge; the mirrored box is x 70..100
    assert result.boxes == pytest.approx(np.array([[35, 20, 50, 30]]), abs=1e-3)
