"""COCO's twelve metrics, exact for any number of processes."""

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from onestage.types import PADDING, AnnotationSet, Detections, JSONDict, Metrics

Rows = npt.NDArray[np.float32]  # [n, 6]: x1, y1, x2, y2, score, label

PACKAGE: Final = "faster_coco_eval"  # returns pycocotools' values to the last bit in a fifth of the time
MAX_DETECTIONS = 100  # COCO defines AP and AR100 on it; pycocotools has the number built in

# torchmetrics' name of each metric, in COCO's order.
TORCHMETRICS_NAMES = {
    **{"mAP": "map", "AP50": "map_50", "AP75": "map_75"},
    **{f"mAP_{size}": f"map_{size}" for size in ("small", "medium", "large")},
    **{f"AR{limit}": f"mar_{limit}" for limit in (1, 10, 100)},
    **{f"AR_{size}": f"mar_{size}" for size in ("small", "medium", "large")},
}
METRIC_NAMES = tuple(TORCHMETRICS_NAMES)

# torchmetrics' default is a float32 linspace, where 0.01 is 0.009999999776: recall bins shift at ties, and AP is wrong
# by up to 1.3e-4.
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()


class CocoEvaluator:
    """Collect detections image by image and compute COCO's twelve metrics from them.

    Only images passed to `update` are evaluated, so a run limited to a few batches gets the metrics of those images.
    Objects with `is_crowd` are neither found nor missed, as COCO defines, and neither are those with VOC's
    `is_difficult`, which VOC's own metric also ignores (its matching rule differs slightly, and so do the values).

    annotations: the ground truth; boxes in original pixels.
    """

    def __init__(self, annotations: AnnotationSet) -> None:
        self.annotations = annotations
        self._rows_by_image: dict[int, Rows] = {}
        self._is_gathered = False
        self._results: tuple[Metrics, Metrics] | None = None

    @property
    def num_images(self) -> int:
        """Number of collected images; of all processes once `compute` was called."""
        return len(self._rows_by_image)

    def update(self, image_indices: Tensor, detections: Detections) -> None:
        """Collect the detections of a batch, without communication between processes.

        An image that comes a second time, from a sampler that pads the last batch, is ignored.

        Args:
            image_indices: [B] int64, rows of the AnnotationSet.
            detections: boxes [B, D, 4] xyxy in ORIGINAL pixels, scores [B, D], labels [B, D]; rows with label PADDING
                are no detections. Rows with a non-finite number are dropped with a warning.
        """
        assert not self._is_gathered, "an evaluation takes no images after its first result"
        boxes, scores, labels = (tensor.detach().float() for tensor in detections)
        packed = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1).flatten(1)
        # One transfer for the whole batch. Indices and labels are exact in float32 up to 2^24.
        packed = torch.cat([packed, image_indices.to(packed)[:, None]], dim=1).cpu()
        for index, rows in zip(packed[:, -1].int().tolist(), packed[:, :-1].numpy(), strict=True):
            if index not in self._rows_by_image:
                self._rows_by_image[index] = self._best(rows.reshape(-1, 6), index)

    def compute(self) -> Metrics:
        """Return the twelve metrics, in [0, 1], NaN where the evaluated images have no object to find.

        The first call after an update is collective: every process must call it. The detections are exchanged once,
        the first process evaluates, and all processes receive its result.
        """
        return dict(self._compute()[0])

    def per_class(self) -> Metrics:
        """Return the AP (IoU 0.50:0.95) of each class by name, NaN where there is no object; see `compute`."""
        return dict(self._compute()[1])

    def results(self) -> list[JSONDict]:
        """Return COCO result records (own ids, boxes as xywh in original pixels). Collective like `compute`."""
        self._gather()
        annotations = self.annotations
        return [
            # The name, because the ids of a plain folder mean nothing.
            coco_record(
                int(annotations.image_ids[index]),
                annotations.category_ids[int(label)],
                box,
                score,
                file_name=Path(str(annotations.image_paths[index])).name,
            )
            for index, rows in self._rows_by_image.items()
            for *box, score, label in rows.tolist()
        ]

    def _best(self, rows: Rows, index: int) -> Rows:
        rows = rows[rows[:, 5] != PADDING]
        is_finite = np.isfinite(rows).all(axis=1)
        if not is_finite.all():  # pycocotools would rank a NaN score first
            count, name = int((~is_finite).sum()), self.annotations.image_paths[index]
            problem = f"{count} detections of {name} have a non-finite box or score; the evaluation drops them."
            warnings.warn(f"{problem} Has the training diverged?", stacklevel=3)
            rows = rows[is_finite]
        order = np.argsort(-rows[:, 4], kind="stable")  # stable, so that ties do not depend on the batch
        return rows[order[:MAX_DETECTIONS]]

    def _gather(self) -> None:
        """Give every process the detections of all, each image once, in the order of the AnnotationSet."""
        if not self._is_gathered and _num_processes() > 1:
            parts: list[Any] = [None] * _num_processes()
            # One message: torchmetrics' own exchange sends tensor by tensor and needs equal counts.
            dist.all_gather_object(parts, self._rows_by_image)
            self._rows_by_image = {index: rows for part in reversed(parts) for index, rows in part.items()}
        self._rows_by_image = dict(sorted(self._rows_by_image.items()))
        self._is_gathered = True

    def _compute(self) -> tuple[Metrics, Metrics]:
        """Return the twelve metrics and the AP of each class."""
        if self._results is None:
            self._gather()
            results = [self._evaluate() if _num_processes() == 1 or dist.get_rank() == 0 else None]
            if _num_processes() > 1:
                dist.broadcast_object_list(results, src=0)
            self._results = cast(tuple[Metrics, Metrics], results[0])
        return self._results

    def _evaluate(self) -> tuple[Metrics, Metrics]:
        predictions = []
        for rows in self._rows_by_image.values():
            boxes, scores, labels = torch.from_numpy(rows).split([4, 1, 1], dim=1)  # type: ignore[no-untyped-call]
            predictions.append({"boxes": boxes, "scores": scores.flatten(), "labels": labels.flatten().long()})
        targets = [self._target(index) for index in self._rows_by_image]
        metrics, by_label = average_precision(predictions, targets)
        names = self.annotations.class_names
        return metrics, {name: by_label.get(label, float("nan")) for label, name in enumerate(names)}

    def _target(self, index: int) -> dict[str, Tensor]:
        annotations, rows = self.annotations, self.annotations.objects(index)
        is_ignored = annotations.is_crowd[rows] | annotations.is_difficult[rows]
        return {
            "boxes": torch.tensor(annotations.boxes[rows], dtype=torch.float32),
            "labels": torch.tensor(annotations.labels[rows], dtype=torch.int64),
            "area": torch.tensor(annotations.areas[rows], dtype=torch.float32),
            "iscrowd": torch.tensor(is_ignored, dtype=torch.int64),
        }


def coco_record(image_id: int, category_id: int, box: Sequence[float], score: float, **more: Any) -> JSONDict:
    """Return one COCO result record. box: xyxy, px. more: keys that COCO does not define; its readers ignore them."""
    x1, y1, x2, y2 = box
    bbox = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
    return {"image_id": image_id, **more, "category_id": int(category_id), "bbox": bbox, "score": round(score, 5)}


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_precision(
    predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]
) -> tuple[Metrics, dict[int, float]]:
    """Evaluate lists with one entry per image.

    Args:
        predictions: boxes [D, 4] xyxy px, scores [D], labels [D], on the CPU: torchmetrics reads number by number.
        targets: boxes [M, 4], labels [M], area [M] (px^2) and iscrowd [M], 0 or 1.

    Returns:
        The twelve metrics by name, in [0, 1], and the AP (IoU 0.50:0.95, all areas) of each label that occurs on
        either side. NaN where there is no object to find.
    """
    if not any(len(target["labels"]) for target in targets):
        return dict.fromkeys(METRIC_NAMES, float("nan")), {}
    metric = MeanAveragePrecision(
        backend=PACKAGE,
        rec_thresholds=RECALL_THRESHOLDS,
        extended_summary=True,  # the precision table; `class_metrics` would evaluate a second time
        sync_on_compute=False,  # the lists are complete, and other processes may not be evaluating
    )
    metric.update(predictions, targets)
    was_enabled = gc.isenabled()
    gc.disable()  # COCO's format is a dict per box: collecting what is still in use is a quarter of the time
    try:
        values = metric.compute()
    finally:
        if was_enabled:
            gc.enable()
    metrics = {name: float(values[key]) for name, key in TORCHMETRICS_NAMES.items()}
    # [IoU threshold, recall, class, area range, detection limit], -1 where undefined; all areas, 100 detections.
    precision = torch.as_tensor(values["precision"])[:, :, :, 0, -1].flatten(0, 1)
    by_class = torch.where(precision > -1, precision, torch.nan).nanmean(dim=0).tolist()
    by_label = dict(zip(values["classes"].reshape(-1).tolist(), by_class, strict=True))
    return {name: value if value >= 0 else float("nan") for name, value in metrics.items()}, by_label
