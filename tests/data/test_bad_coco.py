"""COCO's rows of the table of bad input, one case for each number. E stops, S leaves out and counts, C goes on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bad_data import (
    assert_goes_on,
    assert_left_out,
    assert_refused,
    coco_content,
    doctor,
    found,
    parse,
    write_coco,
    write_image,
)
from data_modules import coco_data

from onestage.data.annotations import require_objects
from onestage.data.transforms import SeededTransform
from onestage.errors import AnnotationError

pytestmark = pytest.mark.bad_input


def spoiled_box(tmp_path: Path, bbox: Any) -> Path:
    content = coco_content()
    content["annotations"][3]["bbox"] = bbox
    return write_coco(tmp_path, content)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_row_01_missing_file_or_folder_stops(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "train.json"
    if kind == "folder":
        file.mkdir()
        with pytest.raises(AnnotationError, match=r"(?s)train.json.*data.source.train"):
            parse(file)
    else:
        assert_refused(file, "cannot be read", "data.source.train")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty (0 bytes)"),
        (json.dumps(coco_content()).encode()[:700], "cut off"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
    ],
)
def test_row_02_empty_cut_off_or_web_page_stops(tmp_path: Path, content: bytes, expected: str) -> None:
    assert_refused(write_coco(tmp_path, content), expected)


def test_row_03_byte_order_mark_is_read_and_other_encodings_stop(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "Kätzchen"
    text = json.dumps(content, ensure_ascii=False)
    file = write_coco(tmp_path, content)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert assert_goes_on(file, None).class_names == ("Kätzchen", "dog")
    for encoding in ("utf-16", "latin-1"):
        file.write_bytes(text.encode(encoding))
        assert_refused(file, "is not UTF-8", "iconv")


def test_row_04_list_of_results_stops(tmp_path: Path) -> None:
    file = write_coco(tmp_path, b'[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    assert_refused(file, "detections (results) file")


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_row_05_missing_table_stops(tmp_path: Path, table: str) -> None:
    content = coco_content()
    del content[table]
    assert_refused(write_coco(tmp_path, content), f"has no '{table}'")


def test_row_06_repeated_annotation_ids_are_numbered_anew(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"][:3]:
        annotation["id"] = 1
    annotations = assert_goes_on(write_coco(tmp_path, content), "ids repeated")
    assert [finding.num_items for finding in annotations.findings] == [2]


def test_row_07_annotation_id_zero_or_none_is_numbered_anew(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["id"] = 0
    del content["annotations"][1]["id"]
    annotations = assert_goes_on(write_coco(tmp_path, content), "id 0 or none")
    assert [finding.num_items for finding in annotations.findings] == [2]


def test_row_08_repeated_image_ids_stop_with_both_names(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][2]["id"] = 1
    assert_refused(write_coco(tmp_path, content), "image id 1", "'a0.jpg' and 'a2.jpg'")


@pytest.mark.parametrize(("key", "value", "expected"), [("id", 3, "id 3"), ("name", "cat", "name cat")])
def test_row_09_repeated_category_ids_or_names_stop(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    content = coco_content()
    content["categories"].append({"id": 9, "name": "cow", key: value})
    assert_refused(write_coco(tmp_path, content), f"several categories have {expected}")


def test_row_10_annotation_of_an_unknown_image_is_left_out(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][3]["image_id"] = 999
    file = write_coco(tmp_path, content)
    assert_left_out(file, "object malformed", 7, "annotation 4 (image 999)", "lists no image of that id")


def test_row_11_unknown_category_stops(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][3]["category_id"] = 5
    assert_refused(write_coco(tmp_path, content), "annotation 4 has category_id 5", "Add the category")


def test_row_12_ids_that_are_all_text_are_read_and_mixed_ones_stop(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    assert_goes_on(write_coco(tmp_path, content), "ids as text")
    content["annotations"][3]["image_id"] = 2
    assert_refused(write_coco(tmp_path, content), "image_id '1'", "as an integer")


def test_row_13_ids_with_gaps_become_labels_in_order(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][1]["id"] = 90
    for annotation in content["annotations"][1::2]:
        annotation["category_id"] = 90
    annotations = assert_goes_on(write_coco(tmp_path, content), None)
    assert (annotations.category_ids, annotations.labels.tolist()) == ((3, 90), [0, 1] * 4)


def test_row_14_root_category_is_no_class_and_an_id_zero_with_boxes_is(tmp_path: Path) -> None:
    content = coco_content()
    for category in content["categories"]:
        category["supercategory"] = "animals"
    content["categories"].append({"id": 0, "name": "animals", "supercategory": "none"})
    assert assert_goes_on(write_coco(tmp_path, content), "root category").class_names == ("cat", "dog")
    content["annotations"][0]["category_id"] = 0
    assert assert_goes_on(write_coco(tmp_path, content), None).class_names == ("animals", "cat", "dog")


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, 0], [50, 50, -10, 10], [50, 50, 10, -1e-9]])
def test_row_15_box_without_size_is_left_out(tmp_path: Path, bbox: list[float]) -> None:
    file = spoiled_box(tmp_path, bbox)
    assert_left_out(file, "box without size", 7, "annotation 4 (image 2)", "width and height must be > 0")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row_16_box_that_is_no_number_is_left_out(tmp_path: Path, word: str) -> None:
    file = spoiled_box(tmp_path, [5, "HERE", 10, 10])
    file.write_text(file.read_text().replace('"HERE"', word))
    assert_left_out(file, "box not finite", 7, "annotation 4 (image 2)", "finite")


@pytest.mark.parametrize("bbox", [[1, 2, 3], [1, 2, 3, 4, 5], ["1", 2, 3, 4], None, {"x": 1}, [True, 1, 2, 3]])
def test_row_17_box_of_other_things_is_left_out(tmp_path: Path, bbox: Any) -> None:
    file = spoiled_box(tmp_path, bbox)
    assert_left_out(file, "object malformed", 7, "annotation 4 (image 2)", "a list of 4 numbers")


def test_row_17_too_many_of_them_stop(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"][:3]:
        annotation["bbox"] = None
    file = write_coco(tmp_path, content)
    with pytest.raises(AnnotationError, match=r"(?s)train.json: 3 of 8 boxes cannot be used.*data.max_bad_fraction"):
        parse(file)
    code, report = doctor(file)
    assert code == 3
    assert "3 of 8 boxes cannot be used" in found(report, "annotation file")[0]["problem"]
    assert found(doctor(file, "--max_bad_fraction", "0.5")[1], "annotation file") == []


def test_row_18_corners_written_as_corner_and_size_stop(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["bbox"] = [40, 30, 90, 70]
    assert_refused(write_coco(tmp_path, content), "this looks like xyxy", "Write bbox as")


def test_row_18_fractions_of_the_image_stop(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.25, 0.5]
    assert_refused(write_coco(tmp_path, content), "8 boxes lie within 0..1", "like fractions", "Multiply them")


def test_row_18_outlines_alone_stop_and_are_said_not_to_be_read(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[0, 0, 40, 0, 40, 30]]
        del annotation["bbox"]
    file = write_coco(tmp_path, content)
    assert_refused(file, "outlines are not read")
    with pytest.raises(AnnotationError) as caught:
        parse(file)
    assert str(caught.value).endswith("\nCorrect them.")  # to allow more would not help


def test_row_19_box_partly_outside_is_clipped_and_one_outside_left_out(tmp_path: Path) -> None:
    annotations = assert_goes_on(spoiled_box(tmp_path, [90, 70, 40, 40]), "box clipped")
    assert annotations.boxes[3].tolist() == [90, 70, 100, 80]
    assert_left_out(spoiled_box(tmp_path, [200, 10, 20, 20]), "box outside", 7, "must overlap its image")


def test_row_20_box_under_a_pixel_is_not_trained_on_but_evaluated(tmp_path: Path) -> None:
    file = spoiled_box(tmp_path, [5, 5, 0.2, 20])  # 0.6 px of 300
    annotations = assert_goes_on(file, "box under 1 px")
    objects = annotations.objects(1)
    transform = SeededTransform([], 300)
    image = write_image(tmp_path / "x.png")
    import cv2

    transformed = transform(cv2.imread(str(image)), annotations.boxes[objects], (0, 0, 1))
    assert (len(annotations.boxes[objects]), transformed.rows.tolist()) == (2, [0])


def test_row_21_iscrowd_may_be_missing_and_1_is_a_region(tmp_path: Path) -> None:
    content = coco_content()
    del content["annotations"][0]["iscrowd"]
    content["annotations"][1]["iscrowd"] = 1
    assert assert_goes_on(write_coco(tmp_path, content), None).is_crowd.tolist() == [False, True] + [False] * 6


def test_row_22_area_missing_or_impossible_is_the_boxs(tmp_path: Path) -> None:
    content = coco_content()
    del content["annotations"][0]["area"]
    content["annotations"][1]["area"] = 1300  # of a box of 1200
    content["annotations"][2]["area"] = -1
    content["annotations"][3]["area"] = 700.5  # a segment's
    annotations = assert_goes_on(write_coco(tmp_path, content), "area wrong")
    assert annotations.areas[:4].tolist() == [1200, 1200, 1200, 700.5]


def test_row_23_image_of_another_size_is_left_out(tmp_path: Path) -> None:
    file = write_coco(tmp_path, coco_content())
    write_image(tmp_path / "train" / "a1.jpg", size=(50, 60))
    code, report = doctor(file)
    (finding,) = found(report, "image size")
    assert (code, finding["effect"]) == (3, "skipped")
    assert finding["place"] == str(tmp_path / "train" / "a1.jpg")
    assert "is 60 x 50 pixels" in finding["problem"]
    assert "annotated as 100 x 80" in finding["problem"]
    assert finding["remedy"]
    assert report["splits"][0]["num_images"] == 3


def test_row_23_the_start_of_a_training_leaves_it_out_too(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content())
    write_coco(tmp_path, coco_content(), "val")
    write_image(tmp_path / "train" / "a1.jpg", size=(50, 60))
    paths = {"train_annotations": "train.json", "val_annotations": "val.json", "train": "train", "val": "val"}
    data = coco_data(tmp_path, **paths, image_size=64)
    data.setup("fit")
    annotations = data.annotations("train")
    assert annotations.image_ids.tolist() == [1, 3, 4]
    assert "a1.jpg" in annotations.skipped[0]
    strict = coco_data(tmp_path, **paths, image_size=64, max_bad_fraction=0.0)
    with pytest.raises(AnnotationError, match=r"(?s)1 of 4 images cannot be used.*data.max_bad_fraction"):
        strict.setup("fit")


@pytest.mark.parametrize(
    "name", ["../canary.jpg", "/etc/canary.jpg", "sub\\a.jpg", "a\0.jpg", "sub/../../canary.jpg", "", "\ud800.jpg", 5]
)
def test_row_24_file_name_that_leaves_the_folder_stops(tmp_path: Path, name: Any) -> None:
    write_image(tmp_path / "canary.jpg")
    content = coco_content()
    file = write_coco(tmp_path, content)
    content["images"][1]["file_name"] = name
    file.write_text(json.dumps(content))
    assert_refused(file, "is not a path below the image folder", "Correct the file_name")


def test_row_24_link_out_of_the_folder_stops_and_is_never_opened(tmp_path: Path) -> None:
    file = write_coco(tmp_path, coco_content())
    canary = tmp_path / "outside" / "canary.jpg"
    write_image(canary)
    os.utime(canary, (1, 1))
    (tmp_path / "train" / "a1.jpg").unlink()
    (tmp_path / "train" / "a1.jpg").symlink_to(canary)
    assert_refused(file, "outside the image folder")
    assert canary.stat().st_atime == 1


def test_row_25_missing_image_is_left_out_and_all_missing_stop(tmp_path: Path) -> None:
    file = write_coco(tmp_path, coco_content())
    (tmp_path / "train" / "a1.jpg").unlink()
    annotations = assert_left_out(file, "image missing", 6, "image 2", "'a1.jpg' is not in")
    assert annotations.image_ids.tolist() == [1, 3, 4]
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    assert_refused(file, "none of the 4 images", "Give the folder")


def test_row_25_images_that_are_named_from_the_folder_above_are_found_for_the_message(tmp_path: Path) -> None:
    content = coco_content()
    file = write_coco(tmp_path, content)
    for image in content["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError) as caught:
        parse(file)
    remedy = f"They are in {tmp_path}: give it as data.source.train_images or val_images."
    assert str(caught.value).splitlines()[-1] == remedy


def test_row_26_images_without_objects_stay_and_are_counted(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = content["annotations"][:4]
    assert len(assert_goes_on(write_coco(tmp_path, content), "image without objects", 4)) == 4


@pytest.mark.parametrize("kind", ["none", "crowds"])
def test_row_27_training_split_without_objects_stops(tmp_path: Path, kind: str) -> None:
    content = coco_content()
    content["annotations"] = [dict(a, iscrowd=1) for a in content["annotations"]] if kind == "crowds" else []
    file = write_coco(tmp_path, content)
    with pytest.raises(AnnotationError, match=r"(?s)train.json.*has an object to learn from.*training split"):
        require_objects(parse(file))
    code, report = doctor(file)
    assert code == 3
    assert found(report, "no objects")[0]["remedy"]


def test_row_27_only_bad_boxes_stop(tmp_path: Path) -> None:
    content = coco_content(1)
    for annotation in content["annotations"]:
        annotation["bbox"][2] = 0
    assert_refused(write_coco(tmp_path, content), "none of the 2 boxes can be used", "Correct the boxes")


def test_row_28_a_training_that_validates_on_its_own_images_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_coco(tmp_path, coco_content())
    paths = {"train_annotations": "train.json", "val_annotations": "train.json", "train": "train", "val": "train"}
    coco_data(tmp_path, **paths).setup("fit")
    assert "4 images are in validation too" in caplog.text


def test_row_28_no_images_stop_and_one_split_twice_is_a_warning(tmp_path: Path) -> None:
    content = coco_content()
    assert_refused(write_coco(tmp_path, {**content, "images": []}), "'images' is empty")
    train = write_coco(tmp_path, content)
    code, report = doctor(train, train)
    assert code == 0
    (finding,) = found(report, "same images in two splits")
    assert (finding["effect"], finding["num_items"]) == ("warning", 4)
    assert doctor(train, train, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"images": [], "images": [], "annotations": [], "categories": []}', "the key 'images' occurs twice"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "is not usable JSON"),
        (json.dumps(coco_content()).replace('"cat"', '"\\ud800"'), "it must be text"),
    ],
    ids=["deep", "repeated key", "5000 digits", "half a surrogate pair"],
)
def test_row_29_json_that_breaks_readers_stops(tmp_path: Path, text: str, expected: str) -> None:
    file = write_coco(tmp_path, coco_content())
    file.write_text(text)
    assert_refused(file, expected)


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 3, "name": "cat"}, {"id": 7, "name": "wolf"}],
        [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "cow"}],
    ],
    ids=["name", "order", "one more"],
)
def test_row_30_splits_of_other_categories_stop_with_both_tables(tmp_path: Path, categories: list) -> None:
    train = write_coco(tmp_path, coco_content())
    val = write_coco(tmp_path, {**coco_content(), "categories": categories}, "val")
    code, report = doctor(train, val)
    (finding,) = found(report, "classes differ")
    assert (code, finding["effect"]) == (3, "error")
    for category in categories:
        assert f"{category['id']} {category['name']}" in finding["problem"]
    assert "3 cat, 7 dog" in finding["problem"]
    assert finding["remedy"]
    paths = {"train_annotations": "train.json", "val_annotations": "val.json", "train": "train", "val": "val"}
    with pytest.raises(AnnotationError, match=r"(?s)train.json.*val.json|val.json.*cat"):
        coco_data(tmp_path, **paths).setup("fit")
