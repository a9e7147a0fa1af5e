"""Resizes: canvas, placement, and the way back to original pixels, by hand-computed numbers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from image_sets import image_set, noise

from onestage.boxes.geometry import to_original
from onestage.data.dataset import DetectionDataset, collate
from onestage.data.resize import MEAN_RGB, Letterbox, Placement, Resize, Stretch
from onestage.data.transforms import SeededTransform
from onestage.errors import ConfigError


def test_stretch_scales_each_axis_to_the_square() -> None:
    stretch = Stretch(60)
    assert stretch.canvases == ((60, 60),)
    assert stretch.place(30, 120) == Placement(scale_x=0.5, scale_y=2.0, left=0.0, top=0.0)
    image = noise(30, 120)
    assert np.array_equal(stretch.apply(image), cv2.resize(image, (60, 60), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize(
    ("centred", "size", "expected"),
    [
        (True, (30, 64), Placement(0.5, 0.5, 0, 8)),  # 64 x 30 becomes 32 x 15: (32 - 15) // 2 = 8 px above
        (True, (25, 64), Placement(0.5, 12 / 25, 0, 10)),  # 12.5 px high, rounded to 12
        (False, (30, 64), Placement(0.5, 0.5, 0, 0)),
        (True, (64, 32), Placement(0.5, 0.5, 8, 0)),
        (True, (8, 16), Placement(2.0, 2.0, 0, 8)),  # small images are enlarged
    ],
)
def test_letterbox_placement_by_hand(centred: bool, size: tuple[int, int], expected: Placement) -> None:
    letterbox = Letterbox(32, centred=centred)
    placement = letterbox.place(*size)
    assert placement == pytest.approx(expected)


def test_letterbox_pixels_are_the_scaled_image_and_the_fill() -> None:
    image = np.full((20, 40, 3), 200, dtype=np.uint8)
    canvas = Letterbox(32).apply(image)  # 32 x 16, 8 px above and below
    assert canvas.shape == (32, 32, 3)
    assert (canvas[8:24] == 200).all()
    assert (canvas[:8] == MEAN_RGB).all()
    assert (canvas[24:] == MEAN_RGB).all()


@pytest.mark.parametrize("resize", [Stretch(64), Letterbox(64), Letterbox(64, centred=False)])
def test_boxes_return_to_original_pixels(tmp_path: Path, resize: Resize) -> None:
    boxes = [[[10, 5, 70, 35]], [[3, 20, 41, 77]]]
    annotations = image_set(tmp_path, [noise(40, 100), noise(83, 47)], boxes)
    dataset = DetectionDataset(annotations, SeededTransform([], resize))
    batch = collate([dataset[0], dataset[1]])
    originals = to_original(batch.targets.boxes[:, :1], batch.placements, batch.original_sizes)
    torch.testing.assert_close(originals, torch.tensor(boxes, dtype=torch.float32), atol=1e-3, rtol=1e-4)


def test_large_images_are_averaged_before_they_are_sampled() -> None:
    stripes = np.zeros((640, 640, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # bilinear sampling alone would pick single columns: black or white
    assert np.abs(Stretch(32).apply(stripes).astype(int) - 127.5).max() < 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stretch(0), r"Stretch: size must be >= 1, got 0\."),
        (lambda: Letterbox(-1), r"Letterbox: size must be >= 1, got -1\."),
        (lambda: Letterbox(64, fill=(0, 0, 256)), r"Letterbox: fill must be .*\[0, 255\], got \(0, 0, 256\)"),
    ],
)
def test_invalid_resize_is_refused(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
