"""VOC files: their values, and what is skipped or refused."""

import codecs
from pathlib import Path

import pytest
from annotation_sets import accepted
from bad_data import write_image

from onestage.data.voc import VOC, parse_voc
from onestage.errors import AnnotationError

SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"
EDGES = [10, 20, 40, 60]  # of the object below: pixels 11..40 and 21..60, counted from 1


def obj(name: str = "dog", box: str = "11 21 40 60", extra: str = "") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box.split(" "), strict=True)
    bndbox = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners)
    return f"<object><name>{name}</name>{extra}<bndbox>{bndbox}</bndbox></object>"


def xml(*objects: str, size: str = SIZE) -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write(root: Path, annotations: dict[str, str | bytes | None], split: str = "train") -> Path:
    """Write a VOC folder with one image per stem, and its XML unless that is None."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for stem, content in annotations.items():
        (root / "JPEGImages" / f"{stem}.jpg").write_bytes(b"never opened")
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (root / "Annotations" / f"{stem}.xml").write_bytes(data)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in annotations))
    return root


def test_one_based_inclusive_pixels_become_edges(tmp_path) -> None:
    # Pixels 11..40 of 1..100 are 30 columns, whose edges are 10 and 40. The whole image is 1 1 100 80.
    write(tmp_path, {"a": xml(obj(), obj("cat", "1 1 100 80")), "b": xml()})
    annotations = parse_voc(tmp_path, ["train"])
    assert annotations.boxes.tolist() == [EDGES, [0, 0, 100, 80]]
    assert annotations.areas.tolist() == [30 * 40, 8000]
    assert annotations.sizes.tolist() == [[80, 100], [80, 100]]
    assert (annotations.class_names, annotations.category_ids) == (("cat", "dog"), (1, 2))
    assert annotations.labels.tolist() == [1, 0]
    assert annotations.image_ids.tolist() == [1, 2]
    assert annotations.box_offsets.tolist() == [0, 2, 2]
    assert annotations.image_paths.tolist() == [str(tmp_path / "JPEGImages" / name) for name in ("a.jpg", "b.jpg")]
    assert not annotations.is_crowd.any()
    assert annotations.findings == ()


def test_difficult_and_size_may_be_missing_or_empty(tmp_path) -> None:
    flags = ["", *(f"<difficult>{text}</difficult>" for text in ("", "0", "Unspecified", " 1 ", "yes"))]
    write(tmp_path, {"a": xml(*(obj(extra=flag) for flag in flags))})
    assert parse_voc(tmp_path, ["train"]).is_difficult.tolist() == [False] * 4 + [True] * 2


def test_decimals_spaces_any_order_of_tags_and_parts_of_a_person_are_read(tmp_path) -> None:
    box = "<bndbox><ymax> 60.5 </ymax><xmax>40</xmax><ymin>21</ymin><xmin>11.0</xmin></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    write(tmp_path, {"a": xml(f"<object>{part}{box}<name> dog\n</name></object>")})
    annotations = parse_voc(tmp_path, ["train"])
    assert (annotations.boxes.tolist(), annotations.class_names) == ([[10, 20, 40, 60.5]], ("dog",))
    sizes = ["", "<size/>", "<size><width>0</width><height>0</height><depth>0</depth></size>"]
    write(tmp_path, {str(n): xml(obj(), size=size) for n, size in enumerate(sizes)})
    assert parse_voc(tmp_path, ["train"]).sizes.tolist() == [[0, 0]] * 3


def test_years_and_splits_make_one_set(tmp_path) -> None:
    write(tmp_path / "VOCdevkit/VOC2007", {"000001": xml(obj())}, "trainval")
    write(tmp_path / "VOCdevkit/VOC2012", {"2008_000001": xml(obj("cat")), "x": xml()}, "trainval")
    annotations = parse_voc(tmp_path, ["2007_trainval", "2012_trainval", "2007_trainval"])
    assert [Path(path).stem for path in annotations.image_paths] == ["000001", "2008_000001", "x"]
    assert annotations.class_names == ("cat", "dog")
    assert annotations.image_ids.tolist() == [1, 2, 3]
    assert len(parse_voc(tmp_path / "VOCdevkit", ["2012_trainval"])) == 2
    assert len(VOC(tmp_path / "VOCdevkit/VOC2007", val=["trainval"]).read("val")) == 1


def test_list_may_have_blank_lines_crlf_flags_and_spaces_in_names(tmp_path) -> None:
    write(tmp_path, {stem: xml(obj()) for stem in ("a", "b", "c", "my dog 2")})
    content = codecs.BOM_UTF8 + b"a\r\n\r\n  b -1\r\nc  1\r\nmy dog 2\r\na\r\n"
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(content)
    assert [Path(path).stem for path in parse_voc(tmp_path, ["train"]).image_paths] == ["a", "b", "c", "my dog 2"]


def test_declared_latin_1_is_read(tmp_path) -> None:
    text = '<?xml version="1.0" encoding="iso-8859-1"?>' + xml(obj("bébé"))
    write(tmp_path, {"a": text.encode("latin-1")})
    assert parse_voc(tmp_path, ["train"]).class_names == ("bébé",)


def test_zero_based_boxes_are_clipped_with_one_warning(tmp_path) -> None:
    write(tmp_path, {"a": xml(obj(box="0 0 40 60"), obj(box="0 5 40 60"))})
    annotations = parse_voc(tmp_path, ["train"])
    assert annotations.boxes.tolist() == [[0, 0, 40, 60], [0, 4, 40, 60]]
    assert [(finding.rule, finding.num_items) for finding in annotations.findings] == [("zero-based boxes", 2)]


def test_image_without_xml_is_a_negative_unless_all_are(tmp_path) -> None:
    annotations = parse_voc(write(tmp_path, {"a": xml(obj()), "b": None}), ["train"])
    assert annotations.box_offsets.tolist() == [0, 1, 1]
    assert [(f.rule, f.effect, f.num_items) for f in annotations.findings] == [("image without label file", "note", 1)]
    write(tmp_path / "all", {"a": None, "b": None})
    with pytest.raises(AnnotationError, match=r"none of its 2 images has an annotation file(.|\n)*data\.path"):
        parse_voc(tmp_path / "all", ["train"])


def test_listed_image_that_is_missing_is_skipped_and_named(tmp_path) -> None:
    write(tmp_path, {"a": xml(obj()), "b": xml(obj()), "c": xml(obj())})
    (tmp_path / "JPEGImages/b.jpg").unlink()
    annotations = parse_voc(tmp_path, ["train"])
    assert annotations.image_ids.tolist() == [1, 2]
    assert annotations.skipped == (f"{tmp_path / 'JPEGImages/b'}: there is no such image below {tmp_path}",)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a.jpg\nJPEGImages\\c.jpg\n")  # as other tools write lists
    assert parse_voc(tmp_path, ["train"]).skipped == ()


BOMB = '<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;&x;">]>' + xml(obj("&y;"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "bad.xml: is empty (0 bytes)"),
        (b"<annotation>\n  <object>\n</annotation>", "bad.xml: is not XML: mismatched tag: line 3, column 2"),
        (BOMB.encode(), "DOCTYPE"),
        (b'<?xml version="1.0" encoding="gbk"?>' + xml(obj()).encode(), "is not XML: multi-byte encodings"),
        (xml(obj("stra\xdfe")).encode("latin-1"), "is not XML: not well-formed"),
        (b"<root/>", "its first element is 'root'"),
    ],
)
def test_malformed_xml_file_is_skipped_with_line_and_column(tmp_path, content, problem) -> None:
    write(tmp_path, {"good": xml(obj()), "bad": content})
    annotations = parse_voc(tmp_path, ["train"])
    assert [Path(path).stem for path in annotations.image_paths] == ["good"]
    (finding,) = annotations.findings
    assert (finding.rule, finding.effect) == ("label file malformed", "skipped")
    assert finding.place == str(tmp_path / "Annotations/bad.xml")
    assert problem in finding.line
    with pytest.raises(AnnotationError, match=r"1 of 2 images(.|\n)*bad\.xml(.|\n)*data\.max_bad_fraction: 0\.5"):
        accepted(annotations, max_bad_fraction=0.0)


def test_file_of_an_entity_is_never_read(tmp_path) -> None:
    (tmp_path / "canary.txt").write_text("a secret")
    entity = f'<!DOCTYPE a [<!ENTITY x SYSTEM "{(tmp_path / "canary.txt").as_uri()}">]>' + xml(obj("&x;"))
    write(tmp_path, {"a": xml(obj()), "b": entity})
    assert "a secret" not in str(parse_voc(tmp_path, ["train"]))


@pytest.mark.parametrize(
    ("element", "rule"),
    [
        ("<object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object>", "finite number"),
        (obj(box="1 2 inf 4"), "finite number"),
        (obj(box="5 2 5 4"), "xmin < xmax"),
        (obj(name=" "), "must have a name"),
    ],
)
def test_bad_object_is_skipped_and_named(tmp_path, element, rule) -> None:
    write(tmp_path, {"a": xml(obj("cat"), element)})
    annotations = parse_voc(tmp_path, ["train"])
    assert annotations.boxes.tolist() == [EDGES]
    (line,) = annotations.skipped
    assert line.startswith(f"{tmp_path / 'Annotations/a.xml'}: object 2 ")
    assert rule in line


def test_unknown_class_is_refused_with_its_file_and_the_known_ones(tmp_path) -> None:
    write(tmp_path, {"a": xml(obj("Dog"), obj("cat"))})
    with pytest.raises(AnnotationError) as caught:
        parse_voc(tmp_path, ["train"], class_names=["dog", "cat"])
    for part in (str(tmp_path / "Annotations/a.xml"), "object 1", "'Dog'", "dog, cat", "data.class_names"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r": names no image(.|\n)*another list"),
        (b" \r\n" * 300, r": names no image(.|\n)*another list"),
        (b"caf\xe9\n", r": is not UTF-8(.|\n)*another list"),
        (b"a\n..\n", ":2: .*must be the name of an image"),
        (b"a\na\0\n", ":2: .*must be the name of an image"),
    ],
)
def test_list_without_images_or_with_a_line_that_names_no_file_is_refused(tmp_path, content, message) -> None:
    write(tmp_path, {"a": xml(obj())})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(content)
    with pytest.raises(AnnotationError, match=rf"train\.txt{message}"):
        parse_voc(tmp_path, ["train"])


@pytest.mark.parametrize("line", ["../canary", "../../canary.jpg", "/etc/hostname", "sub/b", "..\\canary"])
def test_line_never_leads_out_of_the_image_folder(tmp_path, line) -> None:
    write(tmp_path, {"a": xml(obj())})
    write_image(tmp_path / "canary.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text(f"a\n{line}\n")
    annotations = parse_voc(tmp_path, ["train"])
    assert [Path(path).name for path in annotations.image_paths.tolist()] == ["a.jpg"]
    assert "there is no such image" in annotations.skipped[0]


def test_folder_of_another_kind_is_refused(tmp_path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere: .* no such folder(.|\n)*data\.path"):
        parse_voc(tmp_path / "nowhere", ["train"])
    write(tmp_path / "VOC2012", {"a": xml(obj())})
    with pytest.raises(AnnotationError, match=r"no list '2007_train' .* there are: 2012_train\.\n(.|\n)*data\.path"):
        parse_voc(tmp_path, ["2007_train"])


def test_without_objects_there_are_no_classes_but_those_given(tmp_path) -> None:
    write(tmp_path, {"a": xml(), "b": xml()})
    assert parse_voc(tmp_path, ["train"]).class_names == ()
    assert parse_voc(tmp_path, ["train"], class_names=["dog"]).box_offsets.tolist() == [0, 0, 0]
