"""Find the run and the checkpoint to resume from; notice changed data."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_files
import pytest
import yaml

from onestage.data.coco import parse_coco
from onestage.data.shapes import draw_shapes
from onestage.errors import CheckpointError, ConfigError
from onestage.reliability import resume
from onestage.reliability.resume import find_checkpoint, fingerprints, newest_checkpoint
from onestage.types import AnnotationSet

CONFIG: dict[str, Any] = {
    "seed_everything": 42, "experiment": "shapes", "auto_batch": False,
    "model": {"optimizer": {"init_args": {"lr": 0.1}}, "channels_last": True},
    "data": {"source": {"init_args": {"path": "data/x", "train_annotations": "/here/a.json"}}, "batch_size": 4,
             "num_workers": 2},
    "trainer": {"max_epochs": 2, "max_steps": -1, "precision": "32-true", "check_val_every_n_epoch": 2, "devices": 1},
}  # fmt: skip


def config_with(runs: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return CONFIG with other values at dotted keys."""
    config = copy.deepcopy({**CONFIG, "runs_dir": str(runs)})
    for key, value in changes.items():
        checkpoint_files.changed(key, value, config)
    return config


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes" / "version_3"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_with(tmp_path, {})))
    checkpoint_files.write(folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, None),
        ({"data.num_workers": 8, "trainer.devices": 4}, None),
        ({"data.source.init_args.path": "/moved", "data.source.init_args.train_annotations": "/there/a.json"}, None),
        ({"auto_batch": True, "data.batch_size": 99}, None),
        ({"model.channels_last": "auto"}, None),
        ({"trainer.max_epochs": 5, "trainer.check_val_every_n_epoch": 3}, None),
        ({"trainer.max_epochs": 1}, "trainer.max_epochs 2, now 1"),
        ({"init_from": "other.ckpt"}, "init_from None, now 'other.ckpt'"),
        ({"trainer.sync_batchnorm": True}, "trainer.sync_batchnorm None, now True"),
        ({"model.optimizer.init_args.lr": 0.2}, "model.optimizer.init_args.lr 0.1, now 0.2"),
        ({"data.source.init_args.train_annotations": "/here/b.json"}, "train_annotations 'a.json', now 'b.json'"),
    ],
)
def test_auto_continues_a_run_with_the_same_decisive_settings(run_folder, caplog, changes, difference):
    caplog.set_level("INFO")
    found = find_checkpoint("auto", None, config_with(run_folder.parents[1], changes))
    if difference is None:
        assert found is not None
        assert found[:3] == (run_folder / "checkpoints" / "last.ckpt", run_folder, 5)
        is_longer = "trainer.max_epochs" in changes
        assert ("trainer.max_epochs 2 -> 5; model.schedule spans the new length" in caplog.text) is is_longer
    else:
        assert found is None
        assert f"not {run_folder}, because " in caplog.text
        assert difference in caplog.text


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_auto_settings_are_those_that_the_resumed_run_decided(run_folder, resume):
    file = run_folder / "checkpoints" / "last.ckpt"
    saved = checkpoint_files.changed("onestage.config.model.channels_last", True)
    saved["onestage"]["config"]["data"]["batch_size"] = 24
    checkpoint_files.write(file, saved)
    config = config_with(run_folder.parents[1], {"model.channels_last": "auto", "auto_batch": True})
    found = find_checkpoint("auto" if resume == "auto" else str(file), None, config)
    assert found is not None
    model, data = SimpleNamespace(channels_last="auto"), SimpleNamespace(batch_size=1)
    settings = SimpleNamespace(model=model, data=data, auto_batch=True)
    found.adopt(settings)
    is_same_run = resume == "auto"  # a new run that starts from a checkpoint finds its own batch size
    assert (settings.model.channels_last, settings.data.batch_size) == (True, 24 if is_same_run else 1)
    assert settings.auto_batch is not is_same_run
    settings.model.channels_last = False
    found.adopt(settings)
    assert settings.model.channels_last is False  # not `auto`


# A few hundred bytes of aliases that stand for 10^10 values.
LAUGHS = "\n".join(
    ["model:", "  l0: &l0 {a: 1}"]
    + [f"  l{n}: &l{n} {{{', '.join(f'{k}: *l{n - 1}' for k in 'abcdefghij')}}}" for n in range(1, 11)]
)


@pytest.mark.parametrize("content", ["[", "5", "[" * 500, "\0", "trainer: 5", LAUGHS, "a" * 300_000, None])
def test_unreadable_configuration_of_a_run_is_passed_over(run_folder, content):
    file = run_folder / "config.yaml"
    file.unlink()
    if content is None:
        os.mkfifo(file)
    else:
        file.write_text(content)
    assert find_checkpoint("auto", None, config_with(run_folder.parents[1], {})) is None


def test_path_of_a_run_folder_starts_a_new_run_from_its_newest_checkpoint(run_folder):
    with pytest.raises(ConfigError, match=r"--resume auto and --ckpt_path x\.ckpt conflict; pass only one"):
        find_checkpoint("auto", "x.ckpt", CONFIG)

    newest = run_folder / "checkpoints" / "last.ckpt"
    for resumed, ckpt_path in ((str(run_folder), None), ("none", str(newest)), (str(newest), None)):
        assert find_checkpoint(resumed, ckpt_path, CONFIG)[:3] == (newest, None, 5)


def test_stored_step_decides_and_not_the_time_of_the_file(tmp_path):
    for name, stored, when in (("best.ckpt", 40, 1_000), ("last.ckpt", 50, 500), ("previous.ckpt", 45, 2_000)):
        path = checkpoint_files.write(tmp_path / name, checkpoint_files.changed("global_step", stored))
        os.utime(path, (when, when))
    assert newest_checkpoint(tmp_path)[:3] == (tmp_path / "last.ckpt", None, 50)
    checkpoint_files.write(tmp_path / "best.ckpt", checkpoint_files.changed("global_step", 50))
    assert newest_checkpoint(tmp_path)[:3] == (tmp_path / "last.ckpt", None, 50)  # written after best


def test_damaged_checkpoints_are_passed_over_and_if_all_are_it_is_an_error(run_folder):
    folder = run_folder / "checkpoints"
    checkpoint_files.write(folder / "previous.ckpt", checkpoint_files.changed("global_step", 4))
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:-1])
    assert newest_checkpoint(folder)[:3] == (folder / "previous.ckpt", None, 4)
    (folder / "previous.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is truncated or damaged(.|\n)*--resume none"):
        newest_checkpoint(folder)


def test_checkpoints_with_weights_alone_are_ignored(tmp_path):
    checkpoint_files.write(tmp_path / "mine.ckpt", checkpoint_files.changed("optimizer_states", ...))
    assert newest_checkpoint(tmp_path) is None


def read(folder: Path) -> AnnotationSet:
    return parse_coco(folder / "annotations" / "instances_train.json", folder / "JPEGImages")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_shapes(tmp_path / "one", num_train=5, num_val=1, seed=0)
    return tmp_path / "one"


def image(folder: Path, row: int = 2) -> Path:
    return Path(str(read(folder).image_paths[row]))


def flip_a_bit(path: Path) -> None:
    """In the middle; size and time of change stay."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(folder: Path) -> None:
    one, other = image(folder, 0), image(folder, 1)
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)


def test_copy_elsewhere_with_another_time_is_the_same_data(folder):
    copy = shutil.copytree(folder, folder.parent / "two")
    os.utime(image(copy), (0, 0))
    assert fingerprints(read(copy)) == fingerprints(read(folder))


@pytest.mark.parametrize("change", [lambda root: flip_a_bit(image(root)), swap, lambda root: image(root).unlink()])
def test_changed_swapped_or_missing_image_changes_the_image_fingerprint_alone(folder, change):
    annotations = read(folder)
    before = fingerprints(annotations)
    change(folder)
    after = fingerprints(replace(annotations))
    assert after["image_fingerprint"] != before["image_fingerprint"]
    assert after["data_fingerprint"] == before["data_fingerprint"]


def test_changed_box_or_label_changes_the_data_fingerprint_alone(folder):
    annotations = read(folder)
    before = fingerprints(annotations)
    boxes = annotations.boxes.copy()
    boxes[0, 2] += 0.5
    for changed in (replace(annotations, boxes=boxes), replace(annotations, labels=(annotations.labels + 1) % 6)):
        after = fingerprints(changed)
        assert after["data_fingerprint"] != before["data_fingerprint"]
        assert after["image_fingerprint"] == before["image_fingerprint"]


def test_fifo_in_place_of_an_image_does_not_block(folder):
    annotations = read(folder)
    image(folder).unlink()
    os.mkfifo(str(annotations.image_paths[2]))
    assert fingerprints(annotations)["image_fingerprint"].startswith("bytes:")


def test_only_sizes_of_a_large_set_are_compared(folder, monkeypatch):
    total = sum(Path(path).stat().st_size for path in read(folder).image_paths.tolist())
    monkeypatch.setattr(resume, "READ_BYTES", total)
    assert fingerprints(read(folder))["image_fingerprint"].startswith("bytes:")
    monkeypatch.setattr(resume, "READ_BYTES", total - 1)
    before = fingerprints(read(folder))["image_fingerprint"]
    assert before.startswith("sizes:")
    flip_a_bit(image(folder))
    assert fingerprints(read(folder))["image_fingerprint"] == before  # docs/reliability.md says so
    with image(folder).open("ab") as file:
        file.write(b"\0")
    assert fingerprints(read(folder))["image_fingerprint"] != before
