"""Lock the folder of a run, runs/<experiment>/version_<n>/."""

import contextlib
import errno
import os
import socket
import time
from pathlib import Path

import filelock

from onestage.errors import RunInUseError
from onestage.files import OUT_OF_SPACE, TEMPORARY_SUFFIX, write_error
from onestage.training.run import new_run_folder

LOCK_FILE = ".lock"
OWNER_FILE = ".lock_owner"  # filelock truncates its own file

_held: dict[Path, filelock.BaseFileLock] = {}  # the system releases a lock when its process ends, however it ends


def new_locked_folder(runs_dir: str, experiment: str, *, is_writer: bool) -> Path:
    """Create and lock the next free folder of an experiment.

    ResourceError if it may not be created or written, or the disk is full; ConfigError if the path cannot be a folder.
    """
    try:
        folder = new_run_folder(runs_dir, experiment, is_writer=is_writer)
    except OSError as error:
        raise write_error(Path(runs_dir) / experiment, error) from error
    if is_writer:
        _lock(folder)
    return folder


def take_run_folder(folder: Path, *, is_writer: bool = True) -> None:
    """Lock the folder of a run that has ended, and remove its unfinished files; RunInUseError if it has not ended."""
    if is_writer:
        _lock(folder)
        for unfinished in folder.rglob(f".*{TEMPORARY_SUFFIX}"):  # by a process that was killed
            with contextlib.suppress(OSError):
                unfinished.unlink()


def _lock(folder: Path) -> None:
    """Hold the folder until this process ends."""
    lock = _held.get(folder.absolute()) or filelock.FileLock(folder / LOCK_FILE)
    owner = folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        holder = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise RunInUseError(
            f"{folder} is being written by {holder}.\n"
            "Wait until it ends, or stop it, or start another run with --resume none."
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, *OUT_OF_SPACE):
            raise write_error(folder, error) from error
        return  # a file system without locks: a run without one is better than none
    _held[folder.absolute()] = lock
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its label
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n", encoding="utf-8")
