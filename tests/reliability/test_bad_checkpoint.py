"""Checkpoints that are damaged, foreign or hostile: named, refused, and never run."""

import copy
import errno
import inspect
import json
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

import onestage.data
from onestage.errors import CheckpointError
from onestage.reliability import checkpoint_files
from onestage.reliability.checkpoint_files import config_of, needs_config, read_checkpoint, stored_step
from onestage.reliability.resume import newest_checkpoint


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", path)
    return path


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a payload would touch; payloads are run in this folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as stopped:
        read_checkpoint(path)
    assert str(path) in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: b"", "is empty (0 bytes)"),
        (lambda content: content[: len(content) // 2], "is truncated or damaged"),
        (lambda content: content[:-1], "is truncated or damaged"),
        (lambda content: content[:3], "is truncated or damaged"),
        (lambda content: b"<!DOCTYPE html><title>404</title>", "is not a torch checkpoint"),
        (lambda content: bytes(len(content)), "is not a torch checkpoint"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (lambda content: pickle.dumps({"state_dict": {}}), "is not a torch checkpoint"),
    ],
)
def test_row_67_a_file_that_is_no_whole_checkpoint_says_what_it_is(
    checkpoint: Path, damage: Callable[[bytes], bytes], named: str
) -> None:
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert named in refused(checkpoint)


@pytest.mark.parametrize("command", ["validate", "fit", "export"])
@pytest.mark.parametrize("call", ["is_file", "open"])
def test_row_67_a_file_that_may_not_be_read_is_no_full_disk(
    checkpoint: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
    command: str,
) -> None:
    """As for who may not enter the folder, or not read the file. root may everything, so the call refuses."""
    allowed = getattr(Path, call)

    def refuse(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == checkpoint:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return allowed(self, *arguments, **named)

    monkeypatch.setattr(Path, call, refuse)
    options = {"fit": ["--config", str(trained / "config.yaml"), "--runs_dir", str(checkpoint.parent / "runs")]}
    assert run(command, "--ckpt_path", str(checkpoint), *options.get(command, [])) == 2
    message = capsys.readouterr().err
    assert f"checkpoint {checkpoint} cannot be read: Permission denied" in message


@pytest.mark.parametrize("command", ["validate", "losses", "export"])
def test_row_67_a_name_too_long_for_a_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(command, "--ckpt_path", f"{tmp_path}/{'x' * 5000}.ckpt") == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "checkpoints", "version_0/checkpoints"])
def test_row_67_a_folder_in_place_of_a_file_names_the_checkpoints_in_it(checkpoint: Path, inside: str) -> None:
    folder = checkpoint.parent / "folder"
    (folder / inside).mkdir(parents=True)
    moved = checkpoint.rename(folder / inside / "last.ckpt")
    assert f"{folder} is a folder.\nOther checkpoints there: {moved}" in refused(folder)


def test_row_67_a_pipe_in_place_of_a_file_is_not_waited_for(checkpoint: Path) -> None:
    pipe = checkpoint.with_name("pipe.ckpt")
    os.mkfifo(pipe)
    assert newest_checkpoint(checkpoint.parent)[0] == checkpoint


def test_row_68_one_flipped_bit_of_a_weight_is_found(checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    largest = max(weights.values(), key=lambda value: value.numel())
    place = bytes(content).index(bytes(largest.untyped_storage()[:256]))
    content[place] ^= 1
    checkpoint.write_bytes(content)
    torch.load(checkpoint, weights_only=True)  # torch itself sees nothing
    assert "the checksum of" in refused(checkpoint)


def test_row_68_one_flipped_bit_of_an_archives_directory_is_damage_whichever_it_is(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {}, "global_step": 0, "onestage": {"schema": 99}}, whole)
    with zipfile.ZipFile(whole) as archive:
        begin, member = archive.start_dir, archive.infolist()[0].header_offset
    content = whole.read_bytes()
    for place in (*range(member, member + 40), *range(begin, begin + 80), *range(len(content) - 40, len(content))):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            whole.write_bytes(damaged)
            refused(whole)  # for the damage, or for the schema where the bit means nothing


def test_row_68_an_archive_that_says_it_is_encrypted_is_passed_over_by_resume_auto(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / "previous.ckpt")
    with zipfile.ZipFile(checkpoint) as archive:
        flags = archive.start_dir + 8
    content = bytearray(checkpoint.read_bytes())
    content[flags] ^= 1
    checkpoint.rename(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes(content)
    assert "is truncated or damaged" in refused(tmp_path / "last.ckpt")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "previous.ckpt"


class Payload:
    """What a pickle can make its reader do."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, ("touch canary",)


def test_row_69_a_pickle_that_runs_a_command_is_refused_and_not_run(checkpoint: Path, canary: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "hyper_parameters": Payload()}, checkpoint)
    assert "nothing in it was run" in refused(checkpoint)
    assert not canary.exists()
    os.system("touch canary")  # the payload is one
    assert canary.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_row_69_an_old_pickle_without_an_archive_is_not_even_opened(
    tmp_path: Path, canary: Path, protocol: int
) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    assert "is not a torch checkpoint" in refused(path)
    assert not canary.exists()


HOSTILE = {
    "_instantiator": {"_instantiator": "evil.make", "lr": 1.0},
    "_class_path": {"_class_path": "evil.Model", "init_args": {}},
    "callable": {"act": "os.system"},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_row_69_hyper_parameters_of_a_checkpoint_are_never_looked_at(
    checkpoint: Path, trained: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
) -> None:
    """An importable module that touches the canary: neither named in Lightning's key nor in ours is it imported."""
    (canary.parent / "evil.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(canary.parent))
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "hyper_parameters": HOSTILE[kind], "datamodule_hyper_parameters": HOSTILE[kind]}, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(canary.parent / "runs")]
    assert run(command, "--ckpt_path", str(checkpoint), *options) == 0
    assert not canary.exists()


@pytest.mark.parametrize("name", ["evil.Model", "os.system", "torch.hub.load", "builtins.exec", "onestage_evil.Model"])
def test_row_69_a_configuration_inside_a_checkpoint_names_trusted_classes_only(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("evil", "onestage_evil"):
        (canary.parent / f"{module}.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(canary.parent))
    saved = torch.load(checkpoint, weights_only=True)
    saved["onestage"]["config"]["model"]["detector"]["class_path"] = name
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match="If you trust the file"):
        config_of(checkpoint)
    assert run("validate", "--ckpt_path", str(checkpoint)) == 2
    assert not canary.exists()


def canary_module(canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `evil` importable, which touches the canary when it is."""
    (canary.parent / "evil.py").write_text("open('canary', 'w').close()\n")
    (canary.parent / "evil.yaml").write_text("class_path: evil.Model\n")
    (canary.parent / "evil").write_text("class_path: evil.Model\n")
    monkeypatch.syspath_prepend(str(canary.parent))
    sys.modules.pop("evil", None)


def put(saved: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    node = saved["onestage"]
    for name in parents:
        node = node[name]
    node[last] = value


DETECTOR, DATA = "config.model.detector.init_args", "config.data.init_args"
CLASS_PLACES = [
    "config.model.detector",
    f"{DETECTOR}.classification_loss",
    f"{DETECTOR}.box_loss",
    f"{DETECTOR}.anchors",
    "config.model.optimizer",
    "config.model.schedule",
    "config.data",
    f"{DATA}.train_transforms",
    f"{DATA}.sampling",
]
CLASS_TEXTS = {
    "name": "evil.Model",
    "name and space": " evil.Model\n",
    "YAML": "{class_path: evil.Model}",
    "YAML in lines": "class_path: evil.Model\ninit_args: {}\n",
    "JSON": '{"class_path": "evil.Model"}',
    "list": "[{class_path: evil.Model}]",
    "path": "evil.yaml",
    "path of one word": "evil",
}


@pytest.mark.parametrize("text", CLASS_TEXTS)
@pytest.mark.parametrize("place", CLASS_PLACES)
def test_row_69_a_text_where_a_class_goes_is_refused_and_not_read(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, place: str, text: str
) -> None:
    """The parser would take it for a class, import that and call it."""
    canary_module(canary, monkeypatch)
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, place, CLASS_TEXTS[text])
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match=r"If you trust the file|holds no configuration"):
        config_of(checkpoint)
    assert not canary.exists()


HIDDEN = [
    (f"{DATA}.train_transforms", ["evil.Model"]),
    (f"{DATA}.train_transforms", [{"class_path": "evil.Model"}]),
    (f"{DATA}.train_transforms", ["{class_path: evil.Model}"]),
    (f"{DATA}.init_args", {"class_path": "evil.Model"}),
    ("config.model.detector.dict_kwargs", {"box_loss": "evil.Model"}),
    ("config.model.detector.class_path", "onestage.models.SSD160\n"),
    ("config.model.optimizer.init_args", "{class_path: evil.Model}"),
    ("config.model.schedule.kind", {"class_path": "evil.Model"}),
    ("config.model", {"detector.class_path": "evil.Model", "detector.init_args.box_loss": "evil.Model"}),
    ("config.model.unknown", "evil.Model"),
    (f"{DETECTOR}.classification_loss.init_args.class_weights", "evil.Model"),
]


@pytest.mark.parametrize(("place", "value"), HIDDEN)
def test_row_69_a_class_is_found_wherever_it_hides(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: object
) -> None:
    canary_module(canary, monkeypatch)
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, place, value)
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match="If you trust the file"):
        config_of(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "losses", "export"])
def test_row_69_no_command_imports_what_a_text_in_a_checkpoint_names(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    canary_module(canary, monkeypatch)
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, f"{DETECTOR}.classification_loss", "{class_path: evil.Model}")
    torch.save(saved, checkpoint)
    assert run(command, "--ckpt_path", str(checkpoint)) == 2
    message = capsys.readouterr().err
    assert f"checkpoint {checkpoint} has '{{class_path: evil.Model}}' as model.detector.classification_loss" in message
    assert not canary.exists()


def test_row_69_the_description_beside_exported_weights_is_no_way_in(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary_module(canary, monkeypatch)
    shared = canary.parent / "shared"
    assert run("export", "--ckpt_path", str(checkpoint), "--output", str(shared)) == 0
    description = json.loads((shared / "model.json").read_text())
    description["config"]["model"]["optimizer"] = "{class_path: evil.Model}"
    (shared / "model.json").write_text(json.dumps(description))
    assert run("validate", "--ckpt_path", str(shared / "model.safetensors")) == 2
    assert "as model.optimizer" in capsys.readouterr().err
    assert not canary.exists()


@pytest.mark.parametrize("text", CLASS_TEXTS)
def test_row_69_what_the_first_wall_would_overlook_the_parser_does_not_import(
    checkpoint: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    canary_module(canary, monkeypatch)
    monkeypatch.setattr(checkpoint_files, "refusals", lambda config: iter(()))
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, f"{DETECTOR}.classification_loss", CLASS_TEXTS[text])
    torch.save(saved, checkpoint)
    with pytest.raises(CheckpointError, match="cannot be used"):
        config_of(checkpoint)
    assert not canary.exists()


def test_row_69_text_that_only_looks_like_a_class_is_kept_where_text_belongs(checkpoint: Path, tmp_path: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    names = ["a: b", "[x]", "{class_path: evil.Model}", "evil.Model", "null", "1", "instances.json"]
    put(saved, "class_names", names)
    put(saved, "category_ids", list(range(7)))
    put(saved, f"{DATA}.class_names", names)
    put(saved, f"{DATA}.predict_dir", "photos: [of.June]")
    put(saved, f"{DETECTOR}.backbone_weights", "weights/vgg.v1.pth")
    put(saved, f"{DATA}.root", "data.v2")
    torch.save(saved, checkpoint)
    config = config_of(checkpoint)
    assert config["data"]["init_args"]["class_names"] == names
    assert config["data"]["init_args"]["root"] == "data.v2"
    assert needs_config(checkpoint) is None
    assert run("export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "shared")) == 0
    shared = tmp_path / "shared" / "model.safetensors"
    assert config_of(shared)["data"]["init_args"]["class_names"] == names


@pytest.mark.parametrize("factory", ["onestage.data.COCO", "onestage.data.VOC"])
def test_row_69_every_text_of_the_data_modules_has_a_place(checkpoint: Path, factory: str) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    arguments = inspect.signature(getattr(onestage.data, factory.rpartition(".")[2])).parameters
    texts = {
        name: "a.b"
        for name, argument in arguments.items()
        if {"str", "Path"} & set(re.findall(r"\w+", str(argument.annotation)))
    }
    assert "root" in texts
    put(saved, "config.data", {"class_path": factory, "init_args": texts})
    torch.save(saved, checkpoint)
    assert needs_config(checkpoint) is None


def test_row_69_a_configuration_of_a_checkpoint_does_not_override_the_command_line_of_fit(
    checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    saved["onestage"]["config"]["model"]["loss_weights"] = {"box": 77.0}
    torch.save({**saved, "hyper_parameters": {"loss_weights": {"box": 77.0}}}, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path)]
    options += ["--model.loss_weights.box", "0.25"]
    assert run("fit", "--resume", str(checkpoint), *options, "--trainer.max_epochs", "2") == 0
    (last,) = tmp_path.glob("*/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["onestage"]["config"]["model"]["loss_weights"] == {"box": 0.25}


def test_row_70_a_compressed_archive_is_refused_before_it_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.infolist():
            packed.writestr(member.filename, whole.read(member))
        packed.writestr("archive/data/999", bytes(50_000_000))
    assert bomb.stat().st_size < checkpoint.stat().st_size + 1_000_000
    message = refused(bomb)
    assert "is compressed" in message
    assert "would become" in message


def test_row_70_what_is_compressed_is_not_unpacked_to_look_for_its_step(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stored_step(checkpoint) > 0
    with zipfile.ZipFile(checkpoint) as whole:
        members = {member.filename: whole.read(member) for member in whole.infolist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    assert stored_step(checkpoint) == -1


def test_row_70_an_archive_whose_members_are_the_same_bytes_many_times_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.ckpt"
    shutil.copy(checkpoint, bomb)
    with zipfile.ZipFile(bomb, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for number in range(5):
            again = copy.copy(largest)
            again.filename = f"archive/data/9{number}"
            archive.filelist.append(again)
        archive._didModify = True
    assert "would become" in refused(bomb)


@pytest.mark.parametrize("command", ["validate", "export", "fit"])
@pytest.mark.parametrize("size", [100_000_000, 10**13])
def test_row_70_a_tensor_larger_than_what_is_stored_of_it_is_refused_unallocated(
    checkpoint: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    size: int,
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name] = torch.zeros(1).expand(size)
    torch.save(saved, checkpoint)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda _: pytest.fail("its values were looked at"))
    options = {"fit": ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs")]}
    assert run(command, "--ckpt_path", str(checkpoint), *options.get(command, [])) == 2
    assert f"a tensor of {4 * size:,} bytes as `state_dict.{name}`, of which 4 are stored" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_row_70_a_sparse_tensor_and_an_endless_list_are_refused(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    name = next(iter(saved["state_dict"]))
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (10**9,))
    torch.save({**saved, "state_dict": {name: sparse}}, checkpoint)
    refused(checkpoint)
    torch.save({**saved, "more": recursive()}, checkpoint)
    assert "more than 1,000,000 values" in refused(checkpoint)


def change(saved: dict[str, Any], what: str) -> None:
    weights, ours = saved["state_dict"], saved["onestage"]
    name = next(iter(weights))
    if what == "detector":
        ours["detector"] = "RetinaNet"
    elif what == "image size":
        ours["image_size"] = 512
    elif what == "classes":
        ours["class_names"] = [*ours["class_names"], "seventh"]
    elif what == "missing weight":
        del weights[name]
    elif what == "weight too many":
        weights["detector.extra.weight"] = torch.zeros(1)
    elif what == "shape":
        weights[name] = torch.zeros(3)
    elif what == "not finite":
        weights[name] = torch.full_like(weights[name], float("nan"))
    elif what == "schema":
        ours["schema"] = 99


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("detector", ["RetinaNet", "SSD160"]),
        ("image size", ["512", "160"]),
        ("classes", ["7 classes", "the data has 6", "seventh"]),
        ("missing weight", ["Missing key(s)"]),
        ("weight too many", ["detector.extra.weight"]),
        ("shape", ["size mismatch", "torch.Size([3])"]),
        ("not finite", ["NaN or infinite weights in 1 of"]),
        ("schema", ["schema 99", "reads schema 1"]),
    ],
)
def test_row_71_a_checkpoint_that_does_not_fit_names_what_was_saved_and_what_is_now(
    checkpoint: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    named: list[str],
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    change(saved, what)
    torch.save(saved, checkpoint)
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs")]
    assert run("fit", "--resume", str(checkpoint), *options) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert [word for word in named if word not in message] == []


def test_row_71_the_archive_of_another_byte_order_is_an_error_and_no_other_weights(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint) as whole:
        members = {member.filename: whole.read(member) for member in whole.infolist()}
    (order,) = [name for name in members if name.endswith("byteorder")]
    members[order] = struct.pack("3s", b"mid")
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_STORED) as broken:
        for name, content in members.items():
            broken.writestr(name, content)
    assert "cannot be loaded" in refused(checkpoint)


def recursive() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


def doubled(levels: int) -> list[Any]:
    items: list[Any] = [1]
    for _ in range(levels):
        items = [items, items]
    return items


GONE = object()
MALFORMED = [
    ("onestage", [1]),
    ("onestage.config", [1]),
    ("onestage.config.model.loss_weights.box", torch.ones(1)),
    ("onestage.config.model.loss_weights.box", recursive()),
    ("onestage.config.model.loss_weights.box", doubled(40)),
    ("onestage.class_names", GONE),
    ("onestage.class_names", 5),
    ("onestage.class_names", [1, 2]),
    ("onestage.category_ids", GONE),
    ("onestage.image_size", "big"),
    ("onestage.versions", ["torch"]),
    ("state_dict", [1, 2]),
    ("state_dict.detector", "hello"),
    ("current_model_state", {"detector": "hello"}),
    ("global_step", GONE),
    ("global_step", "many"),
    ("epoch", GONE),
    ("optimizer_states", [1]),
    ("optimizer_states", []),
    ("optimizer_states", 5),
    ("optimizer_states", [{"state": {}, "param_groups": [{"lr": 0.1}]}]),
    ("lr_schedulers", GONE),
    ("lr_schedulers", []),
    ("callbacks", GONE),
    ("callbacks", {"BestCheckpoint{}": {}}),
    ("pytorch-lightning_version", GONE),
    ("pytorch-lightning_version", "x"),
    ("pytorch-lightning_version", "0.0.1"),
    ("loops", GONE),
    ("loops.fit_loop", GONE),
    ("loops.fit_loop", {}),
    ("loops.fit_loop.epoch_progress", {"total": {}, "current": {}}),
    ("shapes_data", {"batches": 3}),
    ("shapes_data.batch_size", 0),
]


@pytest.mark.parametrize(("place", "value"), MALFORMED)
def test_row_71_a_checkpoint_that_is_not_in_shape_names_the_place(
    checkpoint: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, value: object
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    *parents, last = place.split(".")
    node = saved
    for name in parents:
        node = node[name]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    torch.save(saved, checkpoint)
    message = refused(checkpoint)
    assert f"`{place.split('.')[0]}" in message
    runs = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs")]
    assert run("fit", "--resume", str(checkpoint), *runs) == 2
    assert run("export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "shared")) == 2
    assert not (tmp_path / "runs").exists()
    assert capsys.readouterr().err.count(message) == 2


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config", None),
        ("config.model", None),
        ("config.model.detector", "onestage.models.SSD160"),
        ("config.model.detector", 5),
        ("config.model.detector.init_args", [1]),
        ("config.data.init_args", [1]),
        ("config.data", {}),
        ("config.model.renamed", 1),
        ("config.model.optimizer.class_path", 5),
    ],
)
def test_row_71_a_configuration_that_is_not_in_shape_is_named_and_one_by_hand_used(
    checkpoint: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, value: object
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, place, value)
    torch.save(saved, checkpoint)
    assert run("validate", "--ckpt_path", str(checkpoint)) == 2
    message = capsys.readouterr().err
    assert str(checkpoint) in message
    assert "--config" in message
    options = ["--config", str(trained / "config.yaml"), "--runs_dir", str(tmp_path / "runs"), "--drawn_images", "0"]
    assert run("validate", "--ckpt_path", str(checkpoint), *options) == 0


@pytest.mark.parametrize("key", ["optimizer_states", "callbacks", "loops"])
def test_row_71_weights_without_the_state_of_a_training_are_enough_to_evaluate(checkpoint: Path, key: str) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    for name in ("optimizer_states", key):
        saved.pop(name, None)
    torch.save(saved, checkpoint)
    assert read_checkpoint(checkpoint)["global_step"] > 0


def test_row_71_an_infinite_number_in_a_configuration_is_no_json(checkpoint: Path, tmp_path: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, "config.data.worker_timeout_seconds", float("inf"))
    torch.save(saved, checkpoint)
    assert config_of(checkpoint)["data"]["init_args"]["worker_timeout_seconds"] == float("inf")
    assert run("export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "shared")) == 2
    assert not (tmp_path / "shared").exists()


def test_row_71_a_data_module_without_arguments_gets_the_classes_of_the_checkpoint(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    put(saved, "config.data.init_args", None)
    torch.save(saved, checkpoint)
    assert config_of(checkpoint)["data"]["init_args"]["class_names"] == saved["onestage"]["class_names"]
