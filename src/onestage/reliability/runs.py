"""Where a run writes: runs/<experiment>/version_<n>/, and that nobody else does."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from onestage.errors import ConfigError, ResourceError, RunInUseError
from onestage.files import OUT_OF_SPACE
from onestage.reliability.checkpoint_io import sweep
from onestage.training.run import new_run_folder

LOCK_FILE = ".lock"
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, *OUT_OF_SPACE)  # by the machine; anything else is a wrong path

_held: dict[Path, IO[str]] = {}  # the lock of a folder goes when its file is closed, and that is when the process ends


def new_locked_folder(runs_dir: str, experiment: str, *, is_writer: bool) -> Path:
    """Create and lock the next free folder of an experiment.

    Raises:
        ResourceError: the folder may not be made or written, or the disk is full.
        ConfigError: there can be no folder of that name.
    """
    try:
        folder = new_run_folder(runs_dir, experiment, is_writer=is_writer)
    except OSError as error:
        raise _refusal(Path(runs_dir) / experiment, error) from error
    if is_writer:
        _lock(folder)
    return folder


def take_run_folder(folder: Path, *, is_writer: bool = True) -> None:
    """Take over the folder of a run that has ended, to go on in it, and sweep what it left unfinished.

    Raises:
        RunInUseError: it has not ended.
        ResourceError: it may not be written.
    """
    if is_writer:
        _lock(folder)
        sweep(folder)


def _refusal(folder: Path, error: OSError) -> ResourceError | ConfigError:
    kind = ResourceError if error.errno in REFUSED else ConfigError
    return kind(
        f"the run folder {folder} cannot be written: {error.strerror or error}.\n"
        "Set --runs_dir to a folder where you may write."
    )


def _lock(folder: Path) -> None:
    """Hold the folder until this process ends, however it ends: the system takes the lock back, so none gets stale."""
    try:
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise _refusal(folder, error) from error
    try:
        # Not flock: a worker process of the loader would inherit that one and hold it beyond its parent's death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise RunInUseError(
            f"{folder} is being written by {owner}.\n"
            "Wait until it ends, or stop it, or begin another run with --resume none."
        ) from error
    except OSError:  # a file system that knows no locks: better a run without one than none
        file.close()
        return
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its label
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
        file.flush()
    _held[folder] = file
