"""What makes a resumed run say that its data is not the same, and what does not."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onestage.data.coco import parse_coco
from onestage.data.shapes import draw_shapes
from onestage.reliability import resume
from onestage.reliability.resume import fingerprints
from onestage.types import AnnotationSet


def read(folder: Path) -> AnnotationSet:
    return parse_coco(folder / "annotations" / "instances_train.json", folder / "JPEGImages")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_shapes(tmp_path / "one", num_train=5, num_val=1, seed=0)
    return tmp_path / "one"


def image(folder: Path, row: int = 2) -> Path:
    return Path(str(read(folder).image_paths[row]))


def edit_a_byte(path: Path) -> None:
    """In the middle, with the size and the time of change that it had."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_copy_elsewhere_of_another_time_is_the_same_data(folder: Path) -> None:
    copy = shutil.copytree(folder, folder.parent / "two")
    os.utime(image(copy), (0, 0))
    assert fingerprints(read(copy)) == fingerprints(read(folder))


def test_a_byte_of_an_image_changes_its_fingerprint_alone(folder: Path) -> None:
    before = fingerprints(read(folder))
    edit_a_byte(image(folder))
    after = fingerprints(read(folder))
    assert after["image_fingerprint"] != before["image_fingerprint"]
    assert after["data_fingerprint"] == before["data_fingerprint"]


def test_two_images_that_change_places_are_other_data(folder: Path) -> None:
    before = fingerprints(read(folder))
    one, other = image(folder, 0), image(folder, 1)
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)
    assert fingerprints(read(folder))["image_fingerprint"] != before["image_fingerprint"]


def test_an_image_that_is_gone_is_no_error_here(folder: Path) -> None:
    annotations = read(folder)
    before = fingerprints(replace(annotations))
    image(folder).unlink()
    assert fingerprints(replace(annotations))["image_fingerprint"] != before["image_fingerprint"]


def test_a_pipe_in_place_of_an_image_is_not_waited_for(folder: Path) -> None:
    annotations = read(folder)
    image(folder).unlink()
    os.mkfifo(str(annotations.image_paths[2]))
    assert fingerprints(annotations)["image_fingerprint"].startswith("bytes:")


def test_of_a_large_set_only_sizes_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(Path(path).stat().st_size for path in read(folder).image_paths.tolist())
    monkeypatch.setattr(resume, "READ_BYTES", total)
    assert fingerprints(read(folder))["image_fingerprint"].startswith("bytes:")
    monkeypatch.setattr(resume, "READ_BYTES", total - 1)
    before = fingerprints(read(folder))["image_fingerprint"]
    assert before.startswith("sizes:")
    edit_a_byte(image(folder))
    assert fingerprints(read(folder))["image_fingerprint"] == before  # the price, and docs/reliability.md says so
    with image(folder).open("ab") as file:
        file.write(b"\0")
    assert fingerprints(read(folder))["image_fingerprint"] != before


def test_a_box_or_a_label_changes_the_fingerprint_of_the_annotations_alone(folder: Path) -> None:
    annotations = read(folder)
    before = fingerprints(annotations)
    boxes = annotations.boxes.copy()
    boxes[0, 2] += 0.5
    for changed in (replace(annotations, boxes=boxes), replace(annotations, labels=(annotations.labels + 1) % 6)):
        after = fingerprints(changed)
        assert after["data_fingerprint"] != before["data_fingerprint"]
        assert after["image_fingerprint"] == before["image_fingerprint"]
    assert np.array_equal(annotations.boxes, read(folder).boxes)
