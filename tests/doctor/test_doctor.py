"""The command `onestage doctor`: text, JSON, exit codes, leakage, decoding in a child, the sheet.

What only --decode finds: data/test_bad_images.py.
"""

import hashlib
import re
from pathlib import Path

import cv2
import deadly_decoder
import pytest
from annotation_sets import annotation_set
from bad_data import HEIGHT, WIDTH, coco_content, doctor, found, write_coco
from PIL import Image

from onestage.cli import main
from onestage.data import annotations
from onestage.doctor import decoding
from onestage.doctor.statistics import check_objects

ROOT = Path(__file__).resolve().parents[2]
BCCD = ROOT / "../shared/data/bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="needs the BCCD images")


def clean_content() -> dict:
    """24 images, so that no class is rare."""
    return coco_content(24)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Return every path below a folder -> modification time and digest."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def test_clean_data_set_is_reported_with_its_counts(tmp_path, capsys):
    file = write_coco(tmp_path, clean_content())
    assert main(["doctor", str(file), "--strict"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("clean\n")
    assert "24 image headers" in text
    _, report = doctor(file)
    assert report["findings"] == []
    assert report["splits"][0] | {"source": ""} == {
        "name": "train", "format": "COCO", "source": "", "num_images": 24, "num_empty_images": 0, "num_boxes": 48,
        "num_crowds": 0, "num_difficult": 0, "num_classes": 2,
    }  # fmt: skip
    counts = {"num_images": {"train": 24}, "num_boxes": {"train": 24}}
    assert report["classes"][1] == {"label": 1, "category_id": 7, "name": "dog", **counts}
    coverage = report["coverage"]
    assert (coverage["detector"], coverage["image_size"], coverage["by_size"][0]) == ("SSD300", 300, None)


def test_class_name_cannot_colour_the_terminal(tmp_path, capsys):
    content = coco_content()
    content["categories"][0]["name"] = "\x1b[31mcat\n"
    assert main(["doctor", str(write_coco(tmp_path, content))]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "'\\x1b[31mcat'" in text


def test_exit_code_follows_the_worst_finding(tmp_path, capsys):
    content = clean_content()
    content["annotations"][1]["bbox"] = [90, 70, 40, 40]  # clipped: a warning
    file = str(write_coco(tmp_path, content))
    assert main(["doctor", file]) == 0
    assert main(["doctor", file, "--strict"]) == 1
    assert main(["doctor", str(tmp_path / "nowhere.json")]) == 3
    assert main(["doctor", str(tmp_path / "nowhere")]) == 3
    assert main(["doctor", str(tmp_path / "train")]) == 3
    capsys.readouterr()
    for words in ([], [file, "--detector", "YOLO9000"], [file, "--anchors", "mine"], [file, "--max_bad_fraction", "2"]):
        assert main(["doctor", *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_data_set_is_never_changed(tmp_path):
    content = clean_content()
    content["annotations"][2]["bbox"][3] = 0
    file = write_coco(tmp_path / "set", content)
    (tmp_path / "set" / "train" / "a5.jpg").unlink()
    before = tree(tmp_path / "set")
    assert doctor(file, "--decode", "--draw", tmp_path / "out" / "sheet.png", "--num_drawn", "2")[0] == 3
    assert tree(tmp_path / "set") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sheet.png"]


def test_copies_and_near_copies_in_two_splits_are_found(tmp_path):
    train = write_coco(tmp_path, clean_content())
    val = write_coco(tmp_path, clean_content(), "val")
    assert doctor(train, val)[1]["findings"] == []  # no two pictures of the noise are similar
    (tmp_path / "val" / "a3.jpg").write_bytes((tmp_path / "train" / "a7.jpg").read_bytes())
    picture = Image.open(tmp_path / "train" / "a9.jpg")
    picture.save(tmp_path / "val" / "a4.jpg", quality=40)
    code, report = doctor(train, val)
    (copy,) = found(report, "copy in two splits")
    assert (code, copy["effect"], Path(copy["place"]).name) == (0, "warning", "a3.jpg")
    assert str(tmp_path / "train" / "a7.jpg") in copy["problem"]
    (near_copy,) = found(report, "near copy in two splits")
    assert (near_copy["effect"], Path(near_copy["place"]).name) == ("warning", "a4.jpg")
    assert str(tmp_path / "train" / "a9.jpg") in near_copy["problem"]
    assert found(doctor(train, val, "--no_near_copies")[1], "near copy in two splits") == []


def test_classes_of_one_split_rare_classes_and_repeated_boxes_are_found(tmp_path):
    content = clean_content()
    content["annotations"].append(dict(content["annotations"][0], id=99))
    train = write_coco(tmp_path, content)
    others = clean_content()
    others["annotations"] = [entry for entry in others["annotations"] if entry["category_id"] == 3]
    _, report = doctor(train, write_coco(tmp_path, others, "val"))
    assert "dog" in found(report, "class in one split")[0]["problem"]
    assert found(report, "box repeated")[0]["num_items"] == 1
    few = write_coco(tmp_path / "few", coco_content())
    assert "cat, dog" in found(doctor(few)[1], "rare class")[0]["problem"]


@pytest.mark.parametrize("max_detections", [100, 200])
def test_more_objects_than_the_metrics_count_are_reported(max_detections):
    found_in = check_objects(annotation_set([[0] * 100, [0] * 101]), max_detections)
    assert [(finding.rule, finding.num_items) for finding in found_in] == [("many objects", 1)]


def test_decoding_continues_after_images_that_kill_or_hang_the_decoder(monkeypatch):
    monkeypatch.setattr(decoding, "problem_of", deadly_decoder.problem_of)
    names = ["a", "bad", "kill", "b", "sleep", "bad", "kill"]
    torn, killed = "bad: is torn.\nReplace it.", "it crashed the decoder, or took more than 30 s"
    problems = decoding.decode_in_child([(name, (0, 0)) for name in names])
    assert problems == ["", torn, killed, "", killed, torn, killed]


def test_sheet_shows_each_image_before_and_after_augmentation(tmp_path, capsys):
    content = coco_content(3)
    for entry in content["annotations"]:
        entry["bbox"] = [20, 16, 60, 48]  # at 300 px: 60, 60, 240, 240
    file = write_coco(tmp_path, content)
    for level, path in enumerate((tmp_path / "train").iterdir()):
        Image.new("RGB", (WIDTH, HEIGHT), "black").save(path, quality=80 + level)  # no copies
    sheet = tmp_path / "sheet.png"
    assert main(["doctor", str(file), "--draw", str(sheet), "--num_drawn", "2"]) == 0
    assert "2 images" in capsys.readouterr().err
    picture = cv2.imread(str(sheet))
    assert picture.shape == (2 * 308, 608, 3)
    assert picture[80:220, 57:63].max() > 150  # the left edge of the box
    assert picture[150, 100:200].max() < 20  # inside of it
    for words in (["sheet.png"], ["a.bmp"], ["a.png", "--num_drawn", "0"]):  # nothing is overwritten
        assert main(["doctor", str(file), "--draw", str(tmp_path / words[0]), *words[1:]]) == 2


def test_every_rule_has_a_remedy_and_a_row_in_the_docs():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for rule in (value for value in vars(annotations).values() if isinstance(value, annotations.Rule)):
        assert rule.remedy.endswith((".", "?"))
        assert f"| {rule.name} | {rule.effect} |" in text, rule.name


def test_docs_name_exactly_the_options_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    given = set(re.findall(r"^ +(--\w+)", capsys.readouterr().out, re.MULTILINE))
    rows = [line for line in (ROOT / "docs" / "doctor.md").read_text("utf-8").splitlines() if line.startswith("| `--")]
    named = {word.replace("--no_", "--") for row in rows for word in re.findall(r"--\w+", row.split("|")[1])}
    assert named == given - {"--help"}


@needs_bccd
def test_bccd_has_only_two_degenerate_boxes():
    code, report = doctor(BCCD)
    assert code == 3
    assert {finding["rule"] for finding in report["findings"]} == {"object malformed"}
    places = sorted(Path(finding["place"].partition(":")[0]).stem for finding in report["findings"])
    assert places == ["BloodImage_00338", "BloodImage_00343"]
    assert [split["num_images"] for split in report["splits"]] == [205, 87, 72]
