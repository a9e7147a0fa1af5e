"""Copies on disk: as good as the file, never those of another file, and no reason to stop a training."""

import os
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from image_sets import image_set, smooth

from onestage.data import cache
from onestage.data.cache import FileReader, cache_folder, open_images
from onestage.data.dataset import DetectionDataset
from onestage.data.resize import Stretch
from onestage.data.transforms import SeededTransform
from onestage.errors import ConfigError, ImageError
from onestage.types import AnnotationSet

SIZES = [(90, 120), (120, 90), (30, 50), (200, 60)]
COPY_SIZES = [(40, 53), (53, 40), (30, 50), (133, 40)]  # short side 40 = 4/3 of the input of 30 px, never enlarged


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    return image_set(tmp_path, [smooth(*size, number) for number, size in enumerate(SIZES)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onestage" / "images"


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def break_file(annotations: AnnotationSet, index: int) -> None:
    """Damage the content and keep size and time: only a copy can still be read."""
    path = Path(annotations.image_paths[index])
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_copy_has_the_short_side_is_close_to_the_image_and_keeps_its_original_size(annotations, folder) -> None:
    reader = open_images("disk", annotations, 30)
    for index, (size, copy_size) in enumerate(zip(SIZES, COPY_SIZES, strict=True)):
        image = reader(index)
        assert image.original_size == size
        assert image.pixels.shape == (*copy_size, 3)
        exact = cv2.resize(smooth(*size, index), copy_size[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(exact.astype(int) - image.pixels).mean() < 4


def test_second_read_comes_from_the_copy_and_gives_the_same_bytes(annotations, folder) -> None:
    reader = open_images("disk", annotations, 30)
    first = [reader(index).pixels for index in range(4)]
    for index in (0, 1, 3):  # image 2 is small, so it is read from its file
        break_file(annotations, index)
    for other in (reader, open_images("disk", annotations, 30)):  # another training finds the copies too
        assert all(np.array_equal(other(index).pixels, first[index]) for index in range(4))
    with pytest.raises(ImageError):
        FileReader(annotations)(0)


def test_copy_of_another_state_of_the_file_is_never_used(annotations, folder) -> None:
    reader = open_images("disk", annotations, 30)
    before = reader(0).pixels
    path = Path(annotations.image_paths[0])
    status = path.stat()
    cv2.imwrite(str(path), 255 - smooth(90, 120, 0))
    assert np.abs(reader(0).pixels.astype(int) - before).mean() > 20
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(copies(folder)) == 2
    reader(0)
    assert len(copies(folder)) == 3  # the same pixels at another time are another state
    open_images("disk", annotations, 36)(0)
    assert len(copies(folder)) == 4  # and so is another size of the copies


def test_copy_that_cannot_be_decoded_is_made_again(annotations, folder) -> None:
    reader = open_images("disk", annotations, 30)
    expected = reader(0).pixels
    (copy,) = copies(folder)
    content = copy.read_bytes()
    for damaged in (b"", content[:10], b"x" * len(content)):
        copy.write_bytes(damaged)
        assert np.array_equal(reader(0).pixels, expected)
        assert copy.read_bytes() == content


def test_disk_that_becomes_full_does_not_change_or_stop_the_training(annotations, folder, monkeypatch, caplog) -> None:
    expected = open_images("disk", annotations, 30)(0).pixels
    (copy,) = copies(folder)
    copy.unlink()
    reader = open_images("disk", annotations, 30)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    assert np.array_equal(reader(0).pixels, expected)
    assert copies(folder) == []
    assert "No space left on device" in caplog.text


def test_a_gigabyte_of_the_disk_stays_free(annotations, folder, monkeypatch) -> None:
    reader = open_images("disk", annotations, 30)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert reader(0).pixels.shape == (*COPY_SIZES[0], 3)
    assert copies(folder) == []


def test_cache_folder_that_cannot_be_made_is_refused(annotations, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME to another folder"):
        open_images("disk", annotations, 30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "onestage"


def test_sample_of_a_copy_has_the_boxes_and_the_placement_of_the_file(annotations, folder) -> None:
    plain = DetectionDataset(annotations, SeededTransform([], Stretch(32)))
    cached = DetectionDataset(annotations, plain.transform, images=open_images("disk", annotations, 32))
    for index in range(4):
        a, b = plain[index], cached[index]
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-4, rtol=1e-4)
        assert (a.original_size, a.placement) == (b.original_size, b.placement)
        assert (a.image.float() - b.image.float()).abs().mean() < 6
