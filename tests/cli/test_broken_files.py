"""One broken file costs one image: predict, validate and doctor use all others, name it, and end with code 3."""

import json
from pathlib import Path

import pytest
from broken_files import BROKEN, encoded, write_broken
from command_line import run

from onestage.files import printable


def test_predict_writes_all_good_images_and_names_all_broken_ones(trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    for name in ("cam1/0001.jpg", "cam2/0001.jpg", "cam2/one.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(encoded("PNG" if name.endswith("png") else "JPEG"))
    for name in BROKEN:
        write_broken(photos / name)
    checkpoint = ["--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--data.batch_size", "4"]
    options = ["--data.predict_dir", str(photos), "--runs_dir", str(tmp_path / "runs"), "--trainer.accelerator=cpu"]
    assert run("predict", *checkpoint, *options) == 3
    message = capsys.readouterr().err
    assert f"error: {photos}: {len(BROKEN)} of {len(BROKEN) + 3} images cannot be read" in message
    assert "Traceback" not in message
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert len(list((folder / "predictions").glob("*.jpg"))) == 3
    images = {entry["file_name"]: entry for entry in json.loads((folder / "images.json").read_text())}
    records = json.loads((folder / "predictions.json").read_text())
    good = {"cam1/0001.jpg", "cam2/0001.jpg", "cam2/one.png"}
    assert {name for name, entry in images.items() if "detections" in entry} == good
    regular = {name for name in BROKEN if (photos / name).is_file()}
    assert {name for name, entry in images.items() if "error" in entry} == regular
    for name in good:
        found = [record for record in records if record["file_name"] == name]
        assert len(found) == images[name]["detections"]
        assert {record["image_id"] for record in found} <= {images[name]["id"]}


@pytest.fixture
def coco_set(tmp_path: Path) -> Path:
    """Return a COCO file with ten good images and one that only decoding shows to be damaged."""
    names = [f"{number:02d}.jpg" for number in range(10)] + ["checksum.png"]
    (tmp_path / "val").mkdir()
    for name in names[:-1]:
        (tmp_path / "val" / name).write_bytes(encoded("JPEG"))
    write_broken(tmp_path / "val" / "checksum.png")
    shapes = ("circle", "cross", "ring", "square", "star", "triangle")
    content = {
        "images": [{"id": n + 1, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(names)],
        "annotations": [
            {"id": n + 1, "image_id": n + 1, "category_id": 1, "bbox": [4, 4, 30, 30]} for n in range(len(names))
        ],
        "categories": [{"id": n + 1, "name": name} for n, name in enumerate(shapes)],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_validate_evaluates_the_others_and_names_the_damaged_image(trained, coco_set, capsys):
    checkpoint = ["--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--trainer.accelerator=cpu"]
    options = ["--data.path", str(coco_set), "--data.source", "null", "--runs_dir", str(coco_set / "runs")]
    assert run("validate", *checkpoint, *options) == 3
    output = capsys.readouterr()
    assert "1 of 11 images cannot be read" in output.err
    assert "checksum.png" in output.err
    assert "results: " in output.out
    (results,) = coco_set.glob("runs/*/*/results.json")
    assert json.loads(results.read_text())["metrics"]["AR100"] is not None


def test_doctor_names_every_broken_file(coco_set, capsys):
    file = coco_set / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    names = [name for name in BROKEN if name.isprintable() and write_broken(coco_set / "val" / name).is_file()]
    for number, name in enumerate(names, start=100):
        content["images"].append({"id": number, "file_name": name, "width": 64, "height": 48})
    file.write_text(json.dumps(content))
    assert run("doctor", str(file), "--decode", "--max_bad_fraction", "1", "--json") == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    named = " ".join(f"{finding['place']} {finding['problem']}" for finding in findings)
    assert [name for name in names if printable(coco_set / "val" / name) not in named] == []
