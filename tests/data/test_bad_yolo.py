"""YOLO's rows of the table of bad input, one case for each number. E stops, S leaves out and counts, C goes on."""

from pathlib import Path

import pytest
from yolo_files import write_yolo

from onestage.data.yolo import parse_yolo
from onestage.errors import AnnotationError

pytestmark = pytest.mark.bad_input

GOOD = "0 0.5 0.5 0.25 0.5\n"  # edges 15, 5, 25, 15
EDGES = [15, 5, 25, 15]


def parse_label(tmp_path: Path, text: str | bytes | None) -> tuple[list, tuple[str, ...], dict[str, int]]:
    """Boxes, lines about what was left out, and the count of each rule, for one label file beside a good one."""
    data = write_yolo(tmp_path, {"a": text, "good": GOOD})
    annotations = parse_yolo(data, "train")
    counts = {finding.rule: finding.num_items for finding in annotations.findings}
    assert annotations.boxes[-1].tolist() == EDGES
    return annotations.boxes[:-1].tolist(), annotations.skipped, counts


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.25", "0", "0 0.5 0.5 0.25 0.5 0.9", "cat 0.5 0.5 0.25 0.5", "0 a b c d"])
def test_row_43_line_of_other_columns_or_words_is_left_out_with_its_number(tmp_path: Path, line: str) -> None:
    boxes, skipped, _ = parse_label(tmp_path, f"{GOOD}{line}\n")
    assert boxes == [EDGES]
    assert len(skipped) == 1
    assert "a.txt:2: " in skipped[0]
    assert "nan" not in skipped[0]  # what was written, not what it was read as


def test_row_43_line_of_words_is_quoted(tmp_path: Path) -> None:
    _, skipped, _ = parse_label(tmp_path, f"{GOOD}0,0.5,0.5,0.25,0.5\n")
    assert "a.txt:2: '0,0.5,0.5,0.25,0.5': a line must hold numbers with spaces between" in skipped[0]


def test_row_43_polygon_becomes_a_box_and_is_counted(tmp_path: Path) -> None:
    boxes, skipped, counts = parse_label(tmp_path, "0 0.25 0.25 0.5 0.25 0.5 0.75\n0 0.1 0.1 nan 0.2 0.3 0.3\n")
    assert boxes == [[10, 5, 20, 15]]
    assert counts["outline"] == 2
    assert "a.txt:2: " in skipped[0]


def test_row_44_boxes_in_pixels_are_refused(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": "0 20 10 10 5\n0 5 5 4 4\n0 6 6 4 4\n0 7 7 4 4\n", "good": GOOD})
    with pytest.raises(AnnotationError, match=r"(?s)4 of 5 boxes lie beyond 0\.\.1 \(such as 20 10 10 5\).*Divide"):
        parse_yolo(data, "train", max_bad_fraction=1)


@pytest.mark.parametrize("line", ["0 1.5 0.5 0.25 0.5", "0 -0.01 0.5 0.25 0.5", "0 0.5 0.5 0.25 1e9"])
def test_row_44_single_box_beyond_the_image_is_left_out(tmp_path: Path, line: str) -> None:
    boxes, skipped, _ = parse_label(tmp_path, f"{line}\n")
    assert boxes == []
    assert "cx, cy, width, height must be in 0..1" in skipped[0]


def test_row_44_rounding_is_clipped(tmp_path: Path) -> None:
    boxes, skipped, _ = parse_label(tmp_path, "0 0.5 0.5 1.0005 1.0005\n")
    assert boxes == [[0, 0, 40, 20]]
    assert skipped == ()


@pytest.mark.parametrize("index", ["2", "-1", "nan", "0.5", "inf", "1e300"])
def test_row_45_class_that_is_none_is_left_out(tmp_path: Path, index: str) -> None:
    boxes, skipped, _ = parse_label(tmp_path, f"{index} 0.5 0.5 0.25 0.5\n")
    assert boxes == []
    assert "the class must be a whole number in 0..1; the first one is 0" in skipped[0]


def test_row_45_class_written_with_a_point_is_read(tmp_path: Path) -> None:
    assert parse_label(tmp_path, "1.0 0.5 0.5 0.25 0.5\n")[:2] == ([EDGES], ())


def test_row_46_repeated_lines_are_read_once(tmp_path: Path) -> None:
    boxes, skipped, counts = parse_label(tmp_path, GOOD * 3 + "1 0.5 0.5 0.25 0.5\n")
    assert boxes == [EDGES, EDGES]
    assert (skipped, counts["box repeated"]) == ((), 2)


@pytest.mark.parametrize("text", ["", "\n\n", None])
def test_row_46_image_without_lines_or_file_stays_as_background(tmp_path: Path, text: str | None) -> None:
    boxes, skipped, counts = parse_label(tmp_path, text)
    assert (boxes, skipped) == ([], ())
    assert counts.get("image without label file") == (1 if text is None else None)


def test_row_46_no_label_file_at_all_is_refused(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": None, "b": None})
    with pytest.raises(AnnotationError, match=r"(?s)none of its 2 images has a label file .*labels/train/a\.txt"):
        parse_yolo(data, "train")


@pytest.mark.parametrize("content", [GOOD.encode("utf-16"), b"\x89PNG\r\n\x1a\n", b"\xff\xfe\x00", b"0 0.5\0 0.5 1 1"])
def test_row_47_label_file_that_is_no_text_takes_its_image_along(tmp_path: Path, content: bytes) -> None:
    data = write_yolo(tmp_path, {"a": content, "good": GOOD})
    annotations = parse_yolo(data, "train")
    assert len(annotations) == 1  # to train on it as background would teach what is not so
    assert "a.txt" in annotations.skipped[0]


@pytest.mark.parametrize("text", [GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD, GOOD.replace(" ", "\t"), f"  {GOOD}"])
def test_row_47_windows_line_ends_a_byte_order_mark_and_tabs_are_read(tmp_path: Path, text: str) -> None:
    assert parse_label(tmp_path, text)[:2] == ([EDGES], ())


@pytest.mark.parametrize("names", ["[cat, dog]\nnc: 3", "[cat, dog]\nnc: 1", "{0: cat, 2: dog}", "{1: cat, 2: dog}"])
def test_row_48_names_that_do_not_cover_the_classes_are_refused(tmp_path: Path, names: str) -> None:
    data = write_yolo(tmp_path, {"a": GOOD})
    data.write_text(f"train: images/train\nnames: {names}\n")
    with pytest.raises(
        AnnotationError, match=r"nc is \d, but there are 2 names|names has the indices \d, 2; they must"
    ):
        parse_yolo(data, "train")


def test_row_48_keys_of_names_may_be_text(tmp_path: Path) -> None:
    data = write_yolo(tmp_path, {"a": GOOD})
    data.write_text("train: images/train\nnames: {'1': dog, '0': cat}\nnc: 2\n")
    assert parse_yolo(data, "train").class_names == ("cat", "dog")
