"""The command `onestage export`: weights of a checkpoint for sharing, or the detector as an ONNX file."""

import json
from pathlib import Path
from typing import Literal

SHARED = ("schema", "detector", "image_size", "class_names", "category_ids", "score_threshold", "config", "versions")


def export(
    *, ckpt_path: Path, format: Literal["safetensors", "onnx"] = "safetensors", output: Path | None = None
) -> int:
    """Write the weights of a checkpoint for sharing, or its detector as an ONNX file.

    model.safetensors holds tensors only, nothing that could run; model.json describes the model. The commands validate,
    test and predict take model.safetensors as --ckpt_path. model.onnx holds the detector from uint8 images to boxes,
    scores and labels, NMS included, and is kept only if onnxruntime detects with it what torch detects.

    Args:
        ckpt_path: the checkpoint, runs/.../checkpoints/best.ckpt.
        format: of the file.
        output: folder for the files; default: export/ in the run's folder, or beside a checkpoint outside of a run.
    """
    beside = ckpt_path.absolute().parent
    folder = output or (beside.parent if beside.name == "checkpoints" else beside) / "export"
    if format == "onnx":
        from onestage.deploy.onnx_export import export_onnx  # seconds of imports
        from onestage.deploy.predictor import load

        for line in export_onnx(load(ckpt_path, device="cpu"), folder):
            print(f"exported: {line}")
        return 0
    from onestage.reliability.stored_config import foreign_classes  # seconds of imports

    reason = foreign_classes(ckpt_path)  # model.json carries the configuration, but not the user's own code
    print(f"exported: {export_safetensors(ckpt_path, folder)}")
    if reason is not None:
        print(f"Share the run's config.yaml and your code too; the configuration in model.json is not used: {reason}.")
    return 0


def export_safetensors(checkpoint: Path, folder: Path) -> Path:
    """Write model.safetensors and model.json; return the path of the former.

    What only training needs (optimizer, progress, raw weights beside an average) is not written. CheckpointError if
    the checkpoint cannot be read, or its configuration holds a non-finite number.
    """
    from safetensors.torch import save_file

    from onestage.errors import CheckpointError
    from onestage.files import atomic_write
    from onestage.reliability.checkpoints import read_checkpoint
    from onestage.reliability.stored_config import evaluation_part
    from onestage.training.module import CHECKPOINT_KEY

    content = read_checkpoint(checkpoint)
    ours = {key: value for key, value in content[CHECKPOINT_KEY].items() if key in SHARED}
    ours["config"] = evaluation_part(ours, checkpoint)  # without optimizer, augmentation and workers
    try:
        description = json.dumps({**ours, "global_step": content["global_step"]}, indent=2, allow_nan=False)
    except ValueError as error:
        problem = "its configuration holds NaN or an infinite number, which JSON cannot express"
        raise CheckpointError(f"checkpoint {checkpoint}: {problem}.\nTrain with a finite number.") from error
    weights = {name: value.contiguous().clone() for name, value in content["state_dict"].items()}
    target = folder / "model.safetensors"
    with atomic_write(target) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with atomic_write(target.with_suffix(".json")) as temporary:
        temporary.write_text(description, encoding="utf-8")
    return target
