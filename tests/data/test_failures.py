"""Images that fail in training: replaced by the same ones everywhere, counted, reported, and never without a name."""

import logging
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest

from onestage.data.dataset import MAX_SUBSTITUTES, DetectionDataset
from onestage.data.failures import Failure, FailureLog
from onestage.data.loader import DetectionLoader, open_loader
from onestage.data.samplers import TrainingSampler
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError, DataError, ImageError
from onestage.types import AnnotationSet

NUM_IMAGES = 12
DAMAGED = (3, 7)


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    """Twelve small images with one object each, the class of which is the number of the image; two are damaged."""
    paths = []
    for number in range(NUM_IMAGES):
        paths.append(str(tmp_path / f"{number}.jpg"))
        cv2.imwrite(paths[-1], np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for number in DAMAGED:
        Path(paths[number]).write_bytes(b"no image at all")
    return AnnotationSet(
        source="hand-written",
        image_paths=np.array(paths),
        image_ids=np.arange(NUM_IMAGES),
        sizes=np.full((NUM_IMAGES, 2), (30, 40), dtype=np.int32),
        box_offsets=np.arange(NUM_IMAGES + 1),
        boxes=np.full((NUM_IMAGES, 4), (0, 0, 40, 30), dtype=np.float32),
        labels=np.arange(NUM_IMAGES),
        areas=np.ones(NUM_IMAGES, dtype=np.float32),
        is_crowd=np.zeros(NUM_IMAGES, dtype=bool),
        is_difficult=np.zeros(NUM_IMAGES, dtype=bool),
        class_names=tuple("abcdefghijkl"),
        category_ids=tuple(range(NUM_IMAGES)),
    )


def dataset(annotations: AnnotationSet, **settings: object) -> DetectionDataset:
    settings = {"on_error": "skip", "max_bad_fraction": 0.5, **settings}
    return DetectionDataset(annotations, SeededTransform(ssd_transforms(32), 32), seed=5, **settings)


def loader(annotations: AnnotationSet, num_workers: int = 0, **settings: object) -> DetectionLoader:
    split = dataset(annotations, **settings)
    sampler = TrainingSampler(split, batch_size=4, seed=5)
    return open_loader(
        split,
        sampler,
        batch_size=4,
        num_workers=num_workers,
        prefetch_factor=2,
        timeout_seconds=300.0,
        start_method="fork" if num_workers else None,
    )


def epoch_bytes(loader: DetectionLoader, epoch: int) -> list[bytes]:
    loader.sampler.set_epoch(epoch)
    return [
        b"".join(
            tensor.contiguous().numpy().tobytes() for tensor in (batch.images, *batch.targets, batch.image_indices)
        )
        for batch in loader
    ]


def test_substitute_is_a_whole_other_sample_that_seed_epoch_and_index_decide(annotations: AnnotationSet) -> None:
    split, again = dataset(annotations), dataset(annotations)
    again[0, 1]
    taken = set()
    for epoch in range(30):
        sample, other = split[epoch, 3], again[epoch, 3]
        assert sample.image.numpy().tobytes() == other.image.numpy().tobytes()
        assert sample.image_index == other.image_index not in DAMAGED
        assert set(sample.labels.tolist()) <= {sample.image_index}  # its own object, not that of the damaged one
        assert sample.failures[0].image_index == 3
        assert annotations.image_paths[3] in sample.failures[0].message
        taken.add(sample.image_index)
    assert len(taken) > 6  # not always the same one
    assert split[0, 1].failures == ()


def test_samples_with_substitutes_are_the_same_for_any_number_of_workers(annotations: AnnotationSet) -> None:
    settings = {"mosaic": 0.3, "mixup": 0.3}
    expected = [epoch_bytes(loader(annotations, **settings), epoch) for epoch in range(2)]
    for num_workers in (1, 2):
        workers = loader(annotations, num_workers, **settings)
        assert [epoch_bytes(workers, epoch) for epoch in range(2)] == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failures_are_counted_and_reported_at_the_end_of_each_epoch(
    annotations: AnnotationSet, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    split = loader(annotations, num_workers)
    assert len(epoch_bytes(split, 0)) == 3
    at_once = [message for message in caplog.messages if "an image was left out" in message]
    assert len(at_once) == 2  # both images of the epoch
    assert caplog.messages[-1].startswith(
        "epoch 0: 2 times an image could not be read and another took its place; so far 2 of the 12 images of "
        "hand-written have failed:"
    )
    assert all(annotations.image_paths[number] in caplog.messages[-1] for number in DAMAGED)
    caplog.clear()
    epoch_bytes(split, 1)
    assert [message[:16] for message in caplog.messages] == ["epoch 1: 2 times"]  # each image is told at once only once


def test_epoch_cut_short_reports_too(annotations: AnnotationSet, caplog: pytest.LogCaptureFixture) -> None:
    split = loader(annotations)
    iterator = iter(split)
    while "an image was left out" not in caplog.text:
        next(iterator)
    iterator.close()
    assert "epoch 0: " in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_more_failures_than_allowed_stop_the_run(annotations: AnnotationSet, num_workers: int) -> None:
    split = loader(annotations, num_workers, max_bad_fraction=0.1)  # one of twelve
    with pytest.raises(DataError, match=r"hand-written: 2 of 12 images could not be read, more than data.max_bad_frac"):
        epoch_bytes(split, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_raise_names_the_file(annotations: AnnotationSet, num_workers: int) -> None:
    with pytest.raises(ImageError, match=r"[37]\.jpg: is not an image"):
        epoch_bytes(loader(annotations, num_workers, on_error="raise"), 0)


def test_failing_partner_is_replaced_like_any_other(annotations: AnnotationSet) -> None:
    split = dataset(annotations, mosaic=1.0)
    failures = [failure.image_index for epoch in range(10) for failure in split[epoch, 0].failures]
    assert set(failures) == set(DAMAGED)


def test_set_without_a_readable_image_ends_with_the_name_of_one(annotations: AnnotationSet) -> None:
    for path in annotations.image_paths:
        Path(path).write_bytes(b"")
    with pytest.raises(ImageError, match=r"\d+\.jpg"):
        dataset(annotations)[0, 0]
    assert MAX_SUBSTITUTES < 20


def test_transform_that_fails_is_named_with_the_file(annotations: AnnotationSet) -> None:
    transform = SeededTransform([A.RandomCrop(height=500, width=500, pad_if_needed=False)], 32)
    with pytest.raises(ConfigError, match=r"4\.jpg: data\.train_transforms failed on an image of 40 x 30 pixels"):
        DetectionDataset(annotations, transform, on_error="skip")[0, 4]


def test_log_of_many_failures_quotes_three(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog("a.json", 1000, 0.01)
    with caplog.at_level(logging.WARNING):
        log.add([Failure(number, f"{number}.jpg: is damaged\nReplace it.") for number in range(10)])
    assert len(caplog.messages) == 3
    log.end_epoch(4)
    assert caplog.messages[-1].splitlines()[1:] == [*(f"  {n}.jpg: is damaged" for n in range(3)), "  and 7 more"]
    log.end_epoch(5)
    assert len(caplog.messages) == 4  # nothing new, nothing to say
    with pytest.raises(DataError, match="11 of 1000 images"):
        log.add([Failure(10, "10.jpg")])
