"""Reading checkpoints without trusting them, and writing into them what it takes to use them again."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from onestage.errors import CheckpointError
from onestage.training.module import CHECKPOINT_KEY, CHECKPOINT_SCHEMA, DetectionModule
from onestage.types import JSONDict

# What a config inside a checkpoint may name. A config of the user's own may name anything: it is a program, as the
# user knows; a checkpoint is a file from somewhere.
TRUSTED_CLASS_PATHS = ("onestage.", "torch.optim.", "torch.nn.", "albumentations.")


class BestCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/best.ckpt`, the weights with the best metric so far.

    Args:
        monitor: a logged metric, such as `val/mAP` or `val/AP50`.
        mode: `max` where more is better.
    """

    def __init__(self, monitor: str = "val/mAP", mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, the state to resume from.

    Args:
        every_n_epochs: how often it is written; 0 for never.
    """

    def __init__(self, every_n_epochs: int = 1, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            monitor=None,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class ConfigInCheckpoint(Callback):
    """Stores the run's `model` and `data` configuration in every checkpoint, so that one file is enough to predict."""

    def __init__(self, config: JSONDict) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration beside the class names."""
        checkpoint.setdefault(CHECKPOINT_KEY, {})["config"] = self.config


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project on the CPU, never running code from it.

    Raises:
        CheckpointError: the file is missing, torn, damaged, or not a checkpoint of this project; the message says
            which and what to do.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {what}.{_nearby(path)}")
    _check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
    schema = checkpoint[CHECKPOINT_KEY].get("schema")
    if schema != CHECKPOINT_SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema}; this version of onestage reads schema {CHECKPOINT_SCHEMA}.\n"
            "Use the version of onestage that wrote it (its number is in the run's results.json)."
        )
    return checkpoint


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
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged ({size:,} bytes; {_first_line(error)}).{_nearby(path)}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong.{_nearby(path)}")


def _nearby(path: Path) -> str:
    others = sorted(str(other) for other in path.parent.glob("*.ckpt") if other != path) if path.parent.is_dir() else []
    if others:
        return "\nOther checkpoints there: " + ", ".join(others[:5])
    return "\nTo make one: make train. To list those of finished runs: ls runs/*/*/checkpoints/"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_weights(module: DetectionModule, path: str | Path) -> None:
    """Put the weights of a checkpoint into the module.

    Raises:
        CheckpointError: the checkpoint is unreadable, or holds another detector, other classes or other shapes.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint[CHECKPOINT_KEY]
    current = {"detector": type(module.detector).__name__, "image_size": module.detector.image_size}
    for name, value in current.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"checkpoint {path} holds {name} {saved.get(name)}, the configuration {name} {value}.\n"
                "Leave out --config to use the checkpoint's own configuration, or name a checkpoint of this one."
            )
    num_saved = len(saved.get("class_names", []))
    if num_saved != module.detector.num_classes:
        raise CheckpointError(
            f"checkpoint {path} was trained on {num_saved} classes, the data has {module.detector.num_classes}.\n"
            f"Its classes: {', '.join(saved.get('class_names', []))}"
        )
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:6])
        raise CheckpointError(f"checkpoint {path} does not fit the configured detector:\n{lines}") from error


def config_of(path: str | Path) -> JSONDict:
    """Return the `model` and `data` configuration stored in a checkpoint, with its class names filled in.

    Raises:
        CheckpointError: the checkpoint is unreadable, or its configuration names a class that is not trusted.
    """
    saved = read_checkpoint(path)[CHECKPOINT_KEY]
    config: JSONDict = saved.get("config") or {}
    for class_path in _class_paths(config):
        if not class_path.startswith(TRUSTED_CLASS_PATHS):
            raise CheckpointError(
                f"the configuration inside checkpoint {path} names {class_path!r}, which is not a class of "
                f"{', '.join(prefix.rstrip('.') for prefix in TRUSTED_CLASS_PATHS)}.\n"
                "If you trust the file, give the run's own config.yaml with --config instead."
            )
    detector = config.get("model", {}).get("detector", {}).get("init_args", {})
    for source in ("backbone_weights", "pretrained"):  # the weights are in the checkpoint: nothing is to be fetched
        if source in detector:
            detector[source] = None
    if "data" in config:
        init_args = config["data"].setdefault("init_args", {})
        init_args["class_names"], init_args["category_ids"] = saved["class_names"], saved["category_ids"]
    return config


def _class_paths(node: object) -> Iterator[str]:
    """Every string that jsonargparse would take for a class or a function to import."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield str(node["class_path"])
        for value in node.values():
            yield from _class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_paths(value)
