"""Folders of images without annotations."""

import os
from pathlib import Path

import pytest

from onestage.data.annotations import start_messages
from onestage.data.folder import ImageFolder
from onestage.errors import DataError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"never opened")


def test_images_of_a_folder_and_those_below_it_are_sorted_and_numbered(tmp_path) -> None:
    names = ["b.jpg", "a.PNG", "sub/deep/c.webp", "sub/d.jpeg"]
    touch(*(tmp_path / name for name in [*names, "notes.txt", ".hidden.jpg", ".cache/e.jpg"]))
    annotations = ImageFolder(tmp_path).read("test", ["cat", "dog"])
    assert annotations.image_paths.tolist() == [str(tmp_path / name) for name in sorted(names)]
    assert annotations.image_ids.tolist() == [1, 2, 3, 4]
    assert annotations.sizes.tolist() == [[0, 0]] * 4
    assert annotations.box_offsets.tolist() == [0] * 5
    assert annotations.boxes.shape == (0, 4)
    assert (annotations.class_names, annotations.category_ids) == (("cat", "dog"), (1, 2))


def test_what_is_not_read_is_named_or_counted_and_a_link_back_ends(tmp_path) -> None:
    touch(tmp_path / "a.jpg")
    (tmp_path / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "b.jpg")
    touch(tmp_path / "d.avif", tmp_path / "sub" / "e.JP2")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nothing")
    annotations = ImageFolder(tmp_path).read("test")
    assert len(annotations) == 1
    assert [line.partition(":")[0] for line in annotations.skipped] == [str(tmp_path / n) for n in ("b.jpg", "c.jpg")]
    warning, of_link = start_messages(annotations.findings[2:], "")
    assert f"{tmp_path}: 1 folders are links, which are not searched, such as {tmp_path / 'again'}" in of_link
    assert f"{tmp_path}: 2 images are of a type that is not read (.avif .jp2), such as" in warning


@pytest.mark.parametrize("kind", ["missing", "texts", "pipe"])
def test_no_image_is_an_error_with_place_rule_and_remedy(tmp_path, kind) -> None:
    touch(tmp_path / "texts" / "notes.txt")
    os.mkfifo(tmp_path / "pipe")
    place = tmp_path / kind
    message = r"(holds no images \(\.jpg|neither folder nor image)(.|\n)*data\.predict_dir"
    with pytest.raises(DataError, match=message) as caught:
        ImageFolder(place).read("test")
    assert str(caught.value).startswith(str(place))
