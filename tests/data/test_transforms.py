"""The adapter of albumentations, mosaic and mixup: alone, and as a data set uses them."""

from collections import Counter
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
from image_sets import image_set, noise, smooth

from onestage.data.augmentation import SSDAugmentation, SSDZoomOut
from onestage.data.dataset import DetectionDataset
from onestage.data.resize import MEAN_RGB, Letterbox, Stretch
from onestage.data.transforms import Picture, ScaleJitter, SeededTransform, mixup, mosaic, ssd_transforms
from onestage.errors import ConfigError
from onestage.types import IGNORE, AnnotationSet

BOXES = np.array([[5, 5, 60, 80], [50, 40, 190, 140], [150, 10, 170, 30]], np.float32)
SIDE = 80


class FixedDraws:
    """Stands in for numpy's generator: hands out the given numbers."""

    def __init__(self, *draws: float) -> None:
        self.draws = list(draws)

    def random(self, size: int) -> np.ndarray:
        taken, self.draws = self.draws[:size], self.draws[size:]
        return np.array(taken)

    def beta(self, a: float, b: float) -> float:
        return self.draws.pop(0)


def test_result_is_a_function_of_every_part_of_the_key_alone() -> None:
    first, second = (SeededTransform(ssd_transforms(Stretch(64)), Stretch(64)) for _ in range(2))
    keys = [(seed, epoch, index) for seed in range(2) for epoch in range(3) for index in range(3)]
    results = [first(smooth(150, 200), BOXES, key) for key in keys]
    assert len({result.image.tobytes() for result in results}) == len(keys)
    for key, result in reversed(list(zip(keys, results, strict=True))):  # what ran before does not matter
        assert all(np.array_equal(a, b) for a, b in zip(second(smooth(150, 200), BOXES, key), result, strict=True))


def test_transforms_of_one_pipeline_draw_independently() -> None:
    transform = SeededTransform([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)], Stretch(32))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    corner = np.array([[0, 0, 4, 4]], np.float32)
    seen = Counter(tuple(transform(image, corner, (0, 0, index)).boxes[0, :2].tolist()) for index in range(200))
    assert sorted(seen) == [(0, 0), (0, 28), (28, 0), (28, 28)]
    assert min(seen.values()) > 25  # 50 expected, 4 sigma


def test_alone_and_among_others_the_recipe_gives_the_same() -> None:
    alone = SeededTransform([SSDAugmentation(64)], Stretch(64))
    among = SeededTransform([SSDAugmentation(64), A.NoOp()], Stretch(64))
    for index in range(15):
        a, b = alone(smooth(150, 200), BOXES, (3, 1, index)), among(smooth(150, 200), BOXES, (3, 1, index))
        assert np.array_equal(a.image, b.image)
        assert a.rows.tolist() == b.rows.tolist()
        assert a.boxes == pytest.approx(b.boxes, abs=1e-3)


NAN = float("nan")
CROP = A.Crop(x_min=40, y_min=40, x_max=100, y_max=100)


@pytest.mark.parametrize(
    ("transforms", "sides", "moved"),  # each box -> what becomes of it
    [
        ([CROP], (100, 60), {(0, 0, 10, 10): None, (50, 50, 60, 60): (10, 10, 20, 20)}),
        ([CROP], (100, 60), {(0, 0, 10, 10): None, (90, 90, 100, 100): (50, 50, 60, 60)}),
        ([], (400, 40), {(0, 0, 9, 400): None, (0, 0, 11, 400): (0, 0, 1.1, 40)}),  # 0.9 and 1.1 px wide
        ([], (40, 40), {(-5, -5, 20, 20): (0, 0, 20, 20), (10, 10, 10, 30): None, (30, 30, 70, 70): (30, 30, 40, 40)}),
        ([], (40, 40), {(50, 50, 60, 60): None, (NAN, 0, 9, 9): None, (0, 0, 9, 9): (0, 0, 9, 9)}),
    ],
)
def test_boxes_are_clipped_and_rows_say_which_are_left(transforms, sides, moved) -> None:
    image = np.zeros((sides[0], sides[0], 3), np.uint8)
    result = SeededTransform(transforms, Stretch(sides[1]))(image, np.array([*moved], np.float32), (0, 0, 0))
    assert result.rows.tolist() == [row for row, expected in enumerate(moved.values()) if expected]
    assert result.boxes == pytest.approx(np.array([expected for expected in moved.values() if expected]), abs=1e-3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.Normalize(), r": .*got float32.*\n.*Normalize"),
        (A.RandomCrop(500, 500, pad_if_needed=False), " failed on an image of 128 x 96 pixels with 3 objects"),
    ],
)
def test_transform_that_cannot_be_used_is_one_message(transform, message) -> None:
    with pytest.raises(ConfigError, match=f"data.train_transforms{message}"):
        SeededTransform([transform], Stretch(32))(noise(150, 200), BOXES, (0, 0, 0))


def test_large_image_is_shrunk_before_anything_else_and_its_boxes_with_it() -> None:
    seen = []

    class Look(A.ImageOnlyTransform):
        def apply(self, img, **params):
            seen.append(img.shape)
            return img

    boxes = np.array([[1000, 500, 2000, 1000]], np.float32)
    result = SeededTransform([Look(p=1.0)], Stretch(100))(np.zeros((1000, 2000, 3), np.uint8), boxes, (0, 0, 0))
    assert seen == [(200, 400, 3)]  # the longer side is four times the network's
    assert result.boxes.tolist() == [[50, 50, 100, 100]]


def test_default_augmentation_keeps_the_aspect_ratio_under_a_letterbox() -> None:
    names = [type(transform).__name__ for transform in ssd_transforms(Letterbox(48))]
    assert names == ["SSDPhotometricDistort", "SSDZoomOut", "SSDMinIoUCrop", "HorizontalFlip"]
    transform = SeededTransform([A.HorizontalFlip(p=1.0)], Letterbox(50))
    result = transform(noise(20, 100), np.array([[0, 0, 30, 20]], np.float32), (0, 0, 0))
    # 100 x 20 becomes 50 x 10, 20 px below the upper edge; the mirrored box is x 70..100
    assert result.boxes == pytest.approx(np.array([[35, 20, 50, 30]]), abs=1e-3)


@pytest.mark.parametrize(
    ("transform", "draws", "given", "box"),
    [
        # ratio 1 + 3 / 3 = 2: a canvas of 200 x 400, the image half of the 200 free columns and 1/4 of the rows in
        (SSDZoomOut(p=1.0), (1 / 3, 0.5, 0.25), [[10, 20, 30, 60]], [110, 45, 130, 85]),
        # 0.5 + 0 * 1.5 = a half: the same canvas
        (ScaleJitter(scale=(0.5, 2.0)), (0.0, 0.5, 0.25), [[10, 20, 30, 60]], [110, 45, 130, 85]),
        # 0.5 + 1 * 1.5 = twice: 50 x 100 of the image from column 0.5 * 100 and row 0; the box is cut at column 50
        (
            ScaleJitter(scale=(0.5, 2.0)), (1.0, 0.5, 0.0),
            [[40, 10, 80, 20], [0, 0, 20, 20], [20, 10, 60, 20]], [0, 10, 30, 20],
        ),
    ],
)  # fmt: skip
def test_zoom_out_and_jitter_with_fixed_draws_are_hand_computed(transform, draws, given, box, monkeypatch) -> None:
    window, image = transform.draw(FixedDraws(*draws), (100, 200), np.zeros((0, 4))), noise(100, 200)
    monkeypatch.setattr(transform, "draw", lambda *_: window)
    params = A.BboxParams(format="pascal_voc", label_fields=["rows"])
    result = A.Compose([transform], params)(image=image, bboxes=np.array(given), rows=[*range(len(given))])
    canvas = np.full((200, 400, 3), MEAN_RGB)
    canvas[25:125, 100:300] = image
    assert np.array_equal(result["image"], canvas if len(given) == 1 else image[:50, 50:150])
    assert result["bboxes"] == pytest.approx(np.array([box]), abs=1e-4)
    assert [int(row) for row in result["rows"]] == [0]  # of the others the centre is outside


def picture(height: int, width: int, level: int, boxes: list, first_row: int) -> Picture:
    pixels = np.full((height, width, 3), level, dtype=np.uint8)
    rows = np.arange(first_row, first_row + len(boxes))
    return Picture(pixels, np.array(boxes, dtype=np.float32).reshape(-1, 4), rows)


def test_mosaic_around_the_middle_by_hand() -> None:
    tiles = [
        picture(20, 40, 10, [[0, 0, 40, 20]], 0),  # as large as its quadrant is wide: at x 0..40, y 20..40
        picture(80, 40, 20, [[0, 0, 20, 40]], 1),  # halved: x 40..60, y 0..40
        picture(10, 10, 30, [[5, 5, 10, 10]], 2),  # times four: x 0..40, y 40..80
        picture(40, 40, 40, [], 3),
    ]
    result = mosaic(tiles, SIDE, FixedDraws(0.5, 0.5))
    assert result.boxes.tolist() == [[0, 20, 40, 40], [40, 0, 50, 20], [20, 60, 40, 80]]
    assert result.rows.tolist() == [0, 1, 2]
    points = [(30, 20), (10, 20), (20, 50), (20, 70), (60, 20), (60, 60)]
    assert [result.image[row, column, 0] for row, column in points] == [10, 123, 20, 123, 30, 40]


def test_mosaic_around_another_point_cuts_pictures_and_drops_objects_whose_centre_is_off() -> None:
    # the point is (20, 60): the upper left picture keeps its 20 right columns, the lower right its 20 upper rows
    tiles = [
        picture(40, 40, 10, [[0, 0, 12, 40], [8, 0, 36, 40], [30, 0, 40, 10]], 0),  # moved by (-20, 20)
        picture(40, 40, 20, [], 3),
        picture(40, 40, 30, [], 3),
        picture(40, 40, 40, [[0, 15, 40, 40], [0, 0, 10, 30]], 3),  # moved by (20, 60)
    ]
    result = mosaic(tiles, SIDE, FixedDraws(0.0, 1.0))
    assert result.rows.tolist() == [1, 2, 4]
    assert result.boxes.tolist() == [[0, 20, 16, 60], [10, 20, 20, 30], [20, 60, 30, 80]]
    points = [(30, 5), (30, 30), (70, 5), (70, 30), (70, 70)]
    assert [result.image[row, column, 0] for row, column in points] == [10, 20, 30, 40, 123]


def test_mixup_blends_pixels_and_keeps_the_objects_of_both() -> None:
    first, second = picture(4, 4, 100, [[0, 0, 2, 2]], 5), picture(4, 4, 200, [[1, 1, 4, 4], [0, 0, 4, 4]], 9)
    result = mixup(first, second, FixedDraws(0.75))
    assert np.unique(result.image).tolist() == [125]  # 0.75 * 100 + 0.25 * 200
    assert result.rows.tolist() == [5, 9, 10]
    assert result.boxes.tolist() == [[0, 0, 2, 2], [1, 1, 4, 4], [0, 0, 4, 4]]
    weights = [mixup(first, second, np.random.default_rng(seed)).image[0, 0, 0] for seed in range(100)]
    assert 120 < min(weights) < max(weights) < 180


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    """Six images of one level each; image i has one object of class i, and the last is a crowd."""
    pixels = [np.full((50, 60, 3), 40 * number, dtype=np.uint8) for number in range(6)]
    annotations = image_set(tmp_path, pixels, [[[10, 10, 50, 40]]] * 6)
    annotations.is_crowd[5] = True
    return annotations


def dataset(annotations: AnnotationSet, **settings: float) -> DetectionDataset:
    return DetectionDataset(annotations, SeededTransform([], Stretch(48)), seed=2, **settings)


def test_mosaic_in_the_dataset_has_the_labels_of_its_images(annotations) -> None:
    mixed = dataset(annotations, mosaic=1.0)
    partners: Counter[int] = Counter()
    for index in range(6):
        for epoch in range(20):
            sample = mixed[epoch, index]
            assert sample.image.shape == (3, 48, 48)
            assert sample.image_index == index
            assert len(sample.labels) <= 4
            levels = {IGNORE: 200, **{label: 40 * label for label in range(5)}}
            for box, label in zip(sample.boxes.tolist(), sample.labels.tolist(), strict=True):
                column, row = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
                assert sample.image[0, row, column] == levels[label]  # the object's own image is at its place
            partners.update(sample.labels.tolist())
    assert set(partners) == {0, 1, 2, 3, 4, IGNORE}


def test_mixup_has_the_objects_of_two_images(annotations) -> None:
    mixed = dataset(annotations, mixup=1.0)
    for epoch in range(10):
        sample = mixed[epoch, 0]
        assert len(sample.labels) == 2
        assert sample.labels[0] == 0
        other = 5 if sample.labels[1] == IGNORE else int(sample.labels[1])
        assert sample.image.float().mean() == pytest.approx(20 * other, abs=8 * other)
