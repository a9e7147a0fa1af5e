"""Writing and reading checkpoint files so that none is ever torn, and none is lost in silence."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from onestage.errors import ResourceError
from onestage.training.checkpoint_files import read_checkpoint

TEMPORARY_SUFFIX = ".tmp"
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WholeFileIO(TorchCheckpointIO):
    """Checkpoints on a local file system: a name stands for a whole file or for the one before it, never for a part.

    Lightning writes into the system's temporary folder and moves the file over the old one, which between two file
    systems is a copy that a kill or a full disk cuts short, and it swallows a refused permission. Here the file grows
    beside its target, reaches the disk, and takes the name in one step. Nothing is ever unpickled beyond plain tensors,
    numbers and strings.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ResourceError: the disk is full, or the folder refuses; the file that had this name is untouched.
        """
        path = Path(path)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this project on the CPU, checked byte by byte; `weights_only` is always true.

        Raises:
            CheckpointError: see `read_checkpoint`.
        """
        return read_checkpoint(path, mapped=False)  # what is trained on must not depend on the file any more

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint that a better one has replaced."""
        Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; what is there in the end takes its name, or nothing happens at all.

    Raises:
        ResourceError: the folder cannot be written, or is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)  # noqa: PTH105 # the same as Path.replace, by the name of the system call
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise _refusal(path, error, _size(temporary)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that `target` stands for all of it at every moment.

    Raises:
        ResourceError: the disk is full, or the folder refuses; the file that had this name is untouched.
    """
    with whole_file(target) as temporary, source.open("rb") as original, temporary.open("wb") as copy:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())


def keep_previous(path: Path, previous: Path) -> None:
    """Give the file at `path` a second name before a newer one takes its first. At no time is there none."""
    if not path.is_file():
        return
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(path)
        except OSError:  # a file system without hard links
            path.replace(previous)
        else:
            temporary.replace(previous)
    except OSError as error:
        raise _refusal(path, error, 0) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> list[Path]:
    """Remove the unfinished files that killed processes have left, and return them. Only for who holds the folder."""
    swept = list(folder.rglob(f".*{TEMPORARY_SUFFIX}"))
    for file in swept:
        with contextlib.suppress(OSError):
            file.unlink()
    return swept


def require_writable(folder: Path) -> None:
    """Write and remove a small file, so that a folder that refuses does so before the training and not after.

    Raises:
        ResourceError: it refuses.
    """
    with whole_file(folder / ".write_test") as temporary:
        temporary.write_bytes(b"onestage")
    (folder / ".write_test").unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut; some file systems know no such thing for folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refusal(path: Path, error: OSError | RuntimeError, written: int) -> Exception:
    """Say why a file could not be written, or hand the error back if it is none of the disk's."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container")):
        return error
    rest = "The file that had this name before is untouched."
    if number in OUT_OF_SPACE or number is None:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        return ResourceError(
            f"{path} cannot be written: the disk or the quota is full after {written / 1e6:,.1f} MB, with "
            f"{free / 1e6:,.1f} MB free in {path.parent}.\n{rest} Make room there, or set --runs_dir to another disk; "
            "then go on with --resume auto."
        )
    return ResourceError(
        f"{path} cannot be written: {error.strerror if isinstance(error, OSError) else error}.\n{rest} Make "
        f"{path.parent} writable for this user, or set --runs_dir to a folder that is; then go on with --resume auto."
    )
