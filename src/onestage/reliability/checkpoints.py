"""Checkpoint files: written atomically, read without running anything in them."""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from onestage.errors import CheckpointError, ResourceError
from onestage.files import TEMPORARY_SUFFIX, atomic_write, printable, read_file, write_error
from onestage.training.module import CHECKPOINT_KEY, CHECKPOINT_SCHEMA, DetectionModule
from onestage.types import JSONDict

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
MAX_VALUES = 1_000_000  # in a checkpoint, tensors counted as one; 100,000 classes need 200,000
MAX_JSON_BYTES = 64 << 20
SHARED_KEYS = ("schema", "detector", "class_names", "category_ids")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints on a local file system: a name always stands for a whole file.

    Lightning moves a file from the temporary folder over the old one: between two file systems that is a copy, which
    a kill or a full disk truncates. It also ignores a permission error.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or raise ResourceError and keep the earlier file."""
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as `read_checkpoint` does; `weights_only` is always true."""
        return read_checkpoint(path, mapped=False)  # the training must not depend on the file any more

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint that a better one has replaced."""
        Path(path).unlink(missing_ok=True)


# Reading


def read_checkpoint(path: str | Path, *, mapped: bool = True) -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU. No code in it is run.

    Args:
        path: a .ckpt file, or a .safetensors file with its .json file beside it.
        mapped: read tensors from the file when they are used; a command reads the configuration first.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a FIFO would block
            what = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is not a file"
            raise CheckpointError(f"checkpoint {path} {what}.{_other_checkpoints(path)}")
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path, mapped)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(path)[:300]} cannot be read: {error.strerror or error}.\n"
            "Check the path, and that this user may read the file and enter its folder."
        ) from error
    ours = checkpoint[CHECKPOINT_KEY]
    schema = ours.get("schema") if isinstance(ours, dict) else CHECKPOINT_SCHEMA
    if schema != CHECKPOINT_SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema!r:.99}; this version of onestage reads schema {CHECKPOINT_SCHEMA}.\n"
            "Use the version of onestage that wrote it (its number is in the run's results.json)."
        )
    problem = _find_oversized_tensor(checkpoint, path.stat().st_size) or _find_wrong_type(checkpoint)
    if problem is not None:
        remedy = "`onestage fit` does not write such a file."
        raise CheckpointError(f"checkpoint {path} {problem}.\n{remedy}{_other_checkpoints(path)}")
    return checkpoint


def stored_step(file: Path) -> int:
    """Return the optimizer step in a checkpoint without reading its tensors, or -1."""
    try:
        return int(_load_archive(file, mapped=True)["global_step"]) if file.is_file() else -1
    except Exception:  # `read_checkpoint` names the problem if this file is chosen
        return -1


def _read_archive(path: Path, mapped: bool) -> dict[str, Any]:
    _check_archive(path)
    try:
        checkpoint = _load_archive(path, mapped)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises half a dozen kinds here, among them those of pickle
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded as plain tensors and numbers ({_first_line(error)}).\n"
            "Only checkpoints written by this project are read; nothing in it was run."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path} was not written by `onestage fit` (no `state_dict` or no `{CHECKPOINT_KEY}` in it).\n"
            "For weights of other origin see the `weights` of the backbone and `pretrained` of the detector."
        )
    return checkpoint


def _load_archive(path: Path, mapped: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        _require_uncompressed(path, archive)
        for member in archive.infolist():
            # bytearray is the one callable that torch accepts and that allocates memory by itself.
            if member.filename.endswith(".pkl") and b"bytearray" in archive.read(member):
                raise CheckpointError(f"checkpoint {path} asks for memory that it does not fill. It was not loaded.")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _check_archive(path: Path) -> None:
    """Check that a file is a whole torch archive: torch.load compares no checksum."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes).{_other_checkpoints(path)}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"checkpoint {path} is a Git LFS pointer, not the file itself. Run: git lfs pull")
    if not head.startswith(b"PK"):
        raise CheckpointError(f"checkpoint {path} is not a torch checkpoint: it begins with {head[:16]!r}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _require_uncompressed(path, archive)
            damaged = archive.testzip()
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # zipfile, struct and zlib raise a dozen kinds between them
        problem = f"is truncated or damaged ({size:,} bytes; {_first_line(error)})"
        raise CheckpointError(f"checkpoint {path} {problem}.{_other_checkpoints(path)}") from error
    if damaged is not None:
        raise CheckpointError(
            f"checkpoint {path}: the checksum of {printable(damaged)} is wrong.{_other_checkpoints(path)}"
        )


def _require_uncompressed(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse compressed and overlapping members, which can become gigabytes."""
    members = archive.infolist()
    declared, size = sum(member.file_size for member in members), path.stat().st_size
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"checkpoint {path} is compressed: {size:,} bytes that would become {declared:,}. torch never compresses.\n"
            "It was not unpacked. Use the file that `onestage fit` wrote."
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read the two files of `onestage export` as a checkpoint without optimizer."""
    description = path.with_suffix(".json")
    remedy = "Both are written by: onestage export --ckpt_path runs/.../checkpoints/best.ckpt"
    try:
        content = read_file(description, CheckpointError, "the description of the weights", remedy, MAX_JSON_BYTES)
        ours, weights = json.loads(content), load_file(path)
    except (SafetensorError, ValueError, RecursionError) as error:
        problem = f"{path} with {description.name} beside it cannot be read ({str(error)[:200]})"
        raise CheckpointError(f"{problem}.\n{remedy}") from error
    if not isinstance(ours, dict) or not set(SHARED_KEYS) <= ours.keys():
        raise CheckpointError(f"{description} was not written by `onestage export`: {', '.join(SHARED_KEYS)} needed.")
    return {"state_dict": weights, CHECKPOINT_KEY: ours, "global_step": ours.get("global_step", 0)}


def _find_oversized_tensor(checkpoint: dict[str, Any], file_size: int) -> str | None:
    """Find tensors that need more memory than the file stores."""
    waiting: list[tuple[str, Any]] = list(checkpoint.items())
    storages: dict[int, int] = {}
    num_values = 0
    while waiting:
        place, node = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            return f"has more than {MAX_VALUES:,} values"
        if isinstance(node, dict):
            waiting += [(f"{place}.{key}"[-200:], value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            waiting += [(f"{place}.{index}"[-200:], value) for index, value in enumerate(node)]
        elif isinstance(node, Tensor):
            if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized:
                return f"has a tensor as `{place}` that is sparse, quantized or not on the CPU"
            size, stored = node.numel() * node.element_size(), node.untyped_storage().nbytes()
            if size > stored:
                return f"has a tensor of {size:,} bytes as `{place}`, of which {stored:,} are stored, again and again"
            storages[node.untyped_storage().data_ptr()] = stored
            if sum(storages.values()) > file_size:
                return f"has tensors of more bytes than the file, up to `{place}`"
    return None


def _find_wrong_type(checkpoint: dict[str, Any]) -> str | None:
    """Find an entry of this project, not of Lightning, that has another type."""
    ours = checkpoint[CHECKPOINT_KEY]
    if not isinstance(ours, dict):
        return f"must hold a dictionary as `{CHECKPOINT_KEY}`, got {type(ours).__name__}"
    step, side = checkpoint.get("global_step"), ours.get("image_size")
    names, categories, config = ours.get("class_names"), ours.get("category_ids"), ours.get("config")
    rules = {
        "state_dict": (_is_dict_of(Tensor, checkpoint["state_dict"]), "tensors by name"),
        "global_step": (type(step) is int and step >= 0, "a number of steps"),
        "onestage.detector": (isinstance(ours.get("detector"), str), "a class name"),
        "onestage.image_size": (side is None or (type(side) is int and side > 0), "pixels or nothing"),
        "onestage.class_names": (_is_list_of(str, names), "a list of names"),
        "onestage.category_ids": (_is_list_of(int, categories), "a list of whole numbers"),
        "onestage.config": (config is None or _is_plain_dict(config), "plain keys and values"),
        "onestage.versions": (_is_dict_of(str, ours.get("versions", {})), "versions by package"),
    }
    return next((f"must hold {rule} as `{place}`" for place, (is_right, rule) in rules.items() if not is_right), None)


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _is_dict_of(kind: type, value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(item, kind) for k, item in value.items())


def _is_plain_dict(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # a tensor; a loop; too deep
        return False
    return isinstance(value, dict)


def _other_checkpoints(path: Path) -> str:
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")  # of a run's folder, or an experiment's
    files: Iterator[Path] = path.parent.glob("*.ckpt")
    with contextlib.suppress(OSError):
        if path.is_dir():
            files = (file for pattern in patterns for file in path.glob(pattern))
        others = sorted(printable(file) for file in files if file != path)
        if others:
            return "\nOther checkpoints there: " + ", ".join(others[:5])
    return "\nTo create one: make train. To list those of finished runs: ls runs/*/*/checkpoints/"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# Loading weights into a model


def load_weights(module: DetectionModule, path: str | Path, class_names: Sequence[str]) -> dict[str, Any]:
    """Load the weights of a checkpoint into a module; return the checkpoint.

    Raises:
        CheckpointError: the checkpoint is unreadable, or holds another detector, other classes or other shapes.
    """
    checkpoint = read_checkpoint(path)
    _require_same_model(checkpoint[CHECKPOINT_KEY], path, module, class_names)
    weights = checkpoint["state_dict"]
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        problem = f"has NaN or infinite weights in {len(broken)} of {len(weights)} tensors: {', '.join(broken[:5])}"
        raise CheckpointError(f"checkpoint {path} {problem}.\nUse an earlier one.{_other_checkpoints(Path(path))}")
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:6])
        raise CheckpointError(f"checkpoint {path} does not fit the configured detector:\n{lines}") from error
    return checkpoint


def _require_same_model(saved: JSONDict, path: str | Path, module: DetectionModule, class_names: Sequence[str]) -> None:
    detector = module.detector
    for name, value in (("detector", type(detector).__name__), ("image_size", detector.image_size)):
        if saved.get(name) != value:
            raise CheckpointError(
                f"checkpoint {path} holds {name} {saved.get(name)!r:.99}, the configuration {name} {value}.\n"
                "Leave out --config to use the checkpoint's own configuration, or name a checkpoint of this one."
            )
    if list(saved["class_names"]) != list(class_names):
        then, now = (", ".join(map(printable, names)) for names in (saved["class_names"], class_names))
        raise CheckpointError(
            f"checkpoint {path} was trained on {len(saved['class_names'])} classes, the data has {len(class_names)}; "
            f"they must be the same, in the same order.\nOf the checkpoint: {then}\nOf the data: {now}"
        )


# Writing


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def keep_previous(path: Path, previous: Path) -> None:
    """Give `path` the second name `previous`, before a newer file takes its first."""
    if not path.is_file():
        return
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(path)
            temporary.replace(previous)
        except OSError:  # a file system without hard links
            path.replace(previous)
        temporary.unlink(missing_ok=True)  # two links to one file: the replacement did nothing
    except OSError as error:
        raise write_error(path, error) from error


def remove_unfinished_files(folder: Path) -> list[Path]:
    """Remove the temporary files of killed processes from a locked folder."""
    unfinished = list(folder.rglob(f".*{TEMPORARY_SUFFIX}"))
    for file in unfinished:
        with contextlib.suppress(OSError):
            file.unlink()
    return unfinished


def require_writable(path: Path) -> None:
    """Raise ResourceError, before the training, if the file `path` cannot be written."""
    if path.is_dir():
        raise ResourceError(f"{path}: is a folder; the checkpoint cannot be written. Remove or rename that folder.")
    with atomic_write(path.with_name(".write_test")) as temporary:
        temporary.write_bytes(b"onestage")
    path.with_name(".write_test").unlink(missing_ok=True)
