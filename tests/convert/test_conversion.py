import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_modules import coco_data, voc_data, yolo_data
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from yolo_files import write_image

from onestage.cli import main
from onestage.convert.conversion import convert
from onestage.data.layouts import find_sources
from onestage.data.writers import Losses
from onestage.errors import AnnotationError, ConfigError, DataError
from onestage.types import AnnotationSet

REAL = Path(__file__).resolve().parents[2] / "../shared/data"
TOLERANCE = 0.51  # px; a coordinate rounded to whole pixels moves by half of one


def write_source(root: Path) -> list[Path]:
    """A COCO set of two splits with all that is hard to carry. Returns its two annotation files."""
    categories = [{"id": 3, "name": "cat & dog"}, {"id": 7, "name": "zebra"}, {"id": 9, "name": "unused"}]
    objects = [
        # image, category, bbox, area, crowd
        (1, 3, [4.25, 6.5, 20.125, 10], 100.5, 0),
        (1, 7, [0, 0, 40, 20], 800, 0),
        (1, 7, [0, 0, 40, 20], 800, 0),  # the same once more
        (2, 3, [10, 5, 0.5, 0.25], 0.125, 0),  # less than a pixel
        (2, 7, [1, 2, 30, 15], 450, 1),
        (3, 7, [39, 19, 1, 1], 1, 0),  # the last pixel
    ]
    files = []
    for split in ("train2017", "val2017"):
        names = ["a.png", "sub/a.png", "image 1.png", "empty.png"]
        for seed, name in enumerate(names):
            write_image(root / split / name, seed)
        content = {
            "images": [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names, 1)],
            "annotations": [
                {"id": n, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd}
                for n, (image, category, bbox, area, crowd) in enumerate(objects, 1)
            ],
            "categories": categories,
        }
        (root / "annotations").mkdir(exist_ok=True)
        files.append(root / "annotations" / f"instances_{split}.json")
        files[-1].write_text(json.dumps(content))
    return files


def read(out: Path, kind: str, split: str) -> AnnotationSet:
    if kind == "coco":
        return coco_data(out, train=split).annotations("train")
    if kind == "voc":
        return voc_data(out, train=[split]).annotations("train")
    return yolo_data(out / "data.yaml", train=split).annotations("train")


def objects_of(annotations: AnnotationSet, row: int) -> list[tuple[str, list[float]]]:
    """Class and box of every object of an image, in order."""
    rows = annotations.objects(row)
    names = [annotations.class_names[label] for label in annotations.labels[rows]]
    return sorted(zip(names, annotations.boxes[rows].tolist(), strict=True))


def assert_same(before: AnnotationSet, after: AnnotationSet, tolerance: float = TOLERANCE) -> None:
    """The same images, as files, and on each the same objects."""
    assert len(before) == len(after)
    row_of_content = {Path(path).read_bytes(): row for row, path in enumerate(after.image_paths.tolist())}
    for row, path in enumerate(before.image_paths.tolist()):
        other = row_of_content[Path(path).read_bytes()]
        assert after.sizes[other].tolist() == before.sizes[row].tolist()
        old, new = objects_of(before, row), objects_of(after, other)
        assert [name for name, _ in old] == [name for name, _ in new]
        for (_, box), (_, moved) in zip(old, new, strict=True):
            assert np.abs(np.subtract(box, moved)).max() <= tolerance


def run_conversion(source: list[Path], kind: str, out: Path, **options: object) -> Losses:
    return convert(find_sources(source), kind, out, **options).losses


def test_coco_to_coco_keeps_every_number(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    assert run_conversion(files, "coco", tmp_path / "out") == {"images get another name": 4}  # sub/a and `image 1`
    for split, file in zip(("train2017", "val2017"), files, strict=True):
        before, after = (
            coco_data(root, train=split).annotations("train") for root in (tmp_path / "in", tmp_path / "out")
        )
        assert_same(before, after, tolerance=0)
        for name in ("boxes", "labels", "areas", "is_crowd", "image_ids", "sizes"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
        assert (before.class_names, before.category_ids) == (after.class_names, after.category_ids)
        assert file.exists()


def test_coco_is_read_by_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_conversion(write_source(tmp_path / "in"), "coco", tmp_path / "out", name_by_split={"train2017": "train"})
    coco = COCO(str(tmp_path / "out/annotations/instances_train.json"))
    results = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in coco.dataset["annotations"]
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)  # what is annotated is found, with pycocotools' own reading of it
    capsys.readouterr()


def test_coco_to_voc_counts_what_is_lost(tmp_path: Path) -> None:
    losses = run_conversion(write_source(tmp_path / "in"), "voc", tmp_path / "out")
    assert losses == {
        "images get another name": 6,  # sub/a and `image 1`, whose 1 would be read as a flag; all four of val2017
        "boxes of at most one pixel are made a little wider": 4,
        "crowds are written as difficult objects": 2,
        "objects lose the area of their outline": 2,
        "classes without objects are lost": 1,
        "classes lose their category ids": 3,
    }
    after = read(tmp_path / "out", "voc", "train2017")
    assert after.class_names == ("cat & dog", "zebra")
    assert after.is_difficult.sum() == 1
    assert_same(read(tmp_path / "in", "coco", "train2017"), after)


def test_coco_to_yolo_counts_what_is_lost(tmp_path: Path) -> None:
    losses = run_conversion(write_source(tmp_path / "in"), "yolo", tmp_path / "out")
    assert losses == {
        "images get another name": 4,
        "objects that stand there twice are written once": 2,
        "crowds are left out": 2,
        "objects lose the area of their outline": 2,
        "classes lose their category ids": 3,
    }
    after = read(tmp_path / "out", "yolo", "train")  # train2017 is called train: data.yaml knows no other word
    assert after.class_names == ("cat & dog", "zebra", "unused")
    assert len(after.boxes) == 4
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["val"] == "images/val"


def test_yolo_text_is_what_a_pencil_says(tmp_path: Path) -> None:
    run_conversion(write_source(tmp_path / "in"), "yolo", tmp_path / "out")
    # [4.25, 6.5, 20.125, 10] of 40 x 20: (4.25 + 10.0625) / 40, (6.5 + 5) / 20, 20.125 / 40, 10 / 20
    assert (tmp_path / "out/labels/train/a.txt").read_text() == "0 0.3578125 0.575 0.503125 0.5\n1 0.5 0.5 1 1\n"


def test_voc_text_is_what_a_pencil_says(tmp_path: Path) -> None:
    run_conversion(write_source(tmp_path / "in"), "voc", tmp_path / "out")
    xml = (tmp_path / "out/Annotations/a.xml").read_text()
    # edges 4.25, 6.5, 24.375, 16.5 as pixels from 1, both ends inside
    assert "<bndbox><xmin>5.25</xmin><ymin>7.5</ymin><xmax>24.375</xmax><ymax>16.5</ymax></bndbox>" in xml
    assert "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>20</ymax></bndbox>" in xml
    assert "<name>cat &amp; dog</name>" in xml


def test_round_trip_through_all_formats(tmp_path: Path) -> None:
    run_conversion(write_source(tmp_path / "in"), "coco", tmp_path / "c", name_by_split={"train2017": "train"})
    without_extremes = tmp_path / "c/annotations/instances_train.json"
    content = json.loads(without_extremes.read_text())
    kept = [entry for entry in content["annotations"] if not entry["iscrowd"] and entry["id"] != 3]
    without_extremes.write_text(json.dumps({**content, "annotations": kept}))
    before = read(tmp_path / "c", "coco", "train")
    run_conversion([tmp_path / "c"], "voc", tmp_path / "v")
    run_conversion([tmp_path / "v"], "yolo", tmp_path / "y")
    run_conversion([tmp_path / "y"], "coco", tmp_path / "c2")
    assert_same(before, read(tmp_path / "v", "voc", "train"))
    assert_same(before, read(tmp_path / "y", "yolo", "train"))
    assert_same(before, read(tmp_path / "c2", "coco", "train"))


@pytest.mark.parametrize("name", ["bccd", "coco128"])
@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")
def test_round_trip_of_real_data_keeps_every_box_and_class(name: str, tmp_path: Path) -> None:
    files = [REAL / name / f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    first = [REAL / name] if name == "bccd" else files
    run_conversion(first, "coco", tmp_path / "c", images="copy")
    run_conversion([tmp_path / "c"], "voc", tmp_path / "v", images="link")
    run_conversion([tmp_path / "v"], "yolo", tmp_path / "y", images="link")
    run_conversion([tmp_path / "y"], "coco", tmp_path / "c2", images="link")
    for split in ("train", "val"):
        before = find_sources(first)[("train", "val").index(split)].read(0.01)
        assert_same(before, read(tmp_path / "c2", "coco", split))


def test_difficult_goes_through_coco_and_back(tmp_path: Path) -> None:
    run_conversion(write_source(tmp_path / "in"), "voc", tmp_path / "v", name_by_split={"train2017": "train"})
    losses = run_conversion([tmp_path / "v"], "coco", tmp_path / "c")
    assert losses == {"difficult flags are in a key `difficult`, which other tools pass over": 1}
    run_conversion([tmp_path / "c"], "voc", tmp_path / "v2")
    before, after = read(tmp_path / "v", "voc", "train"), read(tmp_path / "v2", "voc", "train")
    assert_same(before, after, tolerance=1e-4)
    assert after.is_difficult.tolist() == before.is_difficult.tolist()


def test_outlines_in_the_source_are_mentioned(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    content = json.loads(files[0].read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    files[0].write_text(json.dumps(content))
    losses = run_conversion(files, "yolo", tmp_path / "out")
    assert losses["COCO files with outlines or keypoints: only boxes are kept"] == 1


def test_sizes_that_the_source_does_not_give_are_read_from_the_images(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    for file in files:
        content = json.loads(file.read_text())
        for image in content["images"]:
            del image["width"], image["height"]
        file.write_text(json.dumps(content))
    run_conversion(files, "voc", tmp_path / "v")
    assert read(tmp_path / "v", "voc", "train2017").sizes.tolist() == [[20, 40]] * 4


def test_image_annotated_as_stored_is_left_out_of_yolo(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    exif = Image.Exif()
    exif[0x0112] = 6  # every viewer turns it to 20 x 40, but it is annotated as 40 x 20
    Image.new("RGB", (40, 20)).save(tmp_path / "in/train2017/a.png", exif=exif)
    losses = run_conversion(files, "yolo", tmp_path / "out")
    assert losses["images that are not annotated as they are shown (EXIF) are left out"] == 1
    assert len(read(tmp_path / "out", "yolo", "train")) == 3


# -- all or nothing ----------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_there_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    files = write_source(tmp_path / "in")
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="is there already"):
        run_conversion(files, "yolo", out)
    assert leftovers(tmp_path) == ["in", "out"]


def test_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    run_conversion(files, "yolo", tmp_path / "out")
    run_conversion(files, "yolo", tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/data.yaml").exists()
    assert oct((tmp_path / "a/b/out").stat().st_mode) == oct((tmp_path / "a/b").stat().st_mode)


def test_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_source(tmp_path / "in")
    real = os.link
    calls = []

    def link(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(DataError, match=r"(?s)cannot be linked.*cross-device.*--images copy"):
        run_conversion(files, "coco", tmp_path / "out", images="link")
    assert leftovers(tmp_path) == ["in"]


def test_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_source(tmp_path / "in")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"(?s)GB are needed.*--images link"):
        run_conversion(files, "coco", tmp_path / "out")
    assert leftovers(tmp_path) == ["in"]


def test_links_share_the_bytes_and_copies_do_not(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    for images, expected in (("link", True), ("copy", False)):
        run_conversion(files, "yolo", tmp_path / images, images=images)
        same = (tmp_path / images / "images/train/a.png").samefile(tmp_path / "in/train2017/a.png")
        assert same is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test": "val"}, "there is no test; there are train2017, val2017"),
        ({"train2017": "train", "val2017": "train"}, "called the same: train, train"),
        ({"train2017": "first"}, "must be train, val or test"),
    ],
)
def test_split_names_that_do_not_fit_are_refused(tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_conversion(write_source(tmp_path / "in"), "yolo", tmp_path / "out", name_by_split=given)


def test_split_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        run_conversion(write_source(tmp_path / "in"), "coco", tmp_path / "out", name_by_split={"train2017": "../x"})


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    files = write_source(tmp_path / "in")
    files[1].write_text(files[1].read_text().replace("zebra", "horse"))
    with pytest.raises(AnnotationError, match="different categories"):
        run_conversion(files, "yolo", tmp_path / "out")


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_says_what_it_wrote_and_its_config_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in write_source(tmp_path / "in")]
    for kind, module in (("coco", coco_data), ("voc", voc_data), ("yolo", yolo_data)):
        assert main(["convert", *files, "--to", kind, "--out", str(tmp_path / kind)]) == 0
        text = capsys.readouterr().out
        assert "train2017: 4 images, 6 boxes, 3 classes" in text or kind == "yolo"
        config = yaml.safe_load(text[text.index("data:") :])["data"]
        assert config["class_path"] == f"onestage.data.{module.__name__}"
        data = module(**config["init_args"])
        assert (len(data.annotations("train")), len(data.annotations("val"))) == (4, 4)
    assert "crowds are left out" in text


def test_command_without_a_validation_split_suggests_a_fraction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_source(tmp_path / "in")
    assert main(["convert", str(files[0]), "--to", "yolo", "--out", str(tmp_path / "out")]) == 0
    assert "val_fraction: 0.2" in capsys.readouterr().out


def test_command_reports_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_source(tmp_path / "in")
    files[0].write_text(files[0].read_text().replace("[1, 2, 30, 15]", "[1, 2, -30, 15]"))
    assert main(["convert", *map(str, files), "--to", "yolo", "--out", str(tmp_path / "out")]) == 0
    assert "left out, because it cannot be used (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["in", "--to", "pascal", "--out", "x"], 2, "invalid choice"),
        (["in", "--to", "voc"], 2, "--out"),
        ([], 2, "source"),
        (["gone", "--to", "voc", "--out", "x"], 3, "gone"),
        (["gone", "--to", "voc", "--out", "x", "--max-bad-fraction", "5"], 2, "--max-bad-fraction is 5; it must be in"),
        (["gone", "--to", "voc", "--out", "x", "--max-bad-fraction", "nan"], 2, "--max-bad-fraction is nan"),
    ],
)
def test_command_words_that_cannot_be_used_end_with_their_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *words]) == code
    assert message in capsys.readouterr().err


def test_help_of_the_command_imports_nothing_heavy() -> None:
    program = (
        "import sys, onestage.cli\n"
        "try: onestage.cli.main(['convert', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'lightning', 'cv2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "what a format cannot carry" in done.stdout


def test_conversion_logs_nothing_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run_conversion(write_source(tmp_path / "in"), "yolo", tmp_path / "out")
    assert caplog.text == ""
