"""Conversions between COCO, VOC and YOLO: the boxes, the losses that are counted, and all or nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from bad_data import write_image
from command_line import message_of
from image_sets import exif_of
from layout_files import edit_json
from PIL import Image
from pycocotools import coco as pycocotools

from onestage.cli import main
from onestage.convert.conversion import convert_splits
from onestage.data.layouts import find_splits, read_splits, recognise
from onestage.data.writers import Losses
from onestage.errors import ConfigError, DataError
from onestage.types import AnnotationSet

TOLERANCE = 0.51  # px; a coordinate rounded to whole pixels moves by half of one


def write_source(root: Path) -> list[Path]:
    """Write a COCO set of two splits with everything that is hard to carry; return its annotation files."""
    categories = [{"id": 3, "name": "cat & dog"}, {"id": 7, "name": "zebra"}, {"id": 9, "name": "unused"}]
    objects = [
        # image, category, bbox, area, crowd
        (1, 3, [4.25, 6.5, 20.125, 10], 100.5, 0),
        (1, 7, [0, 0, 40, 20], 800, 0),
        (1, 7, [0, 0, 40, 20], 800, 0),  # the same once more
        (2, 3, [10, 5, 0.5, 0.25], 0.125, 0),  # less than a pixel
        (2, 7, [1, 2, 30, 15], 450, 1),
        (3, 7, [39, 19, 1, 1], 1, 0),  # the last pixel
    ]
    files = []
    for split in ("train2017", "val2017"):
        names = ["a.png", "sub/a.png", "image 1.png", "empty.png"]
        for seed, name in enumerate(names):
            write_image(root / split / name, seed, (20, 40))
        content = {
            "images": [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names, 1)],
            "annotations": [
                {"id": n, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd}
                for n, (image, category, bbox, area, crowd) in enumerate(objects, 1)
            ],
            "categories": categories,
        }
        (root / "annotations").mkdir(exist_ok=True)
        files.append(root / "annotations" / f"instances_{split}.json")
        files[-1].write_text(json.dumps(content))
    return files


def read(path: Path, split: str = "train") -> AnnotationSet:
    return recognise(path).read(split)


def run_conversion(source: list[Path], to: str, out: Path, **options: object) -> Losses:
    return convert_splits(find_splits(source), to, out, **options).losses


def objects_of(annotations: AnnotationSet, row: int) -> list[tuple[str, list[float]]]:
    """Return class and box of every object of an image, sorted."""
    rows = annotations.objects(row)
    names = [annotations.class_names[label] for label in annotations.labels[rows]]
    return sorted(zip(names, annotations.boxes[rows].tolist(), strict=True))


def assert_same(before: AnnotationSet, after: AnnotationSet, tolerance: float = TOLERANCE) -> None:
    """Check for the same images, as files, and the same objects in each."""
    assert len(before) == len(after)
    row_of_content = {Path(path).read_bytes(): row for row, path in enumerate(after.image_paths.tolist())}
    for row, path in enumerate(before.image_paths.tolist()):
        other = row_of_content[Path(path).read_bytes()]
        assert after.sizes[other].tolist() == before.sizes[row].tolist()
        old, new = objects_of(before, row), objects_of(after, other)
        assert [name for name, _ in old] == [name for name, _ in new]
        for (_, box), (_, moved) in zip(old, new, strict=True):
            assert np.abs(np.subtract(box, moved)).max() <= tolerance


def test_coco_to_coco_keeps_every_number(tmp_path) -> None:
    write_source(tmp_path / "in")
    losses = run_conversion([tmp_path / "in"], "coco", tmp_path / "out")
    assert losses == {"images get another name": 4}  # sub/a and `image 1`
    for split in ("train", "val"):
        before, after = read(tmp_path / "in", split), read(tmp_path / "out", split)
        assert_same(before, after, tolerance=0)
        for name in ("boxes", "labels", "areas", "is_crowd", "image_ids", "sizes"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
        assert (before.class_names, before.category_ids) == (after.class_names, after.category_ids)
    coco = pycocotools.COCO(str(tmp_path / "out/annotations/instances_val.json"))  # other tools read the files
    assert sorted(len(coco.imgToAnns[image]) for image in coco.imgs) == [0, 1, 2, 3]


def test_coco_to_coco_writes_a_cleaned_copy(tmp_path, capsys) -> None:
    files = write_source(tmp_path / "in")
    edit_json(files[0], "annotations", [0], bbox=[1, 2, -30, 15], id=0)
    Path(tmp_path / "in/train2017/empty.png").unlink()
    words = ["--to", "coco", "--out", str(tmp_path / "out"), "--max_bad_fraction", "0.5"]
    assert main(["convert", str(files[0]), *words]) == 0
    assert "skipped, because it cannot be used (2; see all" in capsys.readouterr().out
    clean = read(tmp_path / "out")
    assert (len(clean), len(clean.boxes), clean.findings) == (3, 5, ())


def test_too_many_unreadable_images_stop_with_the_option_of_the_command(tmp_path, capsys) -> None:
    files = write_source(tmp_path / "in")
    for image in (tmp_path / "in/train2017").rglob("*.*"):
        image.write_bytes(image.read_bytes()[:200])
    assert main(["convert", str(files[0]), "--to", "coco", "--out", str(tmp_path / "out")]) == 3
    assert "none of its 4 images can be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_coco_to_voc_counts_losses(tmp_path) -> None:
    losses = run_conversion(write_source(tmp_path / "in"), "voc", tmp_path / "out")
    assert losses == {
        "images get another name": 6,  # sub/a and `image 1`, whose 1 would be read as a flag; all four of val
        "boxes of at most one pixel are made a little wider": 4,
        "crowds are written as difficult objects": 2,
        "objects lose the area of their outline": 2,
        "classes without objects are lost": 1,
        "classes lose their category ids": 3,
    }
    after = read(tmp_path / "out")
    assert after.class_names == ("cat & dog", "zebra")
    assert after.is_difficult.sum() == 1
    assert_same(read(tmp_path / "in"), after)
    xml = (tmp_path / "out/Annotations/a.xml").read_text()
    # edges 4.25, 6.5, 24.375, 16.5 as pixels from 1, both ends inside
    assert "<bndbox><xmin>5.25</xmin><ymin>7.5</ymin><xmax>24.375</xmax><ymax>16.5</ymax></bndbox>" in xml
    assert "<name>cat &amp; dog</name>" in xml


def test_coco_to_yolo_counts_losses(tmp_path) -> None:
    losses = run_conversion(write_source(tmp_path / "in"), "yolo", tmp_path / "out")
    assert losses == {
        "images get another name": 4,
        "objects that occur twice are written once": 2,
        "crowds are skipped": 2,
        "objects lose the area of their outline": 2,
        "classes lose their category ids": 3,
    }
    after = read(tmp_path / "out")
    assert (after.class_names, len(after.boxes)) == (("cat & dog", "zebra", "unused"), 4)
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["val"] == "images/val"
    # [4.25, 6.5, 20.125, 10] of 40 x 20: (4.25 + 10.0625) / 40, (6.5 + 5) / 20, 20.125 / 40, 10 / 20
    assert (tmp_path / "out/labels/train/a.txt").read_text() == "0 0.3578125 0.575 0.503125 0.5\n1 0.5 0.5 1 1\n"


def test_difficult_flag_goes_through_coco_and_back(tmp_path) -> None:
    run_conversion(write_source(tmp_path / "in")[:1], "voc", tmp_path / "v")
    losses = run_conversion([tmp_path / "v"], "coco", tmp_path / "c")
    assert losses == {"difficult flags are in a key `difficult`, which other tools ignore": 1}
    run_conversion([tmp_path / "c"], "voc", tmp_path / "v2")
    before, after = read(tmp_path / "v"), read(tmp_path / "v2")
    assert_same(before, after, tolerance=1e-4)
    assert after.is_difficult.tolist() == before.is_difficult.tolist()


def test_missing_sizes_are_read_from_the_images(tmp_path) -> None:
    files = write_source(tmp_path / "in")
    for file in files:
        file.write_text(file.read_text().replace(', "width": 40, "height": 20', ""))
    run_conversion(files, "voc", tmp_path / "v")
    assert read(tmp_path / "v").sizes.tolist() == [[20, 40]] * 4


def test_lost_outlines_are_counted_and_an_image_annotated_as_stored_is_skipped_for_yolo(tmp_path) -> None:
    files = write_source(tmp_path / "in")
    edit_json(files[0], "annotations", [0], segmentation=[[1, 2, 3, 4, 5, 6]])
    # Every viewer turns it to 20 x 40, but it is annotated as 40 x 20.
    Image.new("RGB", (40, 20)).save(tmp_path / "in/train2017/a.png", exif=exif_of(6))
    losses = run_conversion(files, "yolo", tmp_path / "out")
    assert losses["COCO files with outlines or keypoints: only boxes are kept"] == 1
    assert losses["images that are not annotated as they are shown (EXIF) are skipped"] == 1
    assert len(read(tmp_path / "out")) == 3


def test_existing_target_is_never_overwritten(tmp_path) -> None:
    files = write_source(tmp_path / "in")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder/mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "folder", "link"):
        with pytest.raises(ConfigError, match="is there already"):
            run_conversion(files, "yolo", tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "file", "folder", "link"}


def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch) -> None:
    files = write_source(tmp_path / "in")
    real, calls = os.link, []

    def link(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(DataError, match=r"(?s)--images link to .*cross-device.*--images copy"):
        run_conversion(files, "coco", tmp_path / "out", images="link")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_links_share_the_bytes_and_copies_do_not(tmp_path) -> None:
    files = write_source(tmp_path / "in")
    (tmp_path / "link").mkdir()  # an empty folder is filled, and missing parents are made
    for out, images, expected in (("link", "link", True), ("a/b/copy", "copy", False)):
        run_conversion(files, "yolo", tmp_path / out, images=images)
        same = (tmp_path / out / "images/train/a.png").samefile(tmp_path / "in/train2017/a.png")
        assert same is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test": "val"}, "there is no test; there are train, val"),
        ({"train": "train", "val": "train"}, "must be train, val or test, each once, got train, train"),
        ({"train": "first"}, "must be train, val or test, each once, got first"),
    ],
)
def test_split_names_that_do_not_fit_are_refused(tmp_path, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run_conversion(write_source(tmp_path / "in"), "coco", tmp_path / "out", name_by_split=given)


def test_command_reports_the_splits_and_how_to_train(tmp_path, capsys) -> None:
    files = [str(file) for file in write_source(tmp_path / "in")]
    out = tmp_path / "out"
    assert main(["convert", *files, "--to", "yolo", "--out", str(out), "--splits", "train=val", "val=train"]) == 0
    text = capsys.readouterr().out
    assert "val: 4 images, 6 boxes" in text
    assert text.rstrip().endswith(f"make train DATA={out}")
    numbers = {split.name: len(split.annotations) for split in read_splits(find_splits([out]))}
    assert numbers == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["in", "--to", "pascal", "--out", "x"], 2, "--to"),
        (["gone", "--to", "voc", "--out", "x"], 3, "gone"),
        (["gone", "--to", "voc", "--out", "x", "--max_bad_fraction", "5"], 2, "in [0, 1], got 5"),
    ],
)
def test_wrong_words_end_with_their_exit_code(words, code, message, capsys) -> None:
    assert message in message_of(capsys, "convert", *words, code=code)
