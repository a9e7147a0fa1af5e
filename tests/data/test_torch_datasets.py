"""torch data sets as a source."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.tv_tensors import BoundingBoxes

from onestage.data import TorchDatasets, from_datasets
from onestage.errors import AnnotationError, ConfigError, ImageError

NAMES = ["cat", "dog"]


def sample(labels: list[int], image: Any = None, **more: Any) -> tuple[Any, dict[str, Any]]:
    boxes = torch.tensor([[1.0, 2, 9, 8]] * len(labels)).reshape(-1, 4)
    image = Image.new("RGB", (20, 10), (255, 0, 0)) if image is None else image
    return image, {"boxes": boxes, "labels": torch.tensor(labels), **more}


def read(*items: Any, **settings: Any) -> Any:
    return TorchDatasets(list(items), **{"class_names": NAMES, **settings}).read("train")


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        ([0, 1], {}, [0, 1]),
        ([1, 2], {}, [0, 1]),  # torchvision's: 0 is the background
        ([0], {}, [0]),
        ([1], {"first_label": 1}, [0]),
        ([1], {"class_names": ["__background__", *NAMES]}, [0]),
    ],
)
def test_labels_count_from_zero_or_from_one(labels, settings, expected):
    annotations = read(sample(labels), **settings)
    assert annotations.labels.tolist() == expected
    assert annotations.class_names == tuple(NAMES)


def test_boxes_sizes_crowds_and_images_without_objects_are_read():
    annotations = read(sample([0, 1], iscrowd=torch.tensor([0, 1]), area=torch.tensor([5.0, 6.0])), sample([]))
    assert annotations.sizes.tolist() == [[10, 20], [10, 20]]
    assert annotations.boxes.tolist() == [[1, 2, 9, 8]] * 2
    assert annotations.is_crowd.tolist() == [False, True]
    assert annotations.areas.tolist() == [5, 6]
    assert annotations.box_offsets.tolist() == [0, 2, 2]
    image, target = sample([0])
    boxes = BoundingBoxes([[5, 5, 8, 6]], format="CXCYWH", canvas_size=(10, 20))  # type: ignore[call-overload]
    assert read((image, {**target, "boxes": boxes}), first_label=0).boxes.tolist() == [[1, 2, 9, 8]]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (20, 10), (255, 0, 0)),
        np.full((10, 20, 3), (255, 0, 0), np.uint8),
        torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 10, 20),
        torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 20),
    ],
)
def test_images_of_every_kind_reach_the_network_as_uint8_rgb(image):
    pairs = [sample([0], image)]
    data = from_datasets(pairs, pairs, class_names=NAMES, image_size=32, num_workers=0, batch_size=1)
    assert data.read_image("train", 0).tolist() == [[[255, 0, 0]] * 20] * 10
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape == (1, 3, 32, 32)
    assert batch.images[0, :, 16, 16].tolist() == [255, 0, 0]
    assert batch.targets.boxes[0, 0].tolist() == pytest.approx([1.6, 6.4, 14.4, 25.6])  # x times 1.6, y times 3.2


@pytest.mark.parametrize(
    ("items", "settings", "message"),
    [
        ([sample([1])], {}, "may count from 0 or from 1.*first_label=1"),
        ([sample([0, 2])], {}, r"labels must be in 0\.\.1, got 0\.\.2"),
        ([(Image.new("RGB", (4, 4)), 3)], {}, r"train\[0\]: a sample must be"),
        ([(Image.new("RGB", (4, 4)), {"boxes": []})], {}, r"got \['boxes'\]"),
        ([sample([0, 0]), (Image.new("RGB", (4, 4)), {"boxes": [[1, 1, 2, 2]], "labels": []})], {}, "1 boxes and 0"),
        ([sample([0], torch.full((3, 9, 9), 2.0))], {}, r"floats in \[0, 1\], got float32 of 2\.\.2"),
        ([sample([0], Image.new("I;16", (9, 9)))], {}, r"must be RGB, got shape \(9, 9\)"),
        ([sample([0], np.zeros((9, 9, 4), np.uint8))], {}, r"must be RGB, got shape \(9, 9, 4\)"),
        ([], {}, "a length > 0"),
    ],
)
def test_unusable_samples_are_named_with_a_remedy(items, settings, message):
    with pytest.raises((AnnotationError, ConfigError), match=rf"(?s){message}"):
        read(*items, **settings)


def test_sample_that_fails_or_changes_its_size_is_an_unreadable_image():
    class Changing(list):
        broken = False

        def __getitem__(self, index: int) -> Any:
            if self.broken and index == 1:
                raise OSError("disk gone")
            return sample([0], Image.new("RGB", (9, 9))) if self.broken else super().__getitem__(index)

    samples = Changing([sample([0]), sample([0])])
    data = from_datasets(samples, class_names=NAMES, num_workers=0, first_label=0, val_fraction=0.5)
    ids = data.annotations("train").image_ids.tolist()
    Changing.broken = True
    expected = "is now 9 x 9 px" if ids == [1] else "disk gone"
    with pytest.raises(ImageError, match=expected):
        data.read_image("train", 0)
