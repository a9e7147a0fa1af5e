"""Every file a command reads, missing, empty, torn or of the wrong kind: one message, exit code 2 or 3."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import REPOSITORY, run


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must refuse; return what it says."""
    capsys.readouterr()
    code = run(*words)
    text = capsys.readouterr().err
    assert code in (2, 3), text
    assert "Traceback" not in text
    return text[text.index("error: ") :]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "Did you mean: onestage fit"),
        (["fit"], "nothing says which model.detector and data to use"),
        (["fit", "--config"], "config"),
        (["fit", "--trainer.max_epoch", "1"], "did you mean trainer.max_epochs"),
        (["fit", "--trainer.precision", "bf17"], "trainer.precision"),
        (["fit", "--config", "nowhere.yaml"], "does not exist"),
        (["validate", "--ckpt_path", "nowhere.ckpt"], "does not exist"),
        (["predict", "--ckpt_path", "configs"], "is a folder"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    text = complaint(capsys, *words)
    assert expected in text
    assert len(text.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.batch_size", "0"], "batch_size"),
        (["--model.optimizer.lr", "-1"], "model.optimizer cannot be built: Invalid learning rate"),
        (["--drawn_score", "2"], "drawn_score"),
        (["--drawn_images", "-1"], "drawn_images"),
        (["--data.num_workers", "-1"], "num_workers"),
        (["--model.detector.score_threshold", "2"], "score_threshold"),
        (["--model.schedule.warmup_start", "0"], "warmup_start"),
        (["--data.image_size", "300"], "data.image_size is 300"),
        (["--model.detector.prio", "0.1"], "did you mean prior"),
        (["--data.train_transforms", '[{"class_path": "onestage.data.SSDZoomOut", "init_args": {"rato": 3}}]'], "rato"),
    ],
)
def test_a_value_that_cannot_be(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, options: list[str], expected: str
) -> None:
    assert expected in complaint(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path))


def damage_checkpoint(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "last byte missing":
        path.write_bytes(content[:-1])
    elif how == "html":
        path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    elif how == "flipped byte":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "lfs pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    elif how == "state dict alone":
        torch.save({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("empty", "is empty (0 bytes)"),
        ("truncated", "is truncated or damaged"),
        ("last byte missing", "is truncated or damaged"),
        ("html", "is not a torch checkpoint"),
        ("flipped byte", "damaged"),
        ("lfs pointer", "git lfs pull"),
        ("state dict alone", "was not written by `onestage fit`"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_damaged_checkpoint(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, how: str, expected: str, command: str
) -> None:
    checkpoint = tmp_path / "torn.ckpt"
    shutil.copy(trained / "checkpoints" / "best.ckpt", checkpoint)
    damage_checkpoint(checkpoint, how)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path)]
    text = complaint(capsys, command, "--ckpt_path", str(checkpoint), *options)
    assert expected in text
    assert str(checkpoint) in text


def test_a_checkpoint_of_other_classes_names_both_numbers(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    options = ["--config", str(trained / "config.yaml"), "--data.class_names=[a,b]", "--data.category_ids=[1,2]"]
    options += ["--data.predict_dir", str(trained / "predictions"), "--runs_dir", str(tmp_path)]
    checkpoint = str(trained / "checkpoints" / "best.ckpt")
    text = complaint(capsys, "predict", "--ckpt_path", checkpoint, *options)
    assert "classes, the data has 2" in text


def test_classes_in_another_order_are_refused(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "checkpoints" / "best.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["onestage"]
    names = ",".join(reversed(saved["class_names"]))
    options = ["--config", str(trained / "config.yaml"), f"--data.class_names=[{names}]", "--runs_dir", str(tmp_path)]
    options += ["--data.predict_dir", str(trained / "predictions"), f"--data.category_ids={saved['category_ids']}"]
    assert "in the same order" in complaint(capsys, "predict", "--ckpt_path", str(checkpoint), *options)


def test_a_checkpoint_of_another_detector_cannot_be_resumed(
    capsys: pytest.CaptureFixture[str], trained: Path, fast_options: list[str], tmp_path: Path
) -> None:
    options = ["--model.detector.class_path", "onestage.models.SSD300", "--data.image_size", "300"]
    options += ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--runs_dir", str(tmp_path)]
    text = complaint(capsys, "fit", *fast_options, *options)
    assert "holds detector SSD160, the configuration detector SSD300" in text


def test_evaluating_random_weights_is_refused(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    assert "nothing says which weights" in complaint(capsys, "validate", *fast_options, "--runs_dir", str(tmp_path))


def test_a_training_split_without_objects_is_refused(
    capsys: pytest.CaptureFixture[str], drawn: Path, tmp_path: Path
) -> None:
    content = json.loads((drawn / "annotations" / "instances_train.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    options = [
        "--data.source", "onestage.data.COCO", "--data.source.path", str(drawn), "--data.image_size", "160",
        "--data.train_annotations", str(tmp_path / "empty.json"), "--data.train_images", "JPEGImages",
        "--model.detector.class_path", "onestage.models.SSD160", "--runs_dir", str(tmp_path),
    ]  # fmt: skip
    assert "has an object to learn from" in complaint(capsys, "fit", *options)


def test_a_checkpoint_that_names_foreign_code_is_refused_and_nothing_is_run(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["onestage"]["config"]["model"]["detector"] = {
        "class_path": "pathlib.Path.write_text",
        "init_args": {"self": str(canary), "data": "run"},
    }
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    text = complaint(capsys, "validate", "--ckpt_path", str(tmp_path / "foreign.ckpt"))
    assert "pathlib.Path.write_text" in text
    assert not canary.exists()
    # With a configuration of the user's own the weights can still be used, and the stored one is not looked at.
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs")]
    assert run("validate", "--ckpt_path", str(tmp_path / "foreign.ckpt"), *options) == 0
    assert not canary.exists()


@pytest.mark.parametrize("where", ["optimizer", "detector", "transform"])
def test_a_bare_name_of_foreign_code_is_refused_too(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, where: str
) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    config = checkpoint["onestage"]["config"]
    if where == "transform":
        config["data"]["init_args"]["train_transforms"] = ["shutil.rmtree"]
    else:
        config["model"][where] = "shutil.rmtree"
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    assert "shutil.rmtree" in complaint(capsys, "validate", "--ckpt_path", str(tmp_path / "foreign.ckpt"))


@pytest.mark.parametrize("what", ["missing", "empty", "truncated", "html", "list"])
def test_a_damaged_annotation_file(
    capsys: pytest.CaptureFixture[str], drawn: Path, fast_options: list[str], tmp_path: Path, what: str
) -> None:
    file = tmp_path / "instances.json"
    content = (drawn / "annotations" / "instances_train.json").read_bytes()
    damaged = {"empty": b"", "truncated": content[: len(content) // 2], "html": b"<html>", "list": b"[]"}
    if what in damaged:
        file.write_bytes(damaged[what])
    options = [
        "--data.source", "onestage.data.COCO", "--data.source.path", str(drawn),
        "--data.train_annotations", str(file), "--data.train_images", str(drawn / "JPEGImages"),
        "--data.image_size", "160",
        "--model.detector.class_path", "onestage.models.SSD160",
        "--runs_dir", str(tmp_path), "--trainer.accelerator=cpu",
    ]  # fmt: skip
    text = complaint(capsys, "fit", *options)
    assert str(file) in text


@pytest.mark.parametrize("what", ["missing list", "empty list", "torn xml", "no such root"])
def test_a_damaged_voc_folder(capsys: pytest.CaptureFixture[str], drawn: Path, tmp_path: Path, what: str) -> None:
    root = tmp_path / "voc"
    shutil.copytree(drawn, root)
    if what == "missing list":
        (root / "ImageSets" / "Main" / "train.txt").unlink()
    elif what == "empty list":
        (root / "ImageSets" / "Main" / "train.txt").write_text("\n")
    elif what == "torn xml":
        for xml in (root / "Annotations").iterdir():
            xml.write_bytes(xml.read_bytes()[:100])
    elif what == "no such root":
        root = tmp_path / "nowhere"
    options = [
        "--data.source", "onestage.data.VOC", "--data.source.path", str(root), "--data.image_size", "160",
        "--data.source.train=[train]", "--data.source.val=[val]",
        "--model.detector.class_path", "onestage.models.SSD160",
        "--runs_dir", str(tmp_path), "--trainer.accelerator=cpu",
    ]  # fmt: skip
    text = complaint(capsys, "fit", *options)
    assert str(root) in text


def train_on(capfd: pytest.CaptureFixture[str], root: Path, tmp_path: Path, *options: str) -> str:
    """Train on a folder in VOC format, which must end with the code of a data error; return what workers say too."""
    capfd.readouterr()
    words = [
        "fit", "--config", str(REPOSITORY / "configs" / "shapes_ssd.yaml"), "--data.source",
        "onestage.data.VOC", "--data.source.path", str(root), "--data.source.train=[train]",
        "--data.source.val=[val]", "--data.batch_size", "8", "--runs_dir", str(tmp_path / "runs"),
        "--trainer.max_epochs", "1", "--trainer.accelerator=cpu", *options,
    ]  # fmt: skip
    code = run(*words)
    text = capfd.readouterr().err
    assert code == 3, text[-2000:]
    assert "Traceback" not in text
    return text


def first_image(drawn: Path, tmp_path: Path) -> Path:
    """The first training image of a copy of the drawn set, whose folder is the parent of the image's."""
    root = tmp_path / "set"
    shutil.copytree(drawn, root)
    listed = json.loads((root / "annotations" / "instances_train.json").read_text())["images"]
    return root / "JPEGImages" / listed[0]["file_name"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_with_damaged_pixels_is_named_whoever_reads_it(
    capfd: pytest.CaptureFixture[str], drawn: Path, tmp_path: Path, num_workers: int
) -> None:
    torn = first_image(drawn, tmp_path)
    content = torn.read_bytes()
    table = content.index(b"\xff\xc4") + 5  # the Huffman table's counts, which no header shows to be wrong
    torn.write_bytes(content[:table] + b"\xff" * 16 + content[table + 16 :])
    assert torn.name in train_on(capfd, torn.parents[1], tmp_path, "--data.num_workers", str(num_workers))


def test_an_image_that_is_cut_off_is_named_before_the_training_starts(
    capfd: pytest.CaptureFixture[str], drawn: Path, tmp_path: Path
) -> None:
    torn = first_image(drawn, tmp_path)
    torn.write_bytes(torn.read_bytes()[:200])
    text = train_on(capfd, torn.parents[1], tmp_path, "--data.num_workers", "0", "--data.max_bad_fraction", "0")
    assert "1 of 32 images cannot be used" in text
    assert torn.name in text
