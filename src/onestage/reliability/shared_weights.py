"""Reading of the weights that `onestage export` writes."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from onestage.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read model.safetensors and model.json: `state_dict`, and `onestage` with the rest.

    Raises:
        CheckpointError: one of the two files is missing, damaged or not written by `onestage export`.
    """
    description = path.with_suffix(".json")
    try:
        weights = load_file(path)
        ours = json.loads(description.read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} with {description.name} beside it cannot be read ({str(error)[:200]}).\n"
            "Both are written by: onestage export --ckpt_path runs/.../checkpoints/best.ckpt"
        ) from error
    if not isinstance(ours, dict) or not {"schema", "detector", "class_names", "category_ids"} <= ours.keys():
        raise CheckpointError(f"{description} was not written by `onestage export`: its keys are missing.")
    return {"state_dict": weights, "onestage": ours, "global_step": ours.get("global_step", 0)}
