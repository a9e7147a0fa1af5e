"""COCO files: their values, and what is skipped or refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotation_sets import accepted

from onestage.data import coco
from onestage.data.coco import parse_coco
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet

Content = dict[str, Any]
Mutation = Callable[[Content], Any]


def good_content() -> Content:
    """Return three images of 100 x 80 px (width x height), the last without objects; ids with gaps, out of order."""
    return {
        "info": {},
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 100, "height": 80},
            {"id": 3, "file_name": "sub/a.jpg", "width": 100, "height": 80},
            {"id": 5, "file_name": "c.jpg", "width": 100, "height": 80},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [10, 20, 30, 40], "area": 600.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0.5, 0.5, 9.5, 19.5], "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 17, "bbox": [0, 0, 100, 80], "area": 8000},
        ],
        "categories": [{"id": 90, "name": "cup"}, {"id": 4, "name": "boat"}, {"id": 17, "name": "cat"}],
    }


def write(folder: Path, content: Any) -> Path:
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("b.jpg", "c.jpg", "sub/a.jpg"):
        (folder / "images" / name).write_bytes(b"never opened")
    file = folder / "instances.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def parse(folder: Path, content: Any, max_bad_fraction: float = 0.01, **options: Any) -> AnnotationSet:
    return accepted(parse_coco(write(folder, content), folder / "images", **options), max_bad_fraction)


def parse_changed(folder: Path, table: str, row: int, **values: Any) -> AnnotationSet:
    """Parse the good file with these keys changed; None removes a key."""
    content = good_content()
    content[table][row] |= values
    for key in [key for key, value in values.items() if value is None and key != "bbox"]:
        del content[table][row][key]
    return parse(folder, content)


def test_boxes_labels_and_ids_of_a_small_file(tmp_path) -> None:
    annotations = parse(tmp_path, good_content())
    assert annotations.class_names == ("boat", "cat", "cup")  # 4, 17, 90
    assert annotations.category_ids == (4, 17, 90)
    assert annotations.image_ids.tolist() == [7, 3, 5]
    assert annotations.image_paths.tolist() == [str(tmp_path / "images" / n) for n in ("b.jpg", "sub/a.jpg", "c.jpg")]
    assert annotations.sizes.tolist() == [[80, 100]] * 3
    assert annotations.box_offsets.tolist() == [0, 1, 3, 3]
    assert annotations.boxes.tolist() == [[0.5, 0.5, 10, 20], [10, 20, 40, 60], [0, 0, 100, 80]]
    assert annotations.labels.tolist() == [0, 2, 1]
    assert annotations.areas.tolist() == [9.5 * 19.5, 600.5, 8000]
    assert annotations.is_crowd.tolist() == [True, False, False]
    assert not annotations.is_difficult.any()
    assert annotations.findings == ()


def test_large_file_is_parsed_without_outlines(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(coco, "MANY_BYTES", 0)
    content = good_content()
    content["annotations"][0] = {"segmentation": [[1, 2.5, 3e1]], **content["annotations"][0]}
    content["annotations"][1]["caption"] = '"segmentation": [1], "bbox": 3'
    assert parse(tmp_path, content).boxes.tolist() == parse(tmp_path, good_content()).boxes.tolist()
    with pytest.raises(AnnotationError, match=r"is not JSON.*line 2 column 1"):
        parse(tmp_path, json.dumps(content)[:-1].encode() + b"\n!}")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("bbox", [1, 2, 3], "4 numbers"),
        ("bbox", [1, 2, True, 4], "finite"),
        ("bbox", None, "4 numbers [x, y, width, height]; outlines are not read"),
        ("bbox", [float("nan"), 2, 3, 4], "finite"),
        ("image_id", 999, "lists no image of that id"),
    ],
)
def test_bad_object_is_skipped_and_named(tmp_path, key, value, rule) -> None:
    annotations = parse_changed(tmp_path, "annotations", 0, **{key: value})
    assert annotations.labels.tolist() == [0, 1]
    (line,) = annotations.skipped
    image = value if key == "image_id" else 3
    for part in (str(tmp_path / "instances.json"), f"annotation 1 (image {image})", str(value), rule):
        assert part in line


def parse_boxes(folder: Path, boxes: list[list[float]], **options: Any) -> AnnotationSet:
    """Parse objects with these edges, all in image 7."""
    content = good_content()
    content["annotations"] = [
        {"id": n, "image_id": 7, "category_id": 4, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for n, (x1, y1, x2, y2) in enumerate(boxes, 1)
    ]
    return parse(folder, content, **options)


def test_box_that_reaches_out_is_clipped_and_one_that_cannot_be_an_object_skipped(tmp_path) -> None:
    bad = {"must be > 0": [10, 10, 10, 20], "must overlap": [200, 0, 210, 10]}
    annotations = parse_boxes(tmp_path, [[-5, -5, 300, 50], *bad.values()])
    assert (annotations.boxes.tolist(), annotations.areas.tolist()) == ([[0, 0, 100, 50]], [5000])
    assert all(rule in line for rule, line in zip(bad, annotations.skipped, strict=True))
    (clipped,) = (finding for finding in annotations.findings if finding.rule == "box clipped")
    assert clipped.num_items == 1


@pytest.mark.parametrize(
    ("num_good", "num_bad", "fraction", "passes"),
    [
        (8, 2, 0.01, True),  # two always may
        (7, 3, 0.01, False),
        (297, 3, 0.01, True),  # 1 % of 300
        (296, 4, 0.01, False),
        (93, 7, 0.01, False),
        (93, 7, 0.07, True),
        (9, 1, 0.0, False),  # 0 means none
        (0, 2, 0.01, True),  # as a split without boxes
        (0, 3, 1.0, True),
        (0, 3, 0.5, False),
    ],
)
def test_too_many_bad_boxes_are_an_error(tmp_path, num_good, num_bad, fraction, passes) -> None:
    boxes = [[0.0, 0, 10, 10]] * num_good + [[5.0, 5, 5, 9]] * num_bad
    if passes:
        assert len(parse_boxes(tmp_path, boxes, max_bad_fraction=fraction).skipped) == num_bad
        return
    with pytest.raises(AnnotationError, match=r"instances\.json.* boxes can(not)? be used") as caught:
        parse_boxes(tmp_path, boxes, max_bad_fraction=fraction)
    if num_bad == 7:  # five of them are quoted, and a fraction that lets them pass
        assert re.search(r"and 2 more(.|\n)*data\.max_bad_fraction: 0\.07", str(caught.value))
        assert str(caught.value).count("annotation 9") == 5  # 94..98


def test_impossible_area_is_replaced_by_that_of_the_box(tmp_path) -> None:
    for area, expected in ((None, 1200), (1300, 1200), (-1, 1200), (700.5, 700.5)):  # the box has 30 x 40
        annotations = parse_changed(tmp_path, "annotations", 0, area=area)
        assert annotations.areas[1] == expected


def test_ids_may_be_strings_and_those_of_annotations_do_not_matter(tmp_path) -> None:
    content = good_content()
    content["annotations"] = [*content["annotations"], *good_content()["annotations"][1:2]]
    content["annotations"][0]["id"] = 0
    del content["annotations"][2]["id"]
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    annotations = parse(tmp_path, content)
    assert annotations.labels.tolist() == [0, 0, 2, 1]
    assert annotations.findings == ()


def test_root_category_is_no_class_unless_it_has_boxes(tmp_path) -> None:
    content = good_content()
    content["categories"] = [category | {"supercategory": "things"} for category in content["categories"]]
    content["categories"].append({"id": 0, "name": "things", "supercategory": "none"})
    annotations = parse(tmp_path, content)
    assert annotations.category_ids == (4, 17, 90)
    assert [finding.rule for finding in annotations.findings] == ["root category"]
    content["annotations"][0]["category_id"] = 0
    assert parse(tmp_path, content).category_ids == (0, 4, 17, 90)


def set_item(table: str, row: int, **values: Any) -> Mutation:
    return lambda content: content[table][row].update(values)


OUTSIDE = ["sub/../../canary.jpg", "/etc/hostname", "..\\a.jpg", "C:\\a.jpg", "b.jpg\0", ".", "", None, "\ud800"]


def as_xyxy(content: Content) -> None:
    boxes = [[40 + n, 30 + n, 80 + n, 70 + n] for n in range(10)]
    content["annotations"] = [{"id": n, "image_id": 7, "category_id": 4, "bbox": box} for n, box in enumerate(boxes)]


@pytest.mark.parametrize(
    ("mutate", "rule"),
    [
        *[(set_item("images", 0, file_name=name), "not a path below the image folder") for name in OUTSIDE],
        (lambda content: content.pop("images"), "'images' must be a list of objects, got no such key"),
        (lambda content: content.pop("annotations"), '"annotations": []'),
        (lambda content: content.update(categories=[]), "'categories' must be a list of objects"),
        (set_item("images", 0, id=3), "'b.jpg' and 'sub/a.jpg'"),
        (set_item("images", 0, id="x7"), "id 'x7' must be a 64-bit integer, in {'id': 'x7', 'file_name': 'b.jpg'"),
        (set_item("images", 0, width="wide"), "width 'wide'"),
        (set_item("annotations", 1, image_id=None), "image_id None must be"),
        (set_item("annotations", 1, category_id=5), "annotation 2 has category_id 5"),
        (set_item("categories", 1, name="cup"), "several categories have the id or name 'cup'"),
        (as_xyxy, "looks like xyxy"),
        (lambda content: [a.update(bbox=[0.1, 0.2, 0.25, 0.5]) for a in content["annotations"]], "like fractions"),
    ],
)
def test_wrong_table_is_refused_with_place_rule_and_remedy(tmp_path, mutate, rule) -> None:
    content = good_content()
    mutate(content)
    with pytest.raises(AnnotationError) as caught:
        parse(tmp_path, content)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "instances.json"))
    assert rule in text
    assert len(text.splitlines()[-1]) > 10  # the remedy


GOOD = json.dumps(good_content()).encode()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "is empty (0 bytes)"),
        (GOOD[: len(GOOD) // 2], "cut off"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b'[{"image": "a.jpg", "annotations": []}]', "the top level is a list, as in CreateML's annotations;"),
        (b'[{"image_id": 1, "score": 0.5}]', "the top level is a list, as in a detections (results) file"),
        (b'{"shapes": [], "imagePath": "a.jpg"}', "is not COCO JSON, it looks like labelme's files"),
        (GOOD[:-1] + b', "images": []}', "'images' occurs twice"),
        (GOOD.replace(b"images", b"\xff"), "'utf-8' codec can't decode"),
        (b"[" * 200_000, "is not JSON: maximum recursion depth"),
        (b'{"images": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path, content, rule) -> None:
    with pytest.raises(AnnotationError) as caught:
        parse(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "instances.json"))
    assert rule in str(caught.value)


def test_image_folder_without_the_images_is_refused_with_the_key(tmp_path) -> None:
    file = write(tmp_path, good_content())
    (tmp_path / "elsewhere").mkdir()
    for folder in ("elsewhere", "missing"):
        with pytest.raises(AnnotationError, match=folder + r"(.|\n)*data\.source\.train_images"):
            parse_coco(file, tmp_path / folder)
    (tmp_path / "images" / "deep").mkdir()
    with pytest.raises(AnnotationError) as caught:
        parse_coco(file, tmp_path / "images" / "deep")
    remedy = f"They are in {tmp_path}/images: give it as data.source.train_images or val_images."
    assert str(caught.value).endswith(remedy)
