"""Weights to share: model.safetensors, numbers and nothing that could run, and model.json, which says whose."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from safetensors.torch import save_file

from onestage.errors import CheckpointError, ConfigError
from onestage.files import atomic_write
from onestage.reliability.checkpoint_files import needs_config, read_checkpoint
from onestage.training.module import CHECKPOINT_KEY

FORMATS = ("safetensors",)
SHARED = ("schema", "detector", "image_size", "class_names", "category_ids", "config", "versions")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (all keys: onestage export --help)")


def run_export_command(words: Sequence[str]) -> None:
    """Write the weights of a checkpoint in another format and say where they are.

    Raises:
        ConfigError: an option is unknown or missing.
        CheckpointError: the checkpoint cannot be read.
        ResourceError: the files cannot be written.
    """
    parser = _Parser(prog="onestage export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, help="the checkpoint, runs/.../checkpoints/best.ckpt")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="of the weights")
    parser.add_argument(
        "--output", type=Path, help="folder for the two files; default: export/ of the run or beside the file"
    )
    given = parser.parse_args(list(words))
    checkpoint = Path(given.ckpt_path)
    reason = needs_config(checkpoint)  # whoever gets the files has nothing but the configuration in them
    print(f"exported: {export_safetensors(checkpoint, given.output or _default_folder(checkpoint))}")
    if reason is not None:
        print(f"Share the run's config.yaml and the code as well: it is not read by itself, as {reason}.")


def _default_folder(checkpoint: Path) -> Path:
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "export"  # of the run, where it lies in one


def export_safetensors(checkpoint: Path, folder: Path) -> Path:
    """Write model.safetensors and model.json of a checkpoint into a folder; return the former.

    What is needed to go on training (optimizer, progress, raw weights beside an average) is left out. `validate`,
    `test` and `predict` take the file as a `--ckpt_path`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ResourceError: the files cannot be written.
    """
    content = read_checkpoint(checkpoint)
    ours = {key: value for key, value in content[CHECKPOINT_KEY].items() if key in SHARED}
    try:
        description = json.dumps({**ours, "global_step": content["global_step"]}, indent=2, allow_nan=False)
    except ValueError as error:
        raise CheckpointError(
            f"the configuration inside checkpoint {checkpoint} has an infinite number or NaN, for which JSON has no "
            "word.\nTrain with a finite one."
        ) from error
    weights = {name: value.contiguous().clone() for name, value in content["state_dict"].items()}
    target = folder / "model.safetensors"
    with atomic_write(target) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with atomic_write(target.with_suffix(".json")) as temporary:
        temporary.write_text(description)
    return target
