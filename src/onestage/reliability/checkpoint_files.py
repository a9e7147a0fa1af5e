"""Reading checkpoints without trusting them: are they whole, ours, of this model? Nothing in them is ever run."""

import zipfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from onestage.errors import CheckpointError
from onestage.reliability.checkpoint_shape import shape_problem
from onestage.reliability.shared_weights import read_safetensors
from onestage.reliability.stored_config import TRUSTED, parsing_error, refusals
from onestage.training.module import CHECKPOINT_KEY, CHECKPOINT_SCHEMA, DetectionModule
from onestage.types import JSONDict


def read_checkpoint(path: str | Path, *, mapped: bool = True) -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU, never running code from it.

    Args:
        path: of the file.
        mapped: leave tensors in the file until they are read. A command reads its checkpoint twice: the configuration,
            then, with a model, the weights.

    Raises:
        CheckpointError: the file is missing, torn, damaged, or not a checkpoint of this project; the message says
            which and what to do.
    """
    path = Path(path)
    try:
        _require_file(path)
        if path.suffix == ".safetensors":
            return _of_our_schema(read_safetensors(path), path)
        _check_archive(path)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(path)[:300]} cannot be read: {error.strerror or error}.\n"
            "Check that path, and that this user may read the file and enter its folder."
        ) from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen kinds here, pickle's own among them
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded as plain tensors and numbers ({_first_line(error)}).\n"
            "Only checkpoints written by this project are read; nothing in it was run."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path} was not written by `onestage fit` (no `state_dict` or no `{CHECKPOINT_KEY}` in it).\n"
            "For weights of other origin see model.detector.init_args.backbone_weights and pretrained."
        )
    return _of_our_schema(checkpoint, path)


def _require_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}.{_nearby(path)}")


def _of_our_schema(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    ours = checkpoint[CHECKPOINT_KEY]
    schema = ours.get("schema") if isinstance(ours, dict) else CHECKPOINT_SCHEMA
    if schema != CHECKPOINT_SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema!r:.99}; this version of onestage reads schema {CHECKPOINT_SCHEMA}.\n"
            "Use the version of onestage that wrote it (its number is in the run's results.json)."
        )
    problem = shape_problem(checkpoint)
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} {problem}.\n`onestage fit` writes none like that.{_nearby(path)}")
    return checkpoint


def stored_step(file: Path) -> int:
    """The step inside a file without reading its tensors; -1 if it cannot be told."""
    try:
        _require_file(file)  # a pipe would be waited for
        with zipfile.ZipFile(file) as archive:
            _require_stored(file, archive)
        return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception:  # whatever is wrong with it, `read_checkpoint` will say when it is this file's turn
        return -1


def _check_archive(path: Path) -> None:
    """Tell apart the ways in which a file is not a whole torch archive. torch.load itself checks no checksum."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes).{_nearby(path)}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"checkpoint {path} is a Git LFS pointer, not the file itself. Run: git lfs pull")
    if not head.startswith(b"PK"):
        raise CheckpointError(f"checkpoint {path} is not a torch checkpoint: it begins with {head[:16]!r}.")
    try:
        with zipfile.ZipFile(path) as archive:
            _require_stored(path, archive)
            damaged = archive.testzip()
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # zipfile, struct and zlib raise a dozen kinds between them, by which bit is wrong
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged ({size:,} bytes; {_first_line(error)}).{_nearby(path)}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong.{_nearby(path)}")


def _require_stored(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse compressed and overlapping members, which torch never writes: kilobytes of them can hold gigabytes."""
    members = archive.infolist()
    declared, size = sum(member.file_size for member in members), path.stat().st_size
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"checkpoint {path} is compressed: {size:,} bytes that would become {declared:,}. torch writes none like "
            "that.\nIt was not unpacked. Use the file that `onestage fit` wrote."
        )


def _nearby(path: Path) -> str:
    patterns = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt")  # in a run's folder, or an experiment's
    files = [file for one in patterns for file in path.glob(one)] if path.is_dir() else path.parent.glob("*.ckpt")
    others = sorted(str(file) for file in files if file != path)
    if others:
        return "\nOther checkpoints there: " + ", ".join(others[:5])
    return "\nTo make one: make train. To list those of finished runs: ls runs/*/*/checkpoints/"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require_fit(
    checkpoint: dict[str, Any], path: str | Path, module: DetectionModule, class_names: Sequence[str]
) -> None:
    """Compare what a checkpoint says of itself with the model and the data at hand.

    Raises:
        CheckpointError: it holds another detector, another input size, or other classes or another order of them.
    """
    saved = checkpoint[CHECKPOINT_KEY]
    current = {"detector": type(module.detector).__name__, "image_size": module.detector.image_size}
    for name, value in current.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"checkpoint {path} holds {name} {saved.get(name)}, the configuration {name} {value}.\n"
                "Leave out --config to use the checkpoint's own configuration, or name a checkpoint of this one."
            )
    saved_names = list(saved.get("class_names", []))
    if saved_names != list(class_names):
        raise CheckpointError(
            f"checkpoint {path} was trained on {len(saved_names)} classes, the data has {len(class_names)}; "
            "they must be the same, in the same order.\n"
            f"Of the checkpoint: {', '.join(saved_names)}\nOf the data: {', '.join(class_names)}"
        )


def load_weights(module: DetectionModule, path: str | Path, class_names: Sequence[str]) -> None:
    """Put the weights of a checkpoint into the module.

    Raises:
        CheckpointError: the checkpoint is unreadable, or holds another detector, other classes or other shapes.
    """
    checkpoint = read_checkpoint(path)
    require_fit(checkpoint, path, module, class_names)
    _require_finite(checkpoint["state_dict"], path)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:6])
        raise CheckpointError(f"checkpoint {path} does not fit the configured detector:\n{lines}") from error


def _require_finite(weights: dict[str, Any], path: str | Path) -> None:
    broken = [name for name, value in weights.items() if not bool(torch.as_tensor(value).isfinite().all())]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} has NaN or infinite weights in {len(broken)} of {len(weights)} tensors: "
            f"{', '.join(broken[:5])}.\nTraining had gone wrong when it was written. Use an earlier one."
            f"{_nearby(Path(path))}"
        )


def config_of(path: str | Path) -> JSONDict:
    """Return the `model` and `data` configuration stored in a checkpoint, with its class names filled in.

    Raises:
        CheckpointError: the checkpoint is unreadable, or its configuration is malformed or names what is not trusted.
    """
    saved = read_checkpoint(path)[CHECKPOINT_KEY]
    config = _stored_config(saved, path)
    for refusal in refusals(config):
        raise _unusable_config(path, str(refusal))
    detector = config["model"]["detector"].get("init_args") or {}
    for source in ("backbone_weights", "pretrained"):  # the weights are in the checkpoint: nothing is to be fetched
        if source in detector:
            detector[source] = None
    classes = {key: saved[key] for key in ("class_names", "category_ids")}
    config["data"]["init_args"] = {**(config["data"].get("init_args") or {}), **classes}
    problem = parsing_error(deepcopy(config))
    if problem is not None:
        raise _unusable_config(path, f"cannot be used: {problem}")
    return config


def needs_config(path: str | Path) -> str | None:
    """Say why nobody can use a checkpoint without a configuration of their own, or None if anybody can.

    Raises:
        CheckpointError: the checkpoint is unreadable, or its configuration is malformed.
    """
    found = list(refusals(_stored_config(read_checkpoint(path)[CHECKPOINT_KEY], path)))
    for refusal in found:
        if not refusal.is_name:
            raise _unusable_config(path, str(refusal))
    names = sorted({repr(refusal.value).strip("'") for refusal in found})
    return f"it names {', '.join(names)}, not in {', '.join(TRUSTED)}" if names else None


def _stored_config(saved: JSONDict, path: str | Path) -> JSONDict:
    config: JSONDict = {key: (saved.get("config") or {}).get(key) for key in ("model", "data")}
    if not all(isinstance(part, dict) for part in config.values()):
        raise CheckpointError(f"checkpoint {path} holds no configuration. Give the run's config.yaml with --config.")
    return config


def _unusable_config(path: str | Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the configuration inside checkpoint {path} {problem}.\n"
        "If you trust the file, give the run's own config.yaml with --config."
    )
