"""Where a run writes: runs/<experiment>/version_<n>/, and that nobody else does."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from onestage.errors import ConfigError, ResourceError, RunInUseError
from onestage.files import OUT_OF_SPACE
from onestage.reliability.checkpoint_io import sweep

LOCK_FILE = ".lock"
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, *OUT_OF_SPACE)  # by the machine; anything else is a wrong path

_held: dict[Path, IO[str]] = {}  # the lock of a folder goes when its file is closed, and that is when the process ends


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder. Lightning's goes where the first logger writes, perhaps elsewhere."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write all settings, for `--config` and `--resume auto`."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


def new_run_folder(runs_dir: str, experiment: str, *, num_nodes: int = 1) -> Path:
    """Make and return the next free folder of an experiment.

    Only the first process of a run does. The others get a path that nothing is written to: what writes on every
    process asks the first one for its folder when they are connected.

    Raises:
        ResourceError: the folder may not be made or written, or the disk is full.
        ConfigError: there can be no folder of that name.
    """
    folder = Path(runs_dir) / experiment
    if not _is_first_process(num_nodes):
        return folder / "folder_of_the_first_process"
    folder = _claim(folder)
    _lock(folder)
    return folder


def take_run_folder(folder: Path, *, num_nodes: int = 1) -> None:
    """Take over the folder of a run that has ended, to go on in it, and sweep what it left unfinished.

    Raises:
        RunInUseError: it has not ended.
        ResourceError: it may not be written.
    """
    if _is_first_process(num_nodes):
        _lock(folder)
        sweep(folder)


def _is_first_process(num_nodes: int) -> bool:
    # The rank is the local one where Lightning starts the processes; then NODE_RANK tells the machines apart.
    is_first_node = num_nodes == 1 or os.environ.get("NODE_RANK", "0") == "0"
    return is_first_node and rank_zero_only.rank == 0  # type: ignore[attr-defined] # Lightning sets it when imported


def _claim(experiment_folder: Path) -> Path:
    try:
        experiment_folder.mkdir(parents=True, exist_ok=True)
        version = 1 + max((version_of(path) for path in experiment_folder.iterdir()), default=-1)
        while True:
            folder = experiment_folder / f"version_{version}"
            try:
                folder.mkdir()  # the one atomic way to claim a number when two runs start together
                return folder
            except FileExistsError:
                version += 1
    except OSError as error:
        raise _refusal(experiment_folder, error) from error


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


def version_of(path: Path) -> int:
    """Return n of version_n, or -1."""
    name, _, number = path.name.partition("_")
    return int(number) if name == "version" and number.isdecimal() else -1
