"""Writing and reading checkpoint files so that none is ever torn, and none is lost in silence."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from onestage.files import TEMPORARY_SUFFIX, atomic_write, write_error
from onestage.reliability.checkpoint_files import read_checkpoint


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
        with atomic_write(path) as temporary, temporary.open("wb") as file:
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


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that `target` stands for all of it at every moment.

    Raises:
        ResourceError: the disk is full, or the folder refuses; the file that had this name is untouched.
    """
    with atomic_write(target) as temporary, source.open("rb") as original, temporary.open("wb") as copy:
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
        raise write_error(path, error) from error
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
    with atomic_write(folder / ".write_test") as temporary:
        temporary.write_bytes(b"onestage")
    (folder / ".write_test").unlink(missing_ok=True)


def writes_whole_files(strategy: object) -> bool:
    """Return whether one process writes each checkpoint as one file; other strategies write parts into folders.

    strategy: as configured, a name or an object. FSDP gathers the weights in one file unless it is configured not to.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    # Lightning has no public name for it; tests/reliability fail when it disappears.
    in_parts = getattr(strategy, "_state_dict_type", "full") == "sharded"
    return not in_parts and not any(word in name.lower() for word in ("deepspeed", "modelparallel"))
