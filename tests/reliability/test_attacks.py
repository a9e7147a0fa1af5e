"""Checkpoints that would cost gigabytes, minutes or a traceback are refused for less than 1 GB of memory."""

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import DETECTOR, changed, contents, write
from peak_memory import peak_bytes
from safetensors.torch import save_file

from onestage.errors import CheckpointError
from onestage.reliability.stored_config import config_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:Sparse", "ignore:Typed", "ignore:Validating")
GIGABYTE = 10**9


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the memory cannot be measured here")


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"class_path": "onestage.losses.SigmoidFocalLoss"}
    for _ in range(levels):
        value = {"class_path": "onestage.losses.SigmoidFocalLoss", "init_args": {"class_weights": value}}
    return value


TEXT = "x" * 400_000


def detector_of(name: str, **settings: Any) -> tuple[str, Any]:
    return "onestage.config.model.detector", {"class_path": f"onestage.models.{name}", "init_args": settings}


def darknet_of(**settings: Any) -> dict[str, Any]:
    return {"class_path": "onestage.models.Darknet53", "init_args": settings}


STORED: dict[str, tuple[str, Any]] = {
    "one long text a hundred thousand times": ("onestage.config.model.more", [TEXT] * 100_000),
    "one long key a hundred thousand times": ("more", [{TEXT: 0} for _ in range(50_000)]),
    "a number that Python does not print": ("onestage.schema", 10**5000),
    "such a number in the configuration": (f"{DETECTOR}.score_threshold", 10**5000),
    "deep nesting": (f"{DETECTOR}.classification_loss", nested(80)),
    "deep nesting where no type is expected": ("onestage.config.trainer", nested(80)),
    "25,000 classes for a few weights": ("onestage.class_names", [str(number) for number in range(25_000)]),
    "400,000 classes": ("onestage.class_names", [str(number) for number in range(400_000)]),
    "layers without end": detector_of("RetinaNet", tower_convs=900_000),
    "channels without end": detector_of("YOLOv3", backbone=darknet_of(width=100_000)),
    "stages of a million blocks": detector_of("YOLOv3", backbone=darknet_of(depths=[1_000_000] * 5)),
    "a hundred thousand layers": detector_of("SSD", extra_layers=[[8, 8]] * 100_000),
    "images without end": ("onestage.config.data.batch_size", 2**40),
    "a quantized tensor": ("state_dict.a", lambda: torch.quantize_per_tensor(torch.ones(8), 1.0, 0, torch.qint8)),
    "a sparse tensor of 4 TB": ("state_dict.a", lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))),
}  # fmt: skip


def header_of_2_gb(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30))
        file.truncate((2 << 30) + 8)  # sparse


def many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"archive/data/{number}", b"")


def opcodes(path: Path) -> None:
    """Write a pickle of 900,000 nested tuples beside no tensor."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02)" + b"\x85" * 900_000 + b".")
        archive.writestr("archive/version", b"3\n")


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pipe": ("a.ckpt", os.mkfifo),
    "device": ("a.ckpt", lambda path: path.symlink_to("/dev/zero")),
    "link to itself": ("a.ckpt", lambda path: path.symlink_to(path.name)),
    "pickle": ("a.ckpt", lambda path: path.write_bytes(pickle.dumps(contents()))),
    "archive of many members": ("a.ckpt", many_members),
    "archive of one deep pickle": ("a.ckpt", opcodes),
    "safetensors with a header of 2 GB": ("a.safetensors", header_of_2_gb),
    "safetensors that is a pipe": ("a.safetensors", os.mkfifo),
    "safetensors that is a device": ("a.safetensors", lambda path: path.symlink_to("/dev/zero")),
}
DESCRIPTIONS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "deep nesting": lambda path: path.write_text("[" * 100_000),
    "long number": lambda path: path.write_text('{"schema": ' + "9" * 1_000_000 + "}"),
    "million lists": lambda path: path.write_text(f"[{'[],' * 2_000_000}[]]"),
    "deep configuration": lambda path: path.write_text(
        json.dumps(changed(f"{DETECTOR}.classification_loss", nested(80))["onestage"])
    ),
}


def refuse(path: Path) -> None:
    """Check that a checkpoint is refused, and the memory of that; print its costs."""
    forget_peak()
    before, start = peak_bytes(), time.process_time()
    with pytest.raises(CheckpointError) as stopped:
        config_of(path)
    used = peak_bytes() - before
    message = str(stopped.value)
    print(f"{used / 1e6:.0f} MB, {time.process_time() - start:.1f} s of CPU: {message[:200]}")
    assert used < GIGABYTE
    assert len(message) < 3000


SLOW = {"archive of one deep pickle", "archive of many members", "million lists"}


def attacks(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in table]


@pytest.mark.parametrize("attack", attacks(STORED))
def test_value_in_a_checkpoint_is_refused_cheaply(attack, tmp_path):
    place, value = STORED[attack]
    saved = changed(place, value() if callable(value) else value)
    if place == "onestage.class_names":
        saved["onestage"]["category_ids"] = list(range(len(value)))
        saved["onestage"]["image_size"] = saved["onestage"]["config"]["data"]["image_size"] = 300
        saved["onestage"]["config"]["model"]["detector"]["class_path"] = "onestage.models.SSD300"  # would need 14 GB
    refuse(write(tmp_path / "a.ckpt", saved))


@pytest.mark.parametrize("attack", attacks(FILES))
def test_file_that_is_no_checkpoint_is_refused_cheaply(attack, tmp_path):
    name, make = FILES[attack]
    make(tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps(contents()["onestage"]))
    refuse(tmp_path / name)


@pytest.mark.parametrize("attack", attacks(DESCRIPTIONS))
def test_description_of_weights_is_refused_cheaply(attack, tmp_path):
    save_file({"detector.a": torch.ones(3)}, tmp_path / "a.safetensors")
    DESCRIPTIONS[attack](tmp_path / "a.json")
    refuse(tmp_path / "a.safetensors")
