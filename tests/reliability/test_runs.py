"""Run folders: numbered, created by one process, locked against a second run."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from lightning.pytorch.utilities import rank_zero_only

from onestage.errors import ConfigError, ResourceError, RunInUseError
from onestage.reliability.runs import LOCK_FILE, new_locked_folder, take_run_folder
from onestage.training.run import is_first_process, new_run_folder


def test_versions_count_up_and_gaps_are_not_filled(tmp_path):
    (tmp_path / "shapes" / "version_4").mkdir(parents=True)
    (tmp_path / "shapes" / "version_old").mkdir()
    names = [new_run_folder(str(tmp_path), experiment).name for experiment in ("shapes", "shapes", "voc")]
    assert names == ["version_5", "version_6", "version_0"]


@pytest.mark.parametrize(("rank", "node"), [(1, "0"), (0, "1")])
def test_only_the_first_process_writes(monkeypatch, tmp_path, rank, node):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setenv("NODE_RANK", node)
    assert not is_first_process(SimpleNamespace(trainer=SimpleNamespace(num_nodes=2)))
    new_locked_folder(str(tmp_path), "shapes", is_writer=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runs_dir", ["file", "x" * 4000])
def test_path_that_cannot_be_a_folder_is_refused_with_its_key(tmp_path, runs_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written(.|\n)*--runs_dir"):
        new_locked_folder(str(tmp_path / runs_dir), "shapes", is_writer=True)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_refusal_of_the_machine_ends_with_code_5(tmp_path, monkeypatch, number, call):
    """For a new folder, and for the lock of a resumed run."""
    original = os.open

    def refuse(path: object, *arguments: object, **named: object) -> int:
        if call == "mkdir" or str(path).endswith(LOCK_FILE):
            raise OSError(number, os.strerror(number))
        return original(path, *arguments, **named)

    monkeypatch.setattr(*((Path, "mkdir", refuse) if call == "mkdir" else (os, "open", refuse)))
    problem = "the disk or the quota is full" if number == errno.ENOSPC else os.strerror(number)
    with pytest.raises(ResourceError, match=f"{tmp_path}.*{problem}(.|\n)*--runs_dir") as refused:
        new_locked_folder(str(tmp_path), "shapes", is_writer=True) if call == "mkdir" else take_run_folder(tmp_path)
    assert refused.value.exit_code == 5


def test_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    take_run_folder(tmp_path)


def test_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    ready, stop = os.pipe(), os.pipe()
    owner = os.fork()
    if owner == 0:
        take_run_folder(tmp_path)
        if os.fork() == 0:  # a worker that outlives its parent does not keep the lock
            os.read(stop[0], 1)
            os._exit(0)
        os.write(ready[1], b"1")
        os.read(stop[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(RunInUseError, match=f"process {owner} on .*started"):
            take_run_folder(tmp_path)
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        take_run_folder(tmp_path)
        take_run_folder(tmp_path)  # the same process may continue its own run
    finally:
        os.write(stop[1], b"11")
