"""YOLO files: their values, where they lie, and what is skipped or refused."""

from pathlib import Path

import pytest
from annotation_sets import accepted
from bad_data import write_image
from image_sets import exif_of
from layout_files import write_yolo
from PIL import Image

from onestage.data import YOLO
from onestage.errors import AnnotationError

GOOD = "0 0.5 0.5 0.25 0.5\n"  # centre (20, 10), 10 x 10 of a 40 x 20 image
EDGES = [15, 5, 25, 15]


def parse_label(tmp_path: Path, text: str | bytes | None) -> tuple[list, tuple[str, ...], dict[str, int]]:
    """Return boxes, skipped lines, and rule -> count, for one label file beside a good one."""
    data = write_yolo(tmp_path, {"a": text, "good": GOOD})
    annotations = YOLO(data).read("train")
    counts = {finding.rule: finding.num_items for finding in annotations.findings}
    assert annotations.boxes[-1].tolist() == EDGES
    return annotations.boxes[:-1].tolist(), annotations.skipped, counts


def test_fractions_become_edges_in_pixels(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n0 0.125 0.25 0.25 0.5\n", "b": "", "c": None})
    annotations = YOLO(data).read("train")
    assert annotations.boxes.tolist() == [EDGES, [0, 0, 10, 10]]
    assert annotations.labels.tolist() == [1, 0]
    assert annotations.box_offsets.tolist() == [0, 2, 2, 2]  # images without objects stay
    assert annotations.sizes.tolist() == [[20, 40]] * 3
    assert annotations.areas.tolist() == [100, 100]
    assert (annotations.class_names, annotations.category_ids) == (("cat", "dog"), (1, 2))
    assert annotations.image_ids.tolist() == [1, 2, 3]


def test_expected_names_decide_the_labels(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n"})
    assert YOLO(data).read("train", class_names=["dog", "cat"]).labels.tolist() == [0]
    with pytest.raises(AnnotationError, match=r"(?s)classes differ.*only expected: cow"):
        YOLO(data).read("train", class_names=["dog", "cow"])


def test_outline_becomes_the_box_around_it_and_is_counted(tmp_path) -> None:
    boxes, skipped, counts = parse_label(tmp_path, "0 0.25 0.25 0.5 0.25 0.5 0.75\n0 0.1 0.1 nan 0.2 0.3 0.3\n")
    assert (boxes, counts["outline"]) == ([[10, 5, 20, 15]], 2)
    assert "a.txt:2: " in skipped[0]


def test_keypoints_are_ignored_and_may_be_missing(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "0 0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 1\n0 0.5 0.5 0.25 0.5\n"})
    data.write_text(data.read_text() + "kpt_shape: [2, 3]\n")
    assert YOLO(data).read("train").boxes.tolist() == [EDGES, EDGES]


def test_fractions_are_of_the_upright_image(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "0 0.5 0.5 1 0.5\n"})
    # Stored lying: 40 x 20 is shown as 20 x 40.
    Image.new("RGB", (40, 20)).save(tmp_path / "images/train/a.png", exif=exif_of(6))
    assert YOLO(data).read("train").boxes.tolist() == [[0, 10, 20, 30]]


@pytest.mark.parametrize("text", [GOOD[:-1] + "\r\n", "\ufeff" + GOOD, GOOD.replace(" ", "\t"), f"  1.0{GOOD[1:]}"])
def test_other_line_ends_tabs_and_decimal_classes_are_read(tmp_path, text) -> None:
    assert parse_label(tmp_path, text)[:2] == ([EDGES], ())


def names_of(data: Path, split: str = "train") -> list[str]:
    annotations = YOLO(data).read(split)
    assert len(annotations.boxes) == len(annotations)  # every image found its label
    return [Path(path).name for path in annotations.image_paths]


@pytest.mark.parametrize("name", ["classes.txt", "obj.names", "labels/classes.txt"])
def test_class_names_of_folders_without_yaml_are_read(tmp_path, name) -> None:
    write_yolo(tmp_path, {"a": GOOD}).unlink()
    assert YOLO(tmp_path).read("train").class_names == ("class_0",)
    (tmp_path / name).write_text("cat\ndog\n\n")
    assert names_of(tmp_path) == ["a.png"]
    with pytest.raises(AnnotationError, match=r"no split 'val' \(there are: train\)"):
        YOLO(tmp_path).read("val")


def test_split_of_lists_and_folders_takes_each_image_once(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": GOOD, "b": GOOD, "c": GOOD})
    write_yolo(tmp_path, {"d": GOOD}, split="more")
    (tmp_path / "list.txt").write_text("./images/train/c.png\n\nimages\\train\\a.png\r\nimages/train/a.png\n")
    data.write_text("train: [list.txt, images/more]\nnames: {0: cat, 1: dog}\n")
    assert names_of(data) == ["d.png", "a.png", "c.png"]  # in order of path


def test_path_of_another_machine_falls_back_to_the_folder_of_the_yaml(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n"})
    data.write_text("path: /nowhere/datasets/mine\ntrain: images/train\nnames: {'1': dog, '0': cat}\nnc: 2\n")
    assert names_of(data) == ["a.png"]
    assert YOLO(data).read("train").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 0.5 0.5 0.25", "has 4 columns"),
        ("0 0.5 0.5 0.25 0.5 0.9", "has 6 columns; a line must have 5"),
        ("0,0.5,0.5,0.25,0.5", ":2: 0,0.5,0.5,0.25,0.5: a line must hold numbers with spaces between"),
        ("0 1.5 0.5 0.25 0.5", "cx, cy, width, height must be in 0..1"),
        ("2 0.5 0.5 0.25 0.5", "the class must be a whole number in 0..1; the first one is 0"),
        ("0.5 0.5 0.5 0.25 0.5", "the class must be"),
    ],
)
def test_bad_line_is_skipped_with_its_number(tmp_path, line, problem) -> None:
    boxes, skipped, _ = parse_label(tmp_path, f"{GOOD}{line}\n")
    assert boxes == [EDGES]
    assert len(skipped) == 1
    assert "a.txt:2: " in skipped[0]
    assert problem in skipped[0]


def test_rounding_is_clipped_and_repeated_lines_are_read_once(tmp_path) -> None:
    assert parse_label(tmp_path, "0 0.5 0.5 1.0005 1.0005\n")[:2] == ([[0, 0, 40, 20]], ())
    boxes, skipped, counts = parse_label(tmp_path, GOOD * 3 + "1 0.5 0.5 0.25 0.5\n")
    assert (boxes, skipped, counts["box repeated"]) == ([EDGES, EDGES], (), 2)


def test_images_that_are_unreadable_or_whose_label_file_is_no_text_are_skipped_and_named(tmp_path) -> None:
    # Taken for background, a and b would teach that nothing is there.
    data = write_yolo(tmp_path, {"a": GOOD.encode("cp037"), "b": b"\x89PNG\r\n\x1a\n", "c": GOOD, "good": GOOD})
    (tmp_path / "images/train/c.png").write_bytes(b"nothing")
    (tmp_path / "images/train/d.png").symlink_to(tmp_path / "gone.png")
    annotations = YOLO(data).read("train")
    assert [Path(path).name for path in annotations.image_paths] == ["good.png"]
    assert len(annotations.skipped) == 4
    assert all(name in "\n".join(annotations.skipped) for name in ("a.txt", "b.txt", "c.png", "d.png"))


def test_boxes_in_pixels_and_a_set_without_any_label_file_are_refused(tmp_path) -> None:
    data = write_yolo(tmp_path, {"a": "0 20 10 10 5\n0 5 5 4 4\n0 6 6 4 4\n0 7 7 4 4\n", "good": GOOD})
    with pytest.raises(AnnotationError, match=r"4 of 5 boxes cannot be used(.|\n)*must be in 0\.\.1: fractions"):
        accepted(YOLO(data).read("train"))
    data = write_yolo(tmp_path / "bare", {"a": None, "b": None})
    with pytest.raises(AnnotationError, match=r"(?s)none of its 2 images has an annotation file .*labels/train/a\.txt"):
        YOLO(data).read("train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images/train\n", "has no 'names'"),
        ("names: [cat, dog\n", r"data.yaml: is not YAML .*line 2, column 1"),
        ("names: &n [cat]\ntrain: *n\n", "aliases are not read"),
        ("names: [cat, cat]\ntrain: images/train\n", "2 classes are called 'cat'"),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", "class 1 has no name; .* numbered from 0 without gaps"),
        ("names: [cat, dog]\ntrain: images/gone\n", "'images/gone' is neither a folder nor a list"),
        ("names: [cat, dog]\nval: images/train\n", r"no split 'train' \(there are: val\)"),
        ("names: [cat, dog]\ntrain: labels\n", "holds no image"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, yaml, message) -> None:
    data = write_yolo(tmp_path, {"a": GOOD})
    data.write_text(yaml)
    with pytest.raises(AnnotationError, match=message):
        YOLO(data).read("train")


@pytest.mark.parametrize("line", ["/etc/passwd", "./../outside.png", "..\\outside.png", "a\0b"])
def test_line_that_leads_elsewhere_is_a_missing_image(tmp_path, line) -> None:
    root = tmp_path / "set"
    data = write_yolo(root, {"a": GOOD})
    write_image(tmp_path / "outside.png")
    (root / "list.txt").write_text(f"images/train/a.png\n\n{line}\n")
    data.write_text("train: list.txt\nnames: [cat]\n")
    (skipped,) = YOLO(data).read("train").skipped
    assert "list.txt:3: " in skipped  # blank lines count
    assert f"there is no such image below {root}" in skipped
