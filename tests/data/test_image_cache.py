import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from onestage.data import disk_cache, memory_cache
from onestage.data.cache_folder import cache_folder
from onestage.data.dataset import DetectionDataset
from onestage.data.disk_cache import DiskCache
from onestage.data.image_cache import open_images
from onestage.data.image_reader import FileReader, copy_size, written_bytes
from onestage.data.memory_cache import MemoryCache, SharedMemory, available_memory
from onestage.data.transforms import SeededTransform, resize_transforms
from onestage.errors import ConfigError, ImageError
from onestage.types import AnnotationSet

SIZES = [(90, 120), (120, 90), (30, 50), (200, 60)]


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    paths = []
    for number, (height, width) in enumerate(SIZES):
        paths.append(str(tmp_path / f"{number}.png"))
        cv2.imwrite(paths[-1], smooth(height, width, number))
    return AnnotationSet(
        source="hand-written",
        image_paths=np.array(paths),
        image_ids=np.arange(4),
        sizes=np.array(SIZES, dtype=np.int32),
        box_offsets=np.arange(5),
        boxes=np.array([[10, 10, 50, 30]] * 4, dtype=np.float32),
        labels=np.zeros(4, dtype=np.int64),
        areas=np.ones(4, dtype=np.float32),
        is_crowd=np.zeros(4, dtype=bool),
        is_difficult=np.zeros(4, dtype=bool),
        class_names=("a",),
        category_ids=(1,),
    )


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


@pytest.mark.parametrize(
    ("size", "copy"), [((90, 120), (40, 53)), ((120, 90), (53, 40)), ((30, 50), (30, 50)), ((40, 400), (40, 400))]
)
def test_copy_has_the_short_side_or_is_as_large_as_the_image(size: tuple, copy: tuple) -> None:
    assert copy_size(size, 40) == copy


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_copy_is_close_to_the_image_and_keeps_its_original_size(
    annotations: AnnotationSet, folder: Path, kind: Any
) -> None:
    reader = open_images(kind, annotations, 30)  # copies have a short side of 40
    for index, size in enumerate(SIZES):
        expected_size = copy_size(size, 40)
        image = reader.read(index)
        assert image.original_size == size
        assert image.pixels.shape == (*expected_size, 3)
        exact = cv2.cvtColor(cv2.imread(annotations.image_paths[index]), cv2.COLOR_BGR2RGB)
        exact = cv2.resize(exact, expected_size[::-1], interpolation=cv2.INTER_AREA)
        difference = np.abs(exact.astype(int) - image.pixels)
        assert difference.max() == 0 if kind == "ram" or size == expected_size else difference.mean() < 4


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_second_read_comes_from_the_copy_and_gives_the_same_bytes(
    annotations: AnnotationSet, folder: Path, kind: Any
) -> None:
    reader = open_images(kind, annotations, 30)
    first = [reader.read(index).pixels for index in range(4)]
    for index in (0, 1, 3):  # image 2 is small, so its file is its copy on disk
        break_file(annotations, index)
    assert all(np.array_equal(reader.read(index).pixels, first[index]) for index in range(4))
    with pytest.raises(ImageError):
        FileReader(annotations).read(0)
    if kind == "disk":  # and another training finds it
        other = open_images(kind, annotations, 30)
        assert all(np.array_equal(other.read(index).pixels, first[index]) for index in range(4))


def test_disk_copy_of_another_state_of_the_file_is_never_used(annotations: AnnotationSet, folder: Path) -> None:
    reader = open_images("disk", annotations, 30)
    before = reader.read(0).pixels
    path = Path(annotations.image_paths[0])
    status = path.stat()
    cv2.imwrite(str(path), 255 - smooth(90, 120, 0))
    assert np.abs(reader.read(0).pixels.astype(int) - before).mean() > 20
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(copies(folder)) == 2
    reader.read(0)
    assert len(copies(folder)) == 3  # the same pixels at another time are another state
    open_images("disk", annotations, 36).read(0)
    assert len(copies(folder)) == 4  # and so is another size of the copies


def test_damaged_disk_copy_is_made_again(annotations: AnnotationSet, folder: Path) -> None:
    reader = open_images("disk", annotations, 30)
    expected = reader.read(0).pixels
    (copy,) = copies(folder)
    content = copy.read_bytes()
    for damaged in (b"", content[:10], content[:-20], content[:-1] + b"\0", b"x" * len(content)):
        copy.write_bytes(damaged)
        assert np.array_equal(reader.read(0).pixels, expected)
        assert copy.read_bytes() == content


def test_disk_that_becomes_full_costs_no_training(
    annotations: AnnotationSet, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = open_images("disk", annotations, 30).read(0).pixels
    (copy,) = copies(folder)
    copy.unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    reader = open_images("disk", annotations, 30)
    monkeypatch.setattr(Path, "replace", fail)
    assert np.array_equal(reader.read(0).pixels, expected)  # the same samples, with and without room
    assert copies(folder) == []
    assert "No space left on device" in caplog.text


def test_size_is_told_beforehand_and_too_little_room_is_refused(
    annotations: AnnotationSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for module in (disk_cache, memory_cache):
        monkeypatch.setattr(module, "rank_zero_info", said.append)
    open_images("ram", annotations, 30, num_processes=2)
    # 40 x 53, 53 x 40, 30 x 50 and 133 x 40 pixels of three bytes, and a byte for each image; of two processes
    assert written_bytes(2 * (3 * (2 * 40 * 53 + 30 * 50 + 133 * 40) + 4)) in said[-1]
    reader = DiskCache(annotations, 40, folder)
    told = re.search(r"hold about ([\d.]+) MB", said[-1])
    for index in range(4):
        reader.read(index)
    assert float(told[1]) * 1e6 == pytest.approx(sum(copy.stat().st_size for copy in copies(folder)), abs=1e4)
    DiskCache(annotations, 200, folder)
    assert "nothing to do: images have short sides of 200 px or less" in said[-1]
    monkeypatch.setattr(memory_cache, "available_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"data.cache: ram would need .*\n.*data.cache: disk"):
        MemoryCache(annotations, 40, 1)
    monkeypatch.setattr(disk_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ConfigError, match=r"data.cache: disk would need .*\n.*XDG_CACHE_HOME"):
        DiskCache(annotations, 40, folder)


def test_cache_folder_that_cannot_be_made_is_refused(
    annotations: AnnotationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME to another folder"):
        open_images("disk", annotations, 30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "onestage"


def test_unfinished_copies_of_killed_processes_are_removed(annotations: AnnotationSet, folder: Path) -> None:
    old, new = folder / "ab" / ".unfinished-1", folder / "ab" / ".unfinished-2"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    open_images("disk", annotations, 30)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_unreadable_images_are_named_as_without_a_cache(annotations: AnnotationSet, folder: Path, kind: Any) -> None:
    reader = open_images(kind, annotations, 30)
    Path(annotations.image_paths[1]).write_bytes(b"no image")
    Path(annotations.image_paths[3]).unlink()
    for index in (1, 3):
        with pytest.raises(ImageError, match=re.escape(annotations.image_paths[index])):
            reader.read(index)


def test_memory_cache_reads_images_of_unknown_size_from_their_files(
    annotations: AnnotationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations.sizes[0] = 0
    said: list[str] = []
    monkeypatch.setattr(memory_cache, "rank_zero_info", said.append)
    reader = MemoryCache(annotations, 40, 1)
    assert "1 of unknown size are not kept" in said[0]
    assert reader.read(0).pixels.shape == (90, 120, 3)


@pytest.mark.parametrize("start_method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_the_memory(annotations: AnnotationSet, start_method: str) -> None:
    cached = DetectionDataset(
        annotations, SeededTransform(resize_transforms(30), 30), images=MemoryCache(annotations, 40, 1)
    )
    expected = [cached[index] for index in (0, 1)]  # these two are in the cache now
    for index in (0, 1):
        break_file(annotations, index)
    loader = DataLoader(
        cached,
        batch_size=None,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context(start_method),
    )
    samples = list(loader)
    assert all(torch.equal(samples[index].image, expected[index].image) for index in (0, 1))
    for index in (2, 3):  # what a worker has cached, this process can read
        break_file(annotations, index)
        assert torch.equal(cached[index].image, samples[index].image)


def test_boxes_of_a_copy_are_where_those_of_the_file_are(annotations: AnnotationSet, folder: Path) -> None:
    plain = DetectionDataset(annotations, SeededTransform(resize_transforms(30), 30))
    for kind in ("disk", "ram"):
        cached = DetectionDataset(annotations, plain.transform, images=open_images(kind, annotations, 30))
        for index in range(4):
            a, b = plain[index], cached[index]
            torch.testing.assert_close(a.boxes, b.boxes, atol=1e-4, rtol=0)
            assert a.original_size == b.original_size
            assert (a.image.float() - b.image.float()).abs().mean() < 6


def test_shared_memory_reads_what_was_written() -> None:
    memory = SharedMemory(100)
    assert memory.read(10, 3) == b"\0\0\0"
    memory.write(97, b"abc")
    assert memory.read(96, 4) == b"\0abc"


def test_available_memory_is_a_positive_number_of_bytes() -> None:
    assert 1e7 < available_memory() < 1e14
