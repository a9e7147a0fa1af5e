from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import image_set

from onestage.data.dataset import DetectionDataset
from onestage.data.mixing import Picture, mixup, mosaic
from onestage.data.resize import Stretch
from onestage.data.transforms import SeededTransform
from onestage.types import IGNORE, AnnotationSet

SIDE = 80


class FixedDraws:
    def __init__(self, *draws: float) -> None:
        self.draws = np.array(draws)

    def random(self, size: int) -> np.ndarray:
        return self.draws[:size]

    def beta(self, a: float, b: float) -> float:
        return float(self.draws[0])


def picture(height: int, width: int, level: int, boxes: list, first_object: int) -> Picture:
    pixels = np.full((height, width, 3), level, dtype=np.uint8)
    objects = np.arange(first_object, first_object + len(boxes))
    return Picture(pixels, np.array(boxes, dtype=np.float32).reshape(-1, 4), objects)


def test_mosaic_around_the_middle_by_hand() -> None:
    tiles = [
        picture(20, 40, 10, [[0, 0, 40, 20]], 0),  # as large as its quadrant is wide: at x 0..40, y 20..40
        picture(80, 40, 20, [[0, 0, 20, 40]], 1),  # halved: x 40..60, y 0..40
        picture(10, 10, 30, [[5, 5, 10, 10]], 2),  # times four: x 0..40, y 40..80
        picture(40, 40, 40, [], 3),
    ]
    result = mosaic(tiles, SIDE, FixedDraws(0.5, 0.5))
    assert result.boxes.tolist() == [[0, 20, 40, 40], [40, 0, 50, 20], [20, 60, 40, 80]]
    assert result.objects.tolist() == [0, 1, 2]
    points = [(30, 20), (10, 20), (20, 50), (20, 70), (60, 20), (60, 60)]
    assert [result.pixels[row, column, 0] for row, column in points] == [10, 123, 20, 123, 30, 40]


def test_mosaic_around_another_point_cuts_pictures_and_drops_objects_whose_centre_is_off() -> None:
    # the point is (20, 60): the upper left picture keeps its 20 right columns, the lower right its 20 upper rows
    tiles = [
        picture(40, 40, 10, [[0, 0, 12, 40], [8, 0, 36, 40], [30, 0, 40, 10]], 0),  # moved by (-20, 20)
        picture(40, 40, 20, [], 3),
        picture(40, 40, 30, [], 3),
        picture(40, 40, 40, [[0, 15, 40, 40], [0, 0, 10, 30]], 3),  # moved by (20, 60)
    ]
    result = mosaic(tiles, SIDE, FixedDraws(0.0, 1.0))
    assert result.objects.tolist() == [1, 2, 4]
    assert result.boxes.tolist() == [[0, 20, 16, 60], [10, 20, 20, 30], [20, 60, 30, 80]]
    assert [result.pixels[row, column, 0] for row, column in [(30, 5), (30, 30), (70, 5), (70, 30), (70, 70)]] == [
        *(10, 20, 30, 40),
        123,
    ]


def test_mosaic_point_is_uniform_over_the_middle_half() -> None:
    points = []
    white = picture(40, 40, 255, [], 0)
    black = picture(40, 40, 0, [], 0)
    for seed in range(200):
        pixels = mosaic([white, black, white, black], SIDE, np.random.default_rng(seed)).pixels
        points.append(np.flatnonzero((pixels[SIDE // 2 - 5] == 0).all(axis=1))[0])
    assert min(points) >= 20
    assert max(points) <= 60
    assert np.mean(points) == pytest.approx(40, abs=3.3)  # 4 sigma


def test_mixup_blends_pixels_and_keeps_the_objects_of_both() -> None:
    first, second = picture(4, 4, 100, [[0, 0, 2, 2]], 5), picture(4, 4, 200, [[1, 1, 4, 4], [0, 0, 4, 4]], 9)
    result = mixup(first, second, FixedDraws(0.75))
    assert np.unique(result.pixels).tolist() == [125]  # 0.75 * 100 + 0.25 * 200
    assert result.objects.tolist() == [5, 9, 10]
    assert result.boxes.tolist() == [[0, 0, 2, 2], [1, 1, 4, 4], [0, 0, 4, 4]]
    weights = [mixup(first, second, np.random.default_rng(seed)).pixels[0, 0, 0] for seed in range(100)]
    assert 120 < min(weights) < max(weights) < 180


# In the data set


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    """Six images of one level each; image i has one object of class i, and the last is a crowd."""
    pixels = [np.full((50, 60, 3), 40 * number, dtype=np.uint8) for number in range(6)]
    annotations = image_set(tmp_path, pixels, [[[10, 10, 50, 40]]] * 6)
    annotations.is_crowd[5] = True
    return annotations


def dataset(annotations: AnnotationSet, **settings: float) -> DetectionDataset:
    return DetectionDataset(annotations, SeededTransform([], Stretch(48)), seed=2, **settings)


def test_mosaic_in_the_dataset_has_the_labels_of_its_images(annotations: AnnotationSet) -> None:
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


@pytest.mark.parametrize("settings", [{"mosaic": 0.5}, {"mixup": 0.5}, {"mosaic": 0.5, "mixup": 0.5}])
def test_mixing_is_a_function_of_seed_epoch_and_index(annotations: AnnotationSet, settings: dict) -> None:
    first, second = dataset(annotations, **settings), dataset(annotations, **settings)
    second[7, 3]  # what ran before does not matter
    samples = [first[epoch, index] for epoch in range(5) for index in range(6)]
    again = [second[epoch, index] for epoch in range(5) for index in range(6)]
    assert all(
        torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(samples, again, strict=True)
    )
    plain = dataset(annotations)
    num_mixed = sum(
        not torch.equal(sample.image, plain[0, sample.image_index].image) or len(sample.labels) > 1
        for sample in samples
    )
    assert 3 < num_mixed < 30  # some, not all; a mixup with itself looks the same
    assert len({dataset(annotations, mosaic=1.0)[epoch, 0].image.numpy().tobytes() for epoch in range(5)}) == 5


def test_mixup_has_the_objects_of_two_images(annotations: AnnotationSet) -> None:
    mixed = dataset(annotations, mixup=1.0)
    for epoch in range(10):
        sample = mixed[epoch, 0]
        assert len(sample.labels) == 2
        assert sample.labels[0] == 0
        other = 5 if sample.labels[1] == IGNORE else int(sample.labels[1])
        assert sample.image.float().mean() == pytest.approx(20 * other, abs=8 * other)
