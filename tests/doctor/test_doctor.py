"""The command: what it prints, its exit codes, leakage, the child that decodes, the cleaned copy, the sheet."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import deadly_decoder
import numpy as np
import pytest
from bad_data import HEIGHT, WIDTH, coco_content, doctor, found, write_coco
from PIL import Image

from onestage.cli import main
from onestage.data.annotations import RULES
from onestage.data.coco import parse_coco
from onestage.doctor import decoding
from onestage.doctor.decoder_child import Task
from onestage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
BCCD, COCO128 = SHARED_DATA / "bccd", SHARED_DATA / "coco128"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD images are not here")
needs_coco128 = pytest.mark.skipif(not COCO128.is_dir(), reason="the COCO images are not here")


def clean_content() -> dict:
    """24 images, so that no class is rare."""
    return coco_content(24)


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder -> when it was written, and its content."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def spoiled(folder: Path) -> Path:
    """A file with a box to clip, one to leave out, a missing image and a key of its own."""
    content = clean_content()
    content["licenses"] = [{"id": 1}]
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    content["annotations"][1]["bbox"] = [90, 70, 40, 40]
    content["annotations"][2]["bbox"][3] = 0
    content["annotations"][3]["id"] = 1
    file = write_coco(folder, content)
    (folder / "train" / "a5.jpg").unlink()
    return file


def test_a_clean_set_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert report["classes"][1] == {
        "label": 1, "category_id": 7, "name": "dog", "num_images": {"train": 24}, "num_boxes": {"train": 24},
    }  # fmt: skip


def test_a_class_name_cannot_colour_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "\x1b[31mcat\n"
    assert main(["doctor", str(write_coco(tmp_path, content))]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "'\\x1b[31mcat'" in text


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = clean_content()
    content["annotations"][1]["bbox"] = [90, 70, 40, 40]  # clipped: a warning
    file = write_coco(tmp_path, content)
    assert main(["doctor", str(file)]) == 0
    assert main(["doctor", str(file), "--strict"]) == 1
    assert main(["doctor", str(tmp_path / "nowhere.json")]) == 3
    assert main(["doctor", str(tmp_path / "nowhere")]) == 3
    assert "nowhere: there is no such file or folder" in capsys.readouterr().err
    assert main(["doctor"]) == 2
    assert main(["doctor", str(file), "--detector", "YOLO"]) == 2
    assert main(["doctor", str(file), "--anchors", "mine"]) == 2
    assert main(["doctor", str(file), "--max_bad_fraction", "2"]) == 2
    assert main(["doctor", str(tmp_path / "train")]) == 3
    assert "is no data set that is known here" in capsys.readouterr().err


def test_the_data_set_is_never_written_to(tmp_path: Path) -> None:
    file = spoiled(tmp_path / "set")
    before = tree(tmp_path / "set")
    outside = tmp_path / "out"
    doctor(file, "--decode", "--fix-to", outside / "new.json", "--draw", "2", outside / "sheet.png")
    assert tree(tmp_path / "set") == before
    assert sorted(path.name for path in outside.iterdir()) == ["new.changes.jsonl", "new.json", "sheet.png"]


def test_the_cleaned_copy_holds_what_a_training_uses(tmp_path: Path) -> None:
    file = spoiled(tmp_path)
    new = tmp_path / "clean.json"
    assert doctor(file, "--fix-to", new)[0] == 3
    before, after = parse_coco(file, tmp_path / "train"), parse_coco(new, tmp_path / "train")
    assert after.findings == ()
    for name in ("image_paths", "image_ids", "sizes", "box_offsets", "boxes", "labels", "is_crowd"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name
    assert (before.areas[1], after.areas[1]) == (1200, 100)  # of the box that was cut
    assert np.array_equal(np.delete(before.areas, 1), np.delete(after.areas, 1))
    content = json.loads(new.read_text())
    assert content["licenses"] == [{"id": 1}]
    assert content["annotations"][0]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert content["annotations"][1]["bbox"] == [90, 70, 10, 10]
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, 46))
    changes = [json.loads(line) for line in (tmp_path / "clean.changes.jsonl").read_text().splitlines()]
    left_out = [change for change in changes if change["change"] == "skipped"]
    assert [change.get("file_name", change.get("annotation")) for change in left_out] == ["a5.jpg", 3, 11, 12]
    assert {"annotation": 2, "image": 1, "change": "corrected"}.items() <= changes[1].items()
    assert doctor(new, "--images", tmp_path / "train")[0] == 0


def test_an_image_that_cannot_be_decoded_is_not_in_the_cleaned_copy(tmp_path: Path) -> None:
    file = write_coco(tmp_path, coco_content())
    image = tmp_path / "train" / "a2.jpg"
    content = image.read_bytes()
    table = content.index(b"\xff\xc4") + 5  # the Huffman table's counts, which no header shows to be wrong
    image.write_bytes(content[:table] + b"\xff" * 16 + content[table + 16 :])
    assert doctor(file)[0] == 0
    code, report = doctor(file, "--decode", "--fix-to", tmp_path / "clean.json")
    assert (code, [finding["place"] for finding in found(report, "image unreadable")]) == (3, [str(image)])
    kept = json.loads((tmp_path / "clean.json").read_text())["images"]
    assert [entry["file_name"] for entry in kept] == ["a0.jpg", "a1.jpg", "a3.jpg"]
    assert report["splits"][0]["num_images"] == 3


def test_a_copy_overwrites_nothing_and_is_of_one_coco_file(tmp_path: Path) -> None:
    file = spoiled(tmp_path)
    for words in (["--fix-to", str(file)], ["--fix-to", str(tmp_path / "x.txt")], [str(file), "--fix-to", "x.json"]):
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match="--fix-to"):
            doctor(file, *words)
        assert tree(tmp_path) == before


def test_copies_in_two_splits_are_found(tmp_path: Path) -> None:
    train = write_coco(tmp_path, clean_content())
    val = write_coco(tmp_path, clean_content(), "val")
    assert doctor(train, val)[1]["findings"] == []  # no two pictures of the noise are alike
    (tmp_path / "val" / "a3.jpg").write_bytes((tmp_path / "train" / "a7.jpg").read_bytes())
    picture = Image.open(tmp_path / "train" / "a9.jpg")
    picture.save(tmp_path / "val" / "a4.jpg", quality=40)
    code, report = doctor(train, val)
    (copy,) = found(report, "copy in two splits")
    assert (code, copy["effect"], Path(copy["place"]).name) == (3, "error", "a3.jpg")
    assert str(tmp_path / "train" / "a7.jpg") in copy["problem"]
    (likeness,) = found(report, "near copy in two splits")
    assert (likeness["effect"], Path(likeness["place"]).name) == ("warning", "a4.jpg")
    assert str(tmp_path / "train" / "a9.jpg") in likeness["problem"]
    assert found(doctor(train, val, "--no-near-copies")[1], "near copy in two splits") == []


def test_classes_of_one_split_rare_ones_and_repeated_boxes_are_reported(tmp_path: Path) -> None:
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


def test_a_decoder_that_dies_is_a_finding_and_the_next_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_each", deadly_decoder.decode_each)
    names = ["a", "bad", "kill", "b", "bad", "kill"]
    findings = decoding.decode_in_child([Task(name, (0, 0)) for name in names])
    assert [finding.place for finding in findings] == ["bad", "kill", "bad", "kill"]
    assert findings[0].problem == "is torn"
    assert "SIGSEGV" in findings[1].problem


def test_a_decoder_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_each", deadly_decoder.decode_each)
    monkeypatch.setattr(decoding, "SECONDS_PER_IMAGE", 0.5)
    (finding,) = decoding.decode_in_child([Task("sleep", (0, 0)), Task("a", (0, 0))])
    assert (finding.place, "took more than 0.5 s" in finding.problem) == ("sleep", True)


def test_the_sheet_shows_each_image_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco_content(2)
    for entry in content["annotations"]:
        entry["bbox"] = [20, 16, 60, 48]  # at 300 px: 60, 60, 240, 240
    file = write_coco(tmp_path, content)
    for path in (tmp_path / "train").iterdir():
        Image.new("RGB", (WIDTH, HEIGHT), "black").save(path)
    sheet = tmp_path / "sheet.png"
    assert main(["doctor", str(file), "--draw", "5", str(sheet)]) == 0
    assert "2 images" in capsys.readouterr().err
    picture = cv2.imread(str(sheet))
    assert picture.shape == (2 * 308, 608, 3)
    edge = picture[150, 57:63].max(axis=1)  # the left edge of the box, in a colour
    assert edge.max() > 150
    assert picture[150, 100].max() < 20  # inside it, black
    assert main(["doctor", str(file), "--draw", "5", str(sheet)]) == 2  # nothing is overwritten
    assert main(["doctor", str(file), "--draw", "0", str(tmp_path / "a.png")]) == 2
    assert main(["doctor", str(file), "--draw", "5", str(tmp_path / "a.bmp")]) == 2


def test_folders_are_recognised_by_what_is_in_them(tmp_path: Path) -> None:
    write_coco(tmp_path / "annotations", coco_content(), "instances_train2017")
    (tmp_path / "annotations" / "instances_train2017").rename(tmp_path / "train2017")
    assert doctor(tmp_path)[1]["splits"][0]["name"] == "train2017"
    for split in ("train", "valid"):
        folder = tmp_path / "roboflow" / split
        write_coco(folder, coco_content(), "_annotations.coco")
        for path in (folder / "_annotations.coco").iterdir():
            path.rename(folder / path.name)
        (folder / "_annotations.coco").rmdir()
    assert [split["name"] for split in doctor(tmp_path / "roboflow")[1]["splits"]] == ["train", "valid"]


def test_doctor_imports_neither_lightning_nor_augmentation(tmp_path: Path) -> None:
    file = write_coco(tmp_path, clean_content())
    program = (
        "import sys\nfrom onestage.cli import main\nmain(['doctor', sys.argv[1]])\n"
        "heavy = ('lightning', 'albumentations', 'torchvision', 'torchmetrics')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_every_rule_has_a_remedy_and_a_row_in_the_docs() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for rule in RULES.values():
        assert rule.remedy.endswith((".", "?"))
        assert f"| {rule.name} | {rule.effect} |" in text, rule.name


def test_the_options_of_the_docs_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    given = set(re.findall(r"--[\w-]+", capsys.readouterr().out.partition("exit codes")[0])) - {"--help"}
    rows = [line for line in (ROOT / "docs" / "doctor.md").read_text("utf-8").splitlines() if line.startswith("| `--")]
    assert {word for row in rows for word in re.findall(r"--[\w-]+", row.split("|")[1])} == given


def test_each_row_of_the_table_of_bad_data_has_a_named_case() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_bad_*.py")]
    rows = {int(number) for source in sources for number in re.findall(r"^def test_row_(\d\d)_", source, re.MULTILINE)}
    assert rows == set(range(1, 60))


@needs_bccd
def test_bccd_has_two_degenerate_boxes_and_nothing_else() -> None:
    code, report = doctor(BCCD)
    assert code == 3
    assert {finding["rule"] for finding in report["findings"]} == {"object malformed"}
    places = sorted(Path(finding["place"].partition(":")[0]).stem for finding in report["findings"])
    assert places == ["BloodImage_00338", "BloodImage_00343"]
    assert [split["num_images"] for split in report["splits"]] == [205, 87, 72]


@needs_coco128
def test_coco128_is_the_same_in_both_forms() -> None:
    annotations = COCO128 / "annotations"
    as_coco = doctor(annotations / "instances_train2017.json", annotations / "instances_val2017.json")[1]
    as_yolo = doctor(COCO128 / "yolo.yaml")[1]
    keys = ("num_images", "num_empty_images", "num_boxes", "num_classes")
    numbers = [[[split[key] for key in keys] for split in report["splits"]] for report in (as_coco, as_yolo)]
    assert numbers[0] == numbers[1]
    assert numbers[0][0][:1] == [128]
    counts = [[list(row["num_boxes"].values()) for row in report["classes"]] for report in (as_coco, as_yolo)]
    assert counts[0] == counts[1]
    assert [row["name"] for row in as_coco["classes"]] == [row["name"] for row in as_yolo["classes"]]
