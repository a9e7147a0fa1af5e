"""One broken file costs one image: predict and validate use all others, name it, and end with code 3.

So does the doctor: data/test_bad_images.py.
"""

import json
import shutil

from broken_files import BROKEN, encoded, tear_huffman_table, write_broken
from command_line import run


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


def test_validate_evaluates_the_others_and_names_the_damaged_image(trained, drawn, tmp_path, capsys):
    data = shutil.copytree(drawn, tmp_path / "data")
    tear_huffman_table(data / "JPEGImages" / "000035.jpg")  # of the seven for validation
    checkpoint = ["--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--trainer.accelerator=cpu"]
    options = ["--data.path", str(data), "--data.source", "null", "--runs_dir", str(tmp_path / "runs")]
    assert run("validate", *checkpoint, *options) == 3
    output = capsys.readouterr()
    assert "1 of 7 images cannot be read" in output.err
    assert "000035.jpg" in output.err
    assert "results: " in output.out
    (results,) = tmp_path.glob("runs/*/*/results.json")
    assert json.loads(results.read_text())["metrics"]["AR100"] is not None
