"""Resizes: canvas, placement, and the way back to original pixels, by hand-computed numbers."""

import cv2
import numpy as np
import pytest
import torch
from image_sets import image_set, noise
from torch.utils.data import DataLoader

from onestage.boxes.geometry import to_original
from onestage.data.dataset import DetectionDataset, collate
from onestage.data.resize import MEAN_RGB, Letterbox, Placement, ShortestEdge, Stretch
from onestage.data.samplers import EvaluationSampler
from onestage.data.transforms import SeededTransform
from onestage.errors import ConfigError

SHORTEST = ShortestEdge()


@pytest.mark.parametrize(
    ("resize", "size", "canvas", "expected"),
    [
        (Stretch(60), (30, 120), (60, 60), Placement(scale_x=0.5, scale_y=2.0, left=0.0, top=0.0)),
        (Letterbox(32), (30, 64), (32, 32), Placement(0.5, 0.5, 0, 8)),  # becomes 32 x 15: (32 - 15) // 2 = 8 px above
        (Letterbox(32), (25, 64), (32, 32), Placement(0.5, 12 / 25, 0, 10)),  # 12.5 px high, rounded to 12
        (Letterbox(32), (64, 32), (32, 32), Placement(0.5, 0.5, 8, 0)),
        (Letterbox(32), (8, 16), (32, 32), Placement(2.0, 2.0, 0, 8)),  # small images are enlarged
        (SHORTEST, (480, 640), (800, 1344), Placement(1067 / 640, 800 / 480)),  # COCO's usual size: 800 x 1066.7
        (SHORTEST, (640, 480), (1344, 800), Placement(800 / 480, 1067 / 640)),
        (SHORTEST, (100, 400), (800, 1344), Placement(1333 / 400, 333 / 100)),  # the longer side limits: 333.25 x 1333
        (SHORTEST, (500, 500), (800, 1344), Placement(1.6, 1.6)),
    ],
)
def test_canvas_and_placement_are_hand_computed(resize, size, canvas, expected) -> None:
    assert resize.canvas_of(*size) == canvas
    assert resize.place(*size, canvas) == pytest.approx(expected)


def test_pixels_are_those_of_opencv_and_of_a_letterbox_the_fill_around() -> None:
    image, size = noise(30, 120), (60, 60)
    assert np.array_equal(Stretch(60).apply(image, size), cv2.resize(image, size, interpolation=cv2.INTER_LINEAR))
    canvas = Letterbox(32).apply(np.full((20, 40, 3), 200, dtype=np.uint8), (32, 32))  # 32 x 16, 8 px above and below
    assert canvas.shape == (32, 32, 3)
    assert (canvas[8:24] == 200).all()
    assert (canvas[[*range(8), *range(24, 32)]] == MEAN_RGB).all()


@pytest.mark.parametrize("resize", [Stretch(64), Letterbox(64), ShortestEdge(32, 60)])
def test_boxes_return_to_original_pixels(tmp_path, resize) -> None:
    boxes = [[[10, 5, 70, 35]], [[3, 20, 41, 77]]]
    annotations = image_set(tmp_path, [noise(40, 100), noise(83, 47)], boxes)
    dataset = DetectionDataset(annotations, SeededTransform([], resize))
    for row, expected in enumerate(boxes):
        batch = collate([dataset[row]])
        originals = to_original(batch.targets.boxes[:, :1], batch.placements, batch.original_sizes)
        torch.testing.assert_close(originals[0], torch.tensor(expected, dtype=torch.float32), atol=1e-3, rtol=1e-4)


def test_shortest_edge_takes_the_smallest_canvas_and_shrinks_to_fit_another() -> None:
    resize = ShortestEdge(32, 64, canvases=[(32, 64), (64, 32), (32, 32)])
    assert [resize.canvas_of(*size) for size in ((10, 10), (10, 12), (12, 10))] == [(32, 32), (32, 64), (64, 32)]
    assert resize.place(12, 10, (32, 64)) == pytest.approx(Placement(27 / 10, 32 / 12))  # 38.4 px do not fit into 32
    page = resize.apply(np.full((12, 10, 3), 200, dtype=np.uint8), (32, 64))
    assert page.shape == (32, 64, 3)
    assert (page[:, :27] == 200).all()
    assert (page[:, 27:] == MEAN_RGB).all()


def test_batch_of_several_canvases_is_refused_with_the_samplers_that_keep_them_apart(tmp_path) -> None:
    annotations = image_set(tmp_path, [noise(40, 100), noise(100, 40), noise(20, 50)])
    annotations.sizes[1:] = 0  # not annotated: that of the file counts
    dataset = DetectionDataset(annotations, SeededTransform([], ShortestEdge(32, 64)))
    assert [rows.tolist() for rows in dataset.rows_by_canvas()] == [[0, 2], [1]]
    assert [dataset[row].image.shape for row in range(3)] == [(3, 32, 64), (3, 64, 32), (3, 32, 64)]
    with pytest.raises(ConfigError, match=r"must be one .*, got \[\(32, 64\), \(64, 32\)\].*\n.*EvaluationSampler"):
        collate([dataset[0], dataset[1]])
    loader = DataLoader(dataset, 4, sampler=EvaluationSampler(dataset, batch_size=4), collate_fn=collate)
    assert [batch.image_indices.tolist() for batch in loader] == [[0, 2], [1]]


def test_large_images_are_averaged_before_they_are_sampled() -> None:
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # bilinear sampling alone would pick single columns: black or white
    assert np.abs(Stretch(32).apply(stripes, (32, 32)).astype(int) - 127.5).max() < 2
