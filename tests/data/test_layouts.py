"""Layouts that are recognised, the roles of their splits, and agreement of training and doctor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_data import HEIGHT, WIDTH, coco_content, doctor, found, write_coco, write_image

from onestage.data import COCO, YOLO, DetectionDataModule
from onestage.data.coco import parse_coco
from onestage.data.layouts import describe_source, find_sources, read_splits, recognise
from onestage.errors import AnnotationError, DataError

Mutation = Callable[[dict[str, Any]], Any]
XML = (
    f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size><object><name>NAME</name>"
    "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object></annotation>"
)


def write_voc(
    folder: Path, stem: str, images: str = "JPEGImages", xmls: str = "Annotations", name: str = "dog"
) -> None:
    write_image(folder / images / f"{stem}.jpg", seed=ord(stem[0]))
    (folder / xmls).mkdir(parents=True, exist_ok=True)
    (folder / xmls / f"{stem}.xml").write_text(XML.replace("NAME", name))


def write_lists(folder: Path, **stems_by_list: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for name, stems in stems_by_list.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems.split()))


def coco_folder(root: Path, *names: str) -> None:
    """Write annotations/instances_<name>.json and the images in <name>/."""
    for name in names:
        file = write_coco(root, coco_content(), name)
        (root / "annotations").mkdir(exist_ok=True)
        file.rename(root / "annotations" / f"instances_{name}.json")


def coco_official(root: Path) -> None:
    coco_folder(root, "train2017", "val2017", "test2017")
    for name in ("captions_val2017", "person_keypoints_val2017"):
        (root / "annotations" / f"{name}.json").write_text("[]")


def coco_roboflow(root: Path) -> None:
    for name in ("train", "valid", "test"):
        file = write_coco(root, coco_content(), name)
        file.rename(root / name / "_annotations.coco.json")


def voc_lists(root: Path) -> None:
    for stem in "abc":
        write_voc(root, stem)
    write_lists(root, train="a", valid="b", test="c", dog_train="a")


def voc_years(root: Path) -> None:
    for year, stem in (("VOC2007", "a"), ("VOC2012", "b")):
        write_voc(root / "VOCdevkit" / year, stem)
        write_lists(root / "VOCdevkit" / year, train=stem, val=stem, trainval=stem)
    write_voc(root / "VOCdevkit" / "VOC2007", "c")
    write_lists(root / "VOCdevkit" / "VOC2007", test="c")


def voc_beside_images(root: Path) -> None:
    write_voc(root, "a", ".", ".")
    write_voc(root, "b", ".", ".")


def voc_roboflow(root: Path) -> None:
    write_voc(root / "train", "a", ".", ".")
    write_voc(root / "valid", "b", ".", ".")


def yolo_label_studio(root: Path) -> None:
    write_image(root / "images" / "a.jpg")
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (root / "classes.txt").write_text("cat\n")


@pytest.mark.parametrize(
    ("write", "format", "num_images_by_split"),
    [
        (coco_official, "COCO", {"train": 4, "val": 4, "test": 4}),
        (coco_roboflow, "COCO", {"train": 4, "val": 4, "test": 4}),
        (lambda root: coco_folder(root, "zoo"), "COCO", {"train": 4}),
        (voc_lists, "VOC", {"train": 1, "val": 1, "test": 1}),
        (voc_years, "VOC", {"train": 2, "val": 1}),  # 07+12 trainval, and VOC2007 test
        (voc_beside_images, "VOC", {"train": 2}),
        (lambda root: write_voc(root, "a", "images", "annotations"), "VOC", {"train": 1}),
        (voc_roboflow, "VOC", {"train": 1, "val": 1}),
        (yolo_label_studio, "YOLO", {"train": 1}),
    ],
)
def test_layout_is_recognised_with_the_roles_of_its_splits(
    tmp_path: Path, write: Callable[[Path], None], format: str, num_images_by_split: dict[str, int]
) -> None:
    write(tmp_path)
    source = recognise(tmp_path)
    assert source.format == format
    assert {split: len(source.read(split)) for split in source.splits} == num_images_by_split
    assert [split.name for split in find_sources([tmp_path])] == list(num_images_by_split)  # in this order
    lines = describe_source(source)
    assert lines[0] == f"{format} data set {tmp_path}"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == list(num_images_by_split)


def test_files_given_one_by_one_are_named_by_their_names(tmp_path: Path) -> None:
    coco_folder(tmp_path, "train2017", "val2017", "mine")
    files = [tmp_path / "annotations" / f"instances_{name}.json" for name in ("val2017", "train2017", "mine")]
    assert [found.name for found in find_sources(files)] == ["train", "mine", "val"]
    assert [found.name for found in find_sources(files[:1] * 2)] == ["val (1)", "val (2)"]
    assert recognise(files[0]).splits == ("train",)  # a single file is what a training trains on


def test_unused_annotation_files_are_mentioned(tmp_path: Path) -> None:
    coco_folder(tmp_path, "train2014", "train2017", "minitrain")
    lines = [line.strip().replace(str(tmp_path), "") for line in describe_source(recognise(tmp_path))[1:]]
    assert lines == [
        "train: /annotations/instances_train2017.json",
        "not used: /annotations/instances_minitrain.json",
        "not used: /annotations/instances_train2014.json",
    ]


def test_files_without_a_role_are_refused(tmp_path: Path) -> None:
    coco_folder(tmp_path, "north", "south")
    with pytest.raises(DataError, match=r"(?s)no file says by its name which split it is.*one by one"):
        find_sources([tmp_path])


def test_unknown_folder_is_refused_with_its_content(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)holds 2 \.jpg, 1 \.md.*Known are: COCO .*VOC .*YOLO"):
        recognise(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        recognise(tmp_path / "gone")
    with pytest.raises(DataError, match="is not a folder, JSON or YAML file"):
        recognise(tmp_path / "a.jpg")


def test_voc_splits_get_one_order_of_classes(tmp_path: Path) -> None:
    write_voc(tmp_path, "a", name="dog")
    write_voc(tmp_path, "b", name="cat")
    write_lists(tmp_path, train="a", val="b")
    train, val = read_splits(find_sources([tmp_path]))
    assert train.annotations is not None
    assert val.annotations is not None
    assert train.annotations.class_names == val.annotations.class_names == ("cat", "dog")
    assert (train.annotations.labels.tolist(), val.annotations.labels.tolist()) == ([1], [0])
    assert [finding.rule for finding in val.findings] == ["class unknown in training"]
    assert "'cat' (nearest: 'dog')" in val.findings[0].problem


def test_voc_split_without_objects_is_read(tmp_path: Path) -> None:
    write_voc(tmp_path, "a")
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation/>")
    assert len(find_sources([tmp_path])[0].read(0.01)) == 1


def test_split_that_cannot_be_read_becomes_a_finding(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: images/gone\nnames: [cat]\n")
    assert YOLO(tmp_path).known_classes == (("cat",), (1,))
    (split,) = read_splits(find_sources([tmp_path]))
    assert split.annotations is None
    assert "'images/gone' is neither a folder nor a list" in split.findings[0].problem
    assert split.findings[0].remedy == "Correct it, or path: in data.yaml."


def test_training_on_its_own_validation_images_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco_folder(tmp_path, "train", "val")
    shutil.copyfile(tmp_path / "annotations/instances_train.json", tmp_path / "annotations/instances_val.json")
    source = COCO(tmp_path, train_images="train", val_images="train")
    DetectionDataModule(source, image_size=64).setup("fit")
    assert "4 images are in validation too" in caplog.text


def test_doctor_reports_what_training_meets(tmp_path: Path) -> None:
    content = coco_content()
    file = write_coco(tmp_path, content)
    assert doctor(file)[0] == 0
    changes = [{"bbox": [5, 5, 0, 9]}, {"bbox": None}, {"bbox": [90, 70, 40, 40]}, {"id": 0}]
    for annotation, change in zip(content["annotations"], changes, strict=False):
        annotation |= change
    content["images"][3]["file_name"] = "gone.jpg"
    file.write_text(json.dumps(content))
    code, report = doctor(file)
    assert code == 3
    effects = {(finding["rule"], finding["effect"]) for finding in report["findings"] if finding["remedy"]}
    skipped = {(rule, "skipped") for rule in ("box without size", "object malformed", "image missing")}
    assert effects >= skipped | {("box clipped", "warning"), ("id 0 or none", "note")}


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        (lambda content: content["annotations"].clear(), "no objects"),
        (lambda content: [a.update(iscrowd=1) for a in content["annotations"]], "no objects"),
        (lambda content: content.pop("categories"), "annotation file"),
    ],
)
def test_doctor_reports_what_stops_a_training(tmp_path: Path, mutate: Mutation, rule: str) -> None:
    content = coco_content()
    file = write_coco(tmp_path, content)
    mutate(content)
    file.write_text(json.dumps(content))
    code, report = doctor(file)
    assert (code, len(found(report, rule))) == (3, 1)


def test_too_many_bad_boxes_stop_training_and_doctor(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"][:3]:
        annotation["bbox"] = None
    file = write_coco(tmp_path, content)
    with pytest.raises(AnnotationError, match=r"(?s)train.json: 3 of 8 boxes cannot be used.*data.max_bad_fraction"):
        parse_coco(file, tmp_path / "train")
    assert "3 of 8 boxes cannot be used" in found(doctor(file)[1], "annotation file")[0]["problem"]
    assert found(doctor(file, "--max_bad_fraction", "0.5")[1], "annotation file") == []


def test_one_split_twice_is_a_warning_of_doctor(tmp_path: Path) -> None:
    train = write_coco(tmp_path, coco_content())
    code, report = doctor(train, train)
    (finding,) = found(report, "same images in two splits")
    assert (code, finding["effect"], finding["num_items"]) == (0, "warning", 4)
    assert doctor(train, train, "--strict")[0] == 1


@pytest.mark.parametrize("names", [("dog", "cat"), ("cat", "dog", "cow")])
def test_splits_of_other_categories_are_reported_with_both_tables(tmp_path: Path, names: tuple[str, ...]) -> None:
    categories = [{"id": category_id, "name": name} for category_id, name in zip((3, 7, 9), names, strict=False)]
    train = write_coco(tmp_path, coco_content())
    val = write_coco(tmp_path, {**coco_content(), "categories": categories}, "val")
    code, report = doctor(train, val)
    (finding,) = found(report, "classes differ")
    assert (code, finding["effect"]) == (3, "error")
    assert "3 cat, 7 dog" in finding["problem"]
    assert ", ".join(f"{category['id']} {category['name']}" for category in categories) in finding["problem"]
