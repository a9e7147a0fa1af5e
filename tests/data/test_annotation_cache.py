import json
import os
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from onestage.data import COCODataModule, annotation_cache, coco_file
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that takes files of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "MIN_BYTES", 0)
    monkeypatch.setattr(coco_file, "MANY_BYTES", 0)
    return tmp_path / "cache" / "onestage" / "annotations"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_coco(tmp_path / "set")
    for folder in (tmp_path / "set" / "train", tmp_path / "set" / "train" / "sub"):
        os.utime(folder, (1e9, 1e9))  # not changed just now
    return tmp_path / "set"


def write_coco(root: Path, **changes: object) -> None:
    """Two images, one in a folder of its own; two boxes, of which one has no width."""
    (root / "train" / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (root / "train" / name).touch()
    boxes = [[1, 2, 10, 20], [3, 4, 0, 5]]
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 40},
            {"id": 2, "file_name": "sub/b.jpg", "width": 40, "height": 40},
            {"id": 3, "file_name": "gone.jpg", "width": 40, "height": 40},
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 7, "bbox": bbox, "area": 99, "iscrowd": 0}
            for n, bbox in enumerate(boxes, 1)
        ],
        "categories": CATEGORIES,
        **changes,
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def parse(root: Path, **settings: object) -> AnnotationSet:
    return COCODataModule(root, train="train", **settings).annotations("train")


def assert_equal(first: AnnotationSet, second: AnnotationSet) -> None:
    for field in fields(AnnotationSet):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(a, b), field.name
        else:
            assert a == b, field.name


def never(*_args: object, **_settings: object) -> AnnotationSet:
    raise AssertionError("parsed once more")


def test_second_start_takes_everything_from_the_cache(cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = parse(root)
    assert len(first.skipped) == 2
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("onestage.data.coco_datamodule.parse_coco", never)
    assert_equal(first, parse(root))
    with pytest.raises(AssertionError, match="parsed once more"):
        parse(root, max_bad_fraction=0.5)
    with pytest.raises(AssertionError, match="parsed once more"):
        parse(root, class_names=["dog", "cat"])


def test_change_of_the_file_that_keeps_its_size_and_date_is_noticed(cache: Path, root: Path) -> None:
    file = root / "annotations" / "instances_train.json"
    before = file.stat()
    assert parse(root).labels.tolist() == [1]
    file.write_text(file.read_text().replace('"category_id": 7', '"category_id": 3'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert parse(root).labels.tolist() == [0]


@pytest.mark.parametrize("folder", ["train", "train/sub"])
def test_image_that_comes_or_goes_is_noticed(cache: Path, root: Path, folder: str) -> None:
    assert len(parse(root)) == 2
    if folder == "train":
        (root / "train" / "gone.jpg").touch()
        assert len(parse(root)) == 3
    else:
        (root / "train" / "sub" / "b.jpg").unlink()
        assert len(parse(root)) == 1


def test_folder_that_changes_while_it_is_read_is_not_kept(cache: Path, root: Path) -> None:
    os.utime(root / "train", ns=(time.time_ns() + 10**9,) * 2)
    parse(root)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_damaged_entry_is_parsed_again_and_replaced(cache: Path, root: Path, content: bytes | None) -> None:
    first = parse(root)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(content if content is not None else whole[: len(whole) // 2])
    assert_equal(first, parse(root))
    assert entry.read_bytes()[:2] == b"PK"
    assert len(entry.read_bytes()) == len(whole)


def test_entry_with_a_pickle_in_it_is_not_unpickled(cache: Path, root: Path) -> None:
    first = parse(root)
    (entry,) = cache.iterdir()
    with np.load(entry) as stored:
        arrays = dict(stored)
    arrays["boxes"] = np.array([{"any": "object"}], dtype=object)
    np.savez(entry, **arrays)
    assert_equal(first, parse(root))


def test_cache_that_cannot_be_written_stops_nothing(
    cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(parse(root)) == 2


def test_oldest_entries_are_removed(cache: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_cache, "MAX_ENTRIES", 2)
    for number in range(4):
        parse(root, max_bad_fraction=0.5 + number / 10)
        for age, entry in enumerate(sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(entry, (1e9 + 10 * number + age,) * 2)
    assert len(list(cache.iterdir())) == 2


def test_small_files_are_not_kept(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parse(root)
    assert not (tmp_path / "cache").exists()


def test_error_of_the_file_is_the_same_with_the_cache(cache: Path, root: Path) -> None:
    (root / "annotations" / "instances_train.json").write_text('{"images": [1,\n,]}')
    with pytest.raises(AnnotationError, match=r"instances_train\.json:2:1: is not JSON"):
        parse(root)
    with pytest.raises(AnnotationError, match=r"cannot be read: No such file"):
        parse(root / "gone")
    assert not cache.exists()


# -- large files are parsed without their outlines ---------------------------------------------------------------------

POLYGON = [[1, 2.5, 3e1, -4], [5, 6, 7, 8]]
RLE = {"counts": [3, 4], "size": [2, 2]}
TRAP = 'a "segmentation": [[1, 2]], "x'


@pytest.mark.parametrize(
    "entry",
    [
        {"segmentation": POLYGON, "id": 1},
        {"id": 1, "segmentation": POLYGON},  # last of its object
        {"segmentation": [], "id": 1},
        {"segmentation": RLE, "id": 1},
        {"id": 1, "note": TRAP, "segmentation": POLYGON, "name": "]"},
    ],
)
def test_outlines_are_left_out_and_nothing_else(entry: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_file, "MANY_BYTES", 0)
    file = tmp_path / "coco.json"
    content = {"images": [{"id": 1}], "annotations": [entry, entry], "categories": [{"id": 1, "note": TRAP}]}
    for indent in (None, 2):
        file.write_text(json.dumps(content, indent=indent))
        images, annotations, categories = coco_file.load_tables(file, with_outlines=False)
        assert (images, categories) == (content["images"], content["categories"])
        for read in annotations:
            assert {k: v for k, v in read.items() if k != "segmentation"} == {
                k: v for k, v in entry.items() if k != "segmentation"
            }
        assert coco_file.load_tables(file)[1] == [entry, entry]
    assert "segmentation" not in annotations[0] or entry["segmentation"] is RLE or list(entry)[-1] == "segmentation"


def test_line_and_column_of_an_error_are_those_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_file, "MANY_BYTES", 0)
    file = tmp_path / "coco.json"
    file.write_text('{"annotations": [{"segmentation": [[1,\n2]], "id": 1},\n x]}')
    with pytest.raises(AnnotationError, match=r"coco\.json:3:2: is not JSON"):
        coco_file.load_tables(file, with_outlines=False)
