"""Detectors as ONNX files, compared with the torch model before they are kept."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onestage.boxes import nms
from onestage.boxes.nms import survives
from onestage.data.scenes import draw_scene
from onestage.deploy.predictor import Predictor
from onestage.errors import ConfigError, missing_package
from onestage.files import atomic_write
from onestage.types import PADDING, Detections

SCORE_TOLERANCE, BOX_TOLERANCE = 1e-3, 0.1  # px; float32 sums in another order differ by a hundredth of this
MAX_LOST = 0.01  # share of the detections: an overlap that equals the threshold falls to either side of it
NUM_IMAGES = 3  # that are compared: one alone, then the others together
REMEDY = "Nothing was written. Newer packages may help: pip install --upgrade onnxscript onnxruntime"

Arrays = list[npt.NDArray[Any]]  # boxes [B, D, 4], scores [B, D], labels [B, D]


def export_onnx(model: Predictor, folder: Path) -> list[str]:
    """Write model.onnx, or model_<height>x<width>.onnx for each of several canvases; return a line about each.

    Input: images [B, 3, H, W] uint8 RGB, resized to the canvas; any B. Outputs: boxes [B, D, 4] float32 xyxy in pixels
    of the canvas, scores [B, D], labels [B, D] int64, best first, padded with label -1. The metadata of the file
    describe classes, canvas, resize and score threshold as JSON. ConfigError if a package is missing, the detector
    cannot be expressed, or onnxruntime's detections differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 # the exporter needs it
    except ModuleNotFoundError as error:
        raise missing_package("export --format onnx", "onestage[export]") from error
    lines, canvases = [], model.data.resize.canvases
    for height, width in canvases:
        scenes = (draw_scene(seed=0, index=index).image for index in range(NUM_IMAGES))
        pixels = np.stack([model.data.resize.apply(scene, (height, width)) for scene in scenes])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        program = _program(model, images)
        name = "model.onnx" if len(canvases) == 1 else f"model_{height}x{width}.onnx"
        with atomic_write(folder / name) as temporary, torch.inference_mode():
            program.save(temporary)
            expected = [part.numpy() for part in model.module(images)]
            try:
                session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
                found = [session.run(None, {"images": part.numpy()}) for part in (images[:1], images[1:])]
            except Exception as error:  # its own kinds have no common parent
                raise ConfigError(f"export: onnxruntime cannot run the model: {error}\n{REMEDY}") from error
            line = compare([np.concatenate(parts) for parts in zip(*found, strict=True)], expected)
        lines.append(f"{folder / name}\n{line}")
    return lines


def compare(found: Arrays, expected: Arrays) -> str:
    """Return a line about the differences of two lists of detections; their order may differ.

    ConfigError if more than `MAX_LOST` of the detections of either have no counterpart in the other.
    """
    lost, total, score, box = 0, 0, 0.0, 0.0
    for mine, other in ((found, expected), (expected, found)):
        for boxes, scores, labels, *others in zip(*mine, *other, strict=True):
            kept = labels != PADDING
            differences = np.abs(boxes[kept, None] - others[0]).max(-1), np.abs(scores[kept, None] - others[1])
            is_same = (differences[0] <= BOX_TOLERANCE) & (differences[1] <= SCORE_TOLERANCE)
            is_same &= labels[kept, None] == others[2]
            lost, total = lost + int((~is_same.any(1)).sum()), total + int(kept.sum())
            nearest = [np.where(is_same, difference, np.inf).min(1)[is_same.any(1)] for difference in differences]
            box, score = max(box, nearest[0].max(initial=0)), max(score, nearest[1].max(initial=0))
    if lost > MAX_LOST * total:
        problem = f"onnxruntime's detections differ from torch's: {lost} of {total} have no counterpart within"
        chance = "Nearly equal scores, as of a hardly trained model, are ordered by rounding."
        raise ConfigError(f"export: {problem} {SCORE_TOLERANCE:g} and {BOX_TOLERANCE:g} px. {chance}\n{REMEDY}")
    summary = f"largest difference: {score:.1g} of a score, {box:.1g} px of a box" if total else "nothing was detected"
    return f"compared with torch: {total // 2} detections on {NUM_IMAGES} drawn images; {summary}"


def _program(model: Predictor, images: Tensor) -> Any:
    """Return the ONNX program of a model with its metadata."""
    try:
        with torch.no_grad(), _exportable_suppression() as translations:
            program: Any = torch.onnx.export(
                model.module, (images,), dynamo=True, verbose=False, external_data=False,
                input_names=["images"], output_names=list(Detections._fields), dynamic_shapes=({0: "batch"},),
                custom_translation_table=translations,
            )  # fmt: skip
    except Exception as error:  # of many kinds, and long
        cause, name = str(error.__cause__ or error).strip().partition("\n")[0], type(model.module.detector).__name__
        raise ConfigError(f"export: ONNX cannot express {name}: {cause}\n{REMEDY}") from error
    resize = model.data.resize
    described = {
        "class_names": model.class_names,
        "category_ids": model.category_ids,
        "canvas": list(images.shape[2:]),
        "resize": {"name": type(resize).__name__, **vars(resize)},
        "score_threshold": model.score_threshold,
    }
    program.model.metadata_props.update({key: json.dumps(value, default=str) for key, value in described.items()})
    return program


_survives = torch.library.custom_op("onestage::survives", survives, mutates_args=())
_survives.register_fake(lambda boxes, labels, is_candidate, iou_threshold: torch.empty_like(is_candidate))


@contextmanager
def _exportable_suppression() -> Iterator[dict[Any, Any]]:
    """Make suppression one operator for all images and classes; yield the translations of what ONNX lacks.

    torchvision's nms takes one set of boxes, for which `survives` moves every class to a place of its own: ONNX's
    NonMaxSuppression takes images and classes, but no float64, which distant places need.
    """
    from onnxscript import FLOAT, INT64, opset18 as op

    def suppress(boxes: FLOAT, labels: INT64, is_candidate: Any, iou_threshold: float) -> Any:
        count = op.Shape(labels, start=1, end=2)
        ranks = op.Range(op.Cast(op.Squeeze(count), to=1), 0.0, -1.0)  # scores that fall with the rank, >= 1
        classes = op.Range(0, op.ReduceMax(labels, keepdims=0) + 1, 1)
        is_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(classes, [0, 2]))  # [B, K, N]
        scores = op.Where(op.And(is_class, op.Unsqueeze(is_candidate, [1])), ranks, 0.0)
        kept = op.NonMaxSuppression(boxes, scores, count, [iou_threshold], [0.5])  # rows of image, class, box
        places = op.Gather(kept, [0, 2], axis=1)
        nothing = op.Expand(False, op.Shape(labels))
        return op.ScatterND(nothing, places, op.Expand(True, op.Shape(kept, start=0, end=1)))

    def sort(values: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
        axis = dim % len(values.shape)
        count = op.Shape(values, start=axis, end=axis + 1)  # TopK leaves equal values in their order
        return op.TopK(values, count, axis=axis, largest=descending, sorted=True)

    def searchsorted(rows: INT64, values: INT64) -> Any:
        is_lower = op.Less(op.Unsqueeze(rows, [1]), op.Unsqueeze(values, [2]))
        return op.ReduceSum(op.Cast(is_lower, to=7), [2], keepdims=0)

    aten, own = torch.ops.aten, torch.ops.onestage
    nms.survives = _survives
    try:
        yield {own.survives.default: suppress, aten.sort.stable: sort, aten.searchsorted.Tensor: searchsorted}
    finally:
        nms.survives = survives
