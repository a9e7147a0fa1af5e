"""Samples of an annotation set, and their collation."""

import pytest
import torch
from image_sets import image_set, noise

from onestage.data.dataset import DetectionDataset, Sample, collate
from onestage.data.resize import Placement, Stretch
from onestage.data.transforms import SeededTransform
from onestage.types import IGNORE, PADDING


def test_sample_has_boxes_in_network_pixels_and_crowds_ignored(tmp_path) -> None:
    boxes = [[[0, 0, 30, 20], [30, 20, 60, 40], [10, 10, 50, 30]]]
    annotations = image_set(tmp_path, [noise(40, 60)], boxes, [[1, 0, 1]])
    annotations.is_crowd[2] = True
    sample = DetectionDataset(annotations, SeededTransform([], Stretch(32)))[0]
    assert (sample.image.shape, sample.image.dtype) == ((3, 32, 32), torch.uint8)
    # 60 x 40 -> 32 x 32: x by 8/15, y by 4/5
    expected = torch.tensor([[0, 0, 16, 16], [16, 16, 32, 32], [16 / 3, 8, 80 / 3, 24]])
    torch.testing.assert_close(sample.boxes, expected, atol=1e-4, rtol=0)
    assert sample.labels.tolist() == [1, 0, IGNORE]
    assert (sample.image_index, sample.original_size) == (0, (40, 60))


def sample_with(num_objects: int, index: int = 0) -> Sample:
    return Sample(
        image=torch.full((3, 4, 4), index, dtype=torch.uint8),
        boxes=torch.ones(num_objects, 4) * (index + 1),
        labels=torch.arange(num_objects),
        image_index=index,
        original_size=(10 + index, 20 + index),
        placement=Placement(0.4, 0.2),
    )


@pytest.mark.parametrize(("num_objects", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32), (33, 48)])
def test_collate_pads_to_a_multiple_of_sixteen(num_objects, padded) -> None:
    batch = collate([sample_with(0), sample_with(num_objects)])
    assert batch.targets.boxes.shape == (2, padded, 4)
    assert batch.targets.labels.shape == (2, padded)
    assert batch.targets.labels[0].tolist() == [PADDING] * padded
    assert batch.targets.labels[1].tolist() == [*range(num_objects), *[PADDING] * (padded - num_objects)]
    assert batch.targets.boxes[1, num_objects:].abs().sum() == 0


def test_collate_keeps_order_types_and_layout() -> None:
    batch = collate([sample_with(1, 5), sample_with(2, 3)])
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[:, 0, 0, 0].tolist() == [5, 3]
    assert batch.targets.boxes[:, 0, 0].tolist() == [6, 4]
    assert (batch.targets.boxes.dtype, batch.targets.labels.dtype) == (torch.float32, torch.int64)
    assert (batch.image_indices.tolist(), batch.image_indices.dtype) == ([5, 3], torch.int64)
    assert (batch.original_sizes.tolist(), batch.original_sizes.dtype) == ([[15, 25], [13, 23]], torch.int64)
