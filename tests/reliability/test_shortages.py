"""Faults of the machine and the files: full disks, memory, dead workers, damaged checkpoints, changed data."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import checkpoint_files
import pytest
import tiny_run
import torch
from faults import fail_with
from tiny_run import break_method, folder_of, is_same_end

from onestage.errors import ResourceError
from onestage.reliability import stopping
from onestage.reliability.resume import newest_checkpoint
from onestage.training import loggers
from onestage.training.module import DetectionModule

pytestmark = pytest.mark.fault


@pytest.mark.slow
def test_full_disk_for_the_curves_does_not_end_the_run(drawn, tmp_path, monkeypatch, caplog):
    no_space = fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(loggers.CSVLogger, "save", no_space)
    monkeypatch.setattr(loggers.TensorBoardLogger, "log_metrics", no_space)
    loggers._warned.clear()
    with caplog.at_level("WARNING", logger="onestage.training.loggers"):
        assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 0
    assert sum("metrics.csv cannot be written" in line for line in caplog.messages) == 1
    assert sum("event files cannot be written" in line for line in caplog.messages) == 1


def test_folder_that_denies_writing_is_found_before_training(drawn, tmp_path, monkeypatch, capsys):
    # As root, permissions do not apply.
    monkeypatch.setattr(os, "replace", fail_with(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    monkeypatch.setattr(DetectionModule, "training_step", fail_with(AssertionError("it trained")))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    message = capsys.readouterr().err
    assert "Permission denied" in message
    assert str(folder_of(tmp_path)) in message


SHARED_MEMORY = "unable to open shared memory object </torch_4711_0> in read-write mode: No space left on device (28)"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--auto_batch"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "data.batch"),
        (MemoryError(), "data.batch_size"),
        (RuntimeError(SHARED_MEMORY), "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "--runs_dir"),
    ],
)
def test_shortage_of_the_machine_is_named_with_its_remedy(error, remedy):
    with pytest.raises(ResourceError, match=remedy), stopping.mapped_errors():
        raise error


def test_out_of_memory_leaves_the_last_checkpoint(drawn, tmp_path, monkeypatch, capsys):
    break_method(monkeypatch, "training_step", 3, fail_with(torch.OutOfMemoryError("CUDA out of memory.")))
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    assert "data.batch_size" in capsys.readouterr().err
    assert newest_checkpoint(folder_of(tmp_path) / "checkpoints").global_step == 2


@pytest.fixture(scope="module")
def stopped(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 16 steps that was stopped after step 6, to be copied."""
    runs = tmp_path_factory.mktemp("stopped")
    assert tiny_run.end_of_signalled(tiny_run.words(drawn, runs), 6) == 143
    return folder_of(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "code", "said"),
    [
        ("onestage.versions.torch", "2.0.0", 0, "torch 2.0.0"),
        ("onestage.schema", 99, 2, "schema 99"),
        ("loops", {"fit_loop": {}}, 2, "Resume from|Use another one"),
        ("lr_schedulers", 5, 2, "Resume from|Use another one"),
        ("callbacks", 5, 2, "Resume from|Use another one"),
        ("optimizer_states", [1], 2, "Resume from|Use another one"),
    ],
)
def test_other_or_malformed_checkpoint_is_reported(place, value, code, said, stopped, drawn, tmp_path, capsys):
    saved = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    path = checkpoint_files.write(tmp_path / "other.ckpt", checkpoint_files.changed(place, value, saved))
    words = tiny_run.words(drawn, tmp_path, "--resume", str(path), "--trainer.max_steps", "7")
    assert tiny_run.onestage(*words) == code
    err = capsys.readouterr().err
    assert re.search(said, err)
    assert "Traceback" not in err


def edit_a_box(data: Path) -> None:
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))


def edit_a_byte(data: Path) -> None:
    """Change the pixels of a training image."""
    name = json.loads((data / "annotations" / "instances_train.json").read_text())["images"][3]["file_name"]
    content = bytearray((data / "JPEGImages" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (data / "JPEGImages" / name).write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "problem"), [(edit_a_box, "training annotations"), (edit_a_byte, "training images")])
def test_changed_data_is_refused_unless_the_change_is_allowed(edit, problem, drawn, tmp_path, capsys):
    data = shutil.copytree(drawn, tmp_path / "data")
    command = tiny_run.words(data, tmp_path / "runs", "--resume", "auto", source="COCO")
    assert tiny_run.end_of_signalled(command, 2) == 143
    edit(data)
    assert tiny_run.onestage(*command) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "--allow_data_change true" in error
    assert tiny_run.onestage(*command, "--allow_data_change", "true") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "full"), (errno.EROFS, "writable")])
def test_failed_write_ends_with_code_5_and_keeps_the_saved(number, word, drawn, tmp_path, monkeypatch, capsys):
    checkpoints, syncs = tmp_path / "tiny" / "version_0" / "checkpoints", iter(range(1, 10**9))

    def sync(handle: int) -> None:
        if (checkpoints / "last.ckpt").exists() and next(syncs) > 4:  # each save takes two: the file and its folder
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path)) == 5
    assert word in capsys.readouterr().err
    assert newest_checkpoint(checkpoints).global_step >= 2
    assert list(checkpoints.glob(".*.tmp")) == []


@pytest.mark.slow
def test_other_numbers_of_workers_give_the_same_bits(stopped, drawn, uninterrupted, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "tiny" / "version_0")
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path, "--resume", "auto", "--data.num_workers", "2")) == 0
    assert is_same_end(uninterrupted(), folder)
