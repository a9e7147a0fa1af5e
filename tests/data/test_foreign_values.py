"""Paths and scalars that other tools and systems write: one meaning each, or refused."""

import json
import math
from pathlib import Path

import pytest
from layout_files import coco_folder, coco_with_a_sub_folder, voc_folder, yolo_images

from onestage.data import COCO, VOC, YOLO, DetectionDataModule, ImageFolder
from onestage.data.layouts import recognise
from onestage.errors import AnnotationError
from onestage.files import as_path, find_below, find_files, foreign_parts, to_number


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3), (2.5, 2.5), ("3", 3), (" 2.50\n", 2.5), ("+1e2", 100), ("-0", 0), ("007", 7), (10**400, math.inf),
        (-(10**400), -math.inf), ("1e999", math.inf), ("nan", math.nan), ("1,5", math.nan), ("1_000", math.nan),
        ("0x10", math.nan), ("12 px", math.nan), ("", math.nan), (True, math.nan), (False, math.nan), (None, math.nan),
        ([1], math.nan), ({"a": 1}, math.nan), (b"3", math.nan),
    ],
)  # fmt: skip
def test_number_is_read_or_is_none(value, number) -> None:
    assert to_number(value) == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("images/a.jpg", ("images", "a.jpg")),
        ("images\\a.jpg", ("images", "a.jpg")),
        ("C:\\sets\\a.jpg", ("sets", "a.jpg")),
        ("\\\\server\\share\\a.jpg", ("server", "share", "a.jpg")),
        ('"a b.jpg"\r', ("a b.jpg",)),
        ("..", ()),
        ("a\0b", ()),
        ("/home/me/a.jpg", ("home", "me", "a.jpg")),
        ("\ud800", ()),
        ("a/" * 3000, ()),
        ("x" * 300, ()),
        (None, ()),
    ],
)
def test_path_of_any_system_is_split_and_leads_nowhere_else(name, parts, tmp_path) -> None:
    assert foreign_parts(name) == parts
    (tmp_path / "outside.jpg").write_text("")
    (tmp_path / "set").mkdir()
    assert find_below(tmp_path / "set", name) is None
    assert find_below(tmp_path / "set", "../outside.jpg") is None
    if parts:
        (tmp_path / "set" / parts[-1]).write_text("")
        assert find_below(tmp_path / "set", name) == tmp_path / "set" / parts[-1]


def test_home_folder_is_the_same_to_every_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    coco_folder(tmp_path / "mine", "train", "val")
    assert as_path("~/mine") == as_path(Path("~/mine")) == tmp_path / "mine"
    assert as_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    sources = [kind("~/mine") for kind in (COCO, VOC, YOLO, ImageFolder)]
    assert {source.path for source in [*sources, recognise("~/mine")]} == {tmp_path / "mine"}
    data = DetectionDataModule(path="~/mine", predict_dir="~/mine/val", image_size=64)
    assert (len(data.annotations("train")), len(data.annotations("predict"))) == (4, 4)
    assert data.predicted_root == tmp_path / "mine" / "val"
    assert data.source is data.source  # recognised once
    source = COCO("~/mine", train="~/mine/annotations/instances_val.json", train_images="~/mine/val")
    assert len(source.read("train")) == 4


@pytest.mark.parametrize(
    "names", ["[yes, 1.0, 2024-01-01]", "{0: yes, 1: 1.0, 2: 2024-01-01}", "\n- yes\n- 1.0\n- 2024-01-01"]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_names_in_yaml_stay_text(tmp_path, names, line_end) -> None:
    yolo_images(tmp_path, "images", "labels")
    text = f"path: ..\\{tmp_path.name}\ntrain: images\nval: null\ntest: ~\nnc: 3\nnames: {names}\n"
    (tmp_path / "data.yaml").write_bytes(text.replace("\n", line_end).encode("utf-8-sig"))
    source = YOLO(tmp_path)
    assert source.splits == ("train",)
    assert source.read("train").class_names == ("yes", "1.0", "2024-01-01")


@pytest.mark.parametrize("name", ["é.jpg", "e\u0301.jpg", "a%20b.jpg", " é.JPG", "É.jpg"])
@pytest.mark.parametrize("stored", ["é.jpg", "e\u0301.jpg", "a b.jpg", "a%20b.jpg", "a%20b.JPG"])
def test_name_is_found_in_every_spelling_of_it(tmp_path, name, stored) -> None:
    (tmp_path / stored).write_text("")
    (tmp_path / "x").write_text("")
    is_same = name.startswith("a") == stored.startswith("a") and name != "É.jpg"
    assert find_files("a.json", ["x", name], tmp_path)[1] == (str(tmp_path / stored) if is_same else None)
    assert find_below(tmp_path, f"C:\\set\\{name}") == (tmp_path / stored if is_same else None)


def test_variable_of_the_environment_is_replaced_in_a_path(monkeypatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert as_path("$SCRATCH/voc") == as_path("${SCRATCH}/voc") == Path("/scratch/me/voc")
    assert as_path("$UNSET_X/voc") == Path("$UNSET_X/voc")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_every_unicode_encoding_is_read_everywhere(tmp_path, encoding) -> None:
    coco_folder(tmp_path / "coco", "train")
    voc_folder(tmp_path / "voc", train="a b")
    yolo_images(tmp_path / "yolo", "images", "labels", "a")
    (tmp_path / "yolo" / "classes.txt").write_text("кот")
    files = [file for suffix in ("json", "txt") for file in tmp_path.rglob(f"*.{suffix}")]
    for file in files:
        file.write_text(file.read_text(), encoding=encoding)
    for kind, name in ((COCO, "coco"), (VOC, "voc"), (YOLO, "yolo")):
        annotations = kind(tmp_path / name).read("train")
        assert len(annotations.boxes) == {"coco": 8, "voc": 2, "yolo": 1}[name]
    assert annotations.class_names == ("кот",)


def test_flags_and_numbers_as_text_are_read_in_coco_and_voc(tmp_path) -> None:
    coco_folder(tmp_path / "coco", "train")
    file = tmp_path / "coco" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= {"iscrowd": "1", "bbox": ["10", "20", "30", "40"], "area": "1200"}
    content["images"][0] |= {"width": "100", "height": 80.0}
    file.write_text(json.dumps(content))
    annotations = COCO(tmp_path / "coco").read("train")
    assert annotations.is_crowd.tolist() == [True, *[False] * 7]
    assert annotations.boxes[0].tolist() == [10, 20, 40, 60]
    assert annotations.findings == ()
    voc_folder(tmp_path / "voc", train="a")
    xml = tmp_path / "voc" / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("<bndbox>", "<difficult>true</difficult><bndbox>"))
    assert VOC(tmp_path / "voc").read("train").is_difficult.tolist() == [True]


def yolo_folder(root: Path) -> None:
    yolo_images(root, "images", "labels")
    (root / "classes.txt").write_text("cat\n")


@pytest.mark.parametrize(
    ("write", "linked"),
    [
        *[(coco_with_a_sub_folder, name) for name in ("train/sub/a0.jpg", "train/sub")],
        *[(lambda root: voc_folder(root, train="a b"), name) for name in ("JPEGImages/a.jpg", "Annotations/a.xml")],
        *[(yolo_folder, name) for name in ("images/a.jpg", "labels/a.txt")],
    ],
)
def test_link_out_of_the_folder_is_refused_and_one_inside_is_fine(write, linked, tmp_path) -> None:
    for name in ("fine", "refused"):
        root = tmp_path / name
        write(root)
        target = (root / linked).parent / "real" if name == "fine" else tmp_path / "outside"
        (root / linked).symlink_to((root / linked).rename(target))
        if name == "fine":
            assert len(recognise(root).read("train").skipped) == 0
    with pytest.raises(AnnotationError, match=r"outside the data set's folder(.|\n)*data\.path"):
        recognise(root).read("train")
