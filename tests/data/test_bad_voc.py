"""VOC's rows of the table of bad input, one case for each number. E stops, S leaves out and counts, C goes on."""

from pathlib import Path

import pytest
from bad_data import HEIGHT, WIDTH, doctor, found, write_image

from onestage.data.voc import parse_voc
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet

pytestmark = pytest.mark.bad_input

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
EDGES = [10, 20, 40, 60]  # of the object below: pixels 11..40 and 21..60, counted from 1


def obj(name: str = "dog", box: str = "11 21 40 60", extra: str = "") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box.split(" "), strict=True)
    return (
        f"<object><name>{name}</name>{extra}<bndbox>{''.join(f'<{c}>{v}</{c}>' for c, v in corners)}</bndbox></object>"
    )


def xml(*objects: str, stem: str = "b") -> str:
    return f"<annotation><filename>{stem}.jpg</filename>{SIZE}{''.join(objects)}</annotation>"


def write_voc(root: Path, spoiled: str | bytes | None = None, lines: str = "a\nb\nc\n") -> Path:
    """Images a, b and c with one dog each; b has the given XML, or none if that is None."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(lines.encode())
    for number, stem in enumerate("abc"):
        write_image(root / "JPEGImages" / f"{stem}.jpg", seed=number)
        content = xml(obj(), stem=stem) if stem != "b" else spoiled
        if content is not None:
            (root / "Annotations" / f"{stem}.xml").write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
    return root


def parse(root: Path) -> AnnotationSet:
    return parse_voc(root, ["train"])


def assert_left_out(root: Path, rule: str, num_images: int, num_boxes: int, *expected: str) -> dict:
    """S: training leaves one thing out and says where; doctor names place, rule and remedy and exits with 3."""
    annotations = parse(root)
    assert (len(annotations), len(annotations.boxes)) == (num_images, num_boxes)
    assert len(annotations.skipped) == 1
    code, report = doctor(root)
    (finding,) = found(report, rule)
    assert (code, finding["effect"]) == (3, "skipped")
    assert finding["place"].startswith(str(root))
    assert finding["remedy"]
    for words in expected:
        assert words in f"{finding['place']}: {finding['problem']}"
    return finding


def assert_goes_on(root: Path, rule: str | None, boxes: list[list[float]]) -> AnnotationSet:
    """C: all three images stay, b with these boxes; doctor exits with 0 and mentions it, if it is worth it."""
    annotations = parse(root)
    assert (len(annotations), annotations.skipped) == (3, ())
    assert annotations.boxes[annotations.objects(1)].tolist() == boxes
    code, report = doctor(root)
    assert code == 0, report["findings"]
    if rule is not None:
        assert [finding["effect"] in ("warning", "note") for finding in found(report, rule)] == [True]
    return annotations


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<annotation><object></annotation>", "b.xml:1:23: is not XML: mismatched tag"),
        (b"", "b.xml: is empty (0 bytes)"),
        (xml(obj()).encode()[:80], "b.xml:1:"),
        (xml(obj()).encode().replace(b"dog", b"d\0g"), "b.xml:1:"),
        (b"<html>404</html>", "web page"),
        (b"<annotations/>", "its first element is 'annotations'"),
    ],
    ids=["tag", "empty", "cut off", "NUL", "web page", "other root"],
)
def test_row_31_malformed_xml_leaves_the_image_out_with_line_and_column(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    assert_left_out(write_voc(tmp_path, content), "XML malformed", 2, 2, expected)


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;">]>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        "<!DOCTYPE annotation>",
    ],
    ids=["bomb", "file", "doctype"],
)
def test_row_32_doctype_and_entities_leave_the_image_out_with_a_security_warning(tmp_path: Path, head: str) -> None:
    text = head + xml(obj("dog&y;" if "y" in head[:40] and "&x;" in head else "dog"))
    finding = assert_left_out(write_voc(tmp_path, text), "XML with entities", 2, 2, "b.xml", "refused")
    assert "read other files" in finding["remedy"]


def test_row_32_file_of_an_entity_is_never_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text("a secret")
    text = f'<!DOCTYPE a [<!ENTITY x SYSTEM "{canary.as_uri()}">]>' + xml(obj("&x;"))
    root = write_voc(tmp_path / "voc", text)
    assert "a secret" not in str(parse(root).findings)
    assert "a secret" not in str(doctor(root))


@pytest.mark.parametrize(
    "broken",
    [
        "<object><name>dog</name></object>",
        obj().replace("<ymin>21</ymin>", ""),
        obj().replace("<name>dog</name>", ""),
        obj().replace("<xmin>11</xmin>", "<xmin/>"),
    ],
    ids=["no bndbox", "no ymin", "no name", "empty xmin"],
)
def test_row_33_object_without_its_parts_is_left_out(tmp_path: Path, broken: str) -> None:
    assert_left_out(write_voc(tmp_path, xml(obj(), broken)), "object malformed", 3, 3, "b.xml: object 2")


def test_row_33_tags_may_come_in_any_order(tmp_path: Path) -> None:
    box = "<bndbox><ymax>60</ymax><xmax>40</xmax><ymin>21</ymin><xmin>11</xmin></bndbox>"
    text = f"<annotation><object>{box}<name>dog</name></object>{SIZE}</annotation>"
    assert_goes_on(write_voc(tmp_path, text), None, [EDGES])


def test_row_34_fractions_and_spaces_are_read_and_a_comma_is_not(tmp_path: Path) -> None:
    padded = obj().replace(">11<", "> 11.0\n<").replace(">21<", ">21.00 <")
    assert_goes_on(write_voc(tmp_path / "a", xml(padded)), None, [EDGES])
    comma = xml(obj(), obj(box="11,5 21 40 60"))
    assert_left_out(write_voc(tmp_path / "b", comma), "object malformed", 3, 3, "b.xml: object 2", "a finite number")


@pytest.mark.parametrize("box", ["40 21 40 60", "41 21 40 60", "11 60 40 60", "11 61 40 60"])
def test_row_35_corners_in_the_wrong_order_leave_the_object_out(tmp_path: Path, box: str) -> None:
    root = write_voc(tmp_path, xml(obj(), obj(box=box)))
    assert_left_out(root, "object malformed", 3, 3, "b.xml: object 2 (dog)", "xmin < xmax and ymin < ymax must hold")


def test_row_36_boxes_counted_from_zero_are_clipped_with_one_warning(tmp_path: Path) -> None:
    root = write_voc(tmp_path, xml(obj(box="0 0 40 60"), obj(box="0 21 40 60")))
    annotations = assert_goes_on(root, "zero-based boxes", [[0, 0, 40, 60], [0, 20, 40, 60]])
    assert [finding.num_items for finding in annotations.findings] == [2]


def test_row_37_spaces_around_a_name_are_stripped_and_another_case_is_reported(tmp_path: Path) -> None:
    assert_goes_on(write_voc(tmp_path / "a", xml(obj(" dog\n"))), None, [EDGES])
    assert_goes_on(write_voc(tmp_path / "b", xml(obj("Dog"))), "similar class names", [EDGES])


def test_row_37_unknown_class_stops_with_the_nearest_name(tmp_path: Path) -> None:
    root = write_voc(tmp_path, xml(obj("dgo")))
    with pytest.raises(AnnotationError) as caught:
        parse_voc(root, ["train"], class_names=["cat", "dog"])
    text = str(caught.value)
    assert f"{root / 'Annotations' / 'b.xml'}: object 1: 'dgo' (nearest: 'dog')" in text
    assert text.endswith("Correct the names, or add them to data.class_names.")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    code, report = doctor(root)
    (finding,) = found(report, "class unknown in training")
    assert (code, finding["effect"]) == (3, "error")
    assert "'dgo' (nearest: 'dog')" in finding["problem"]


@pytest.mark.parametrize("extra", ["", "<difficult/>", "<difficult></difficult>", "<difficult>0</difficult>"])
def test_row_38_difficult_may_be_missing_or_empty(tmp_path: Path, extra: str) -> None:
    annotations = assert_goes_on(write_voc(tmp_path, xml(obj(extra=extra))), None, [EDGES])
    assert not annotations.is_difficult.any()


def test_fractions_of_the_image_stop(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for stem in "abc":
        (root / "Annotations" / f"{stem}.xml").write_text(xml(obj(box="0.1 0.25 0.5 0.75"), stem=stem))
    with pytest.raises(AnnotationError, match=r"all of the 3 boxes lie within 0\.\.1, like fractions"):
        parse(root)


def test_a_list_of_file_names_is_told_from_missing_images(tmp_path: Path) -> None:
    root = write_voc(tmp_path, xml(obj()), lines="a.jpg\nb.jpg\nc.jpg\n")
    with pytest.raises(AnnotationError, match=r"JPEGImages/a\.jpg: the list names it with its suffix"):
        parse(root)


def test_row_39_image_without_xml_is_a_negative_and_xml_without_image_is_left_out(tmp_path: Path) -> None:
    annotations = assert_goes_on(write_voc(tmp_path / "a", None), "image without XML", [])
    assert [finding.num_items for finding in annotations.findings] == [1]
    root = write_voc(tmp_path / "b", xml(obj()))
    (root / "JPEGImages" / "b.jpg").unlink()
    assert_left_out(root, "image missing", 2, 2, "JPEGImages/b", "there is no such image")


@pytest.mark.parametrize("suffix", [".jpeg", ".JPG", ".png", ".PNG"])
def test_row_40_name_of_the_file_decides_and_known_suffixes_are_tried(tmp_path: Path, suffix: str) -> None:
    root = write_voc(tmp_path, xml(obj(), stem="quite_another"))
    (root / "JPEGImages" / "b.jpg").unlink()
    write_image(root / "JPEGImages" / f"b{suffix}", seed=5)
    annotations = assert_goes_on(root, "other file name", [EDGES])
    assert str(annotations.image_paths[1]).endswith(f"b{suffix}")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ('<?xml version="1.0" encoding="gbk"?>' + xml(obj("狗")), "save it as UTF-8"),
        (xml(obj("chien à poil")), "save it as UTF-8"),
    ],
    ids=["gbk", "latin-1, not declared"],
)
def test_row_41_other_encoding_leaves_the_image_out_with_a_hint(tmp_path: Path, content: str, hint: str) -> None:
    encoding = "gbk" if "gbk" in content else "latin-1"
    root = write_voc(tmp_path, content.encode(encoding))
    assert_left_out(root, "XML malformed", 2, 2, "b.xml", hint)


def test_row_41_declared_latin_1_is_read(tmp_path: Path) -> None:
    text = '<?xml version="1.0" encoding="iso-8859-1"?>' + xml(obj("bébé"))
    annotations = assert_goes_on(write_voc(tmp_path, text.encode("latin-1")), None, [EDGES])
    assert annotations.class_names == ("bébé", "dog")


@pytest.mark.parametrize("lines", ["a\n\nb\n\n\nc\n", "a\r\nb\r\nc\r\n", "a  1\nb -1\nc  0\n", "\ufeffa\nb\nc"])
def test_row_42_list_with_blank_lines_carriage_returns_or_columns_is_read(tmp_path: Path, lines: str) -> None:
    assert_goes_on(write_voc(tmp_path, xml(obj()), lines), None, [EDGES])
