"""COCO's twelve numbers, exact: each image once, in original pixels, whatever the number of processes.

Here detections are collected (one transfer per batch) and brought together (one exchange between processes at the
end); `average_precision.py` does the arithmetic.
"""

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from onestage.boxes.placement import to_original
from onestage.errors import ConfigError
from onestage.evaluation.voc import Backend, average_precision, choose_backend
from onestage.types import PADDING, AnnotationSet, Detections, JSONDict, Metrics

# COCO defines AP and AR100 on the 100 best detections of an image; pycocotools has that number built in.
COCO_MAX_DETECTIONS = 100

Rows = npt.NDArray[np.float32]  # [n, 6]: x1, y1, x2, y2, score, label


def in_original_pixels(detections: Detections, placements: Tensor, original_sizes: Tensor) -> Detections:
    """Return detections in network-input pixels with their boxes in original pixels; see `to_original`."""
    return detections._replace(boxes=to_original(detections.boxes, placements, original_sizes))


class CocoEvaluator:
    """Collects detections image by image and turns them into COCO's twelve numbers.

    Only images handed to `update` are evaluated, so a run limited to a few batches gets the numbers of those images.
    Objects with `is_crowd` are neither found nor missed, as COCO defines, and so are those with VOC's `is_difficult`,
    which VOC's own metric leaves out likewise (its matching rule differs a little, so do the numbers).

    Args:
        annotations: the ground truth; boxes in original pixels.
        max_detections: the best so many detections of an image count, 1..100.
        backend: `auto` takes faster_coco_eval where it is installed, else pycocotools.

    Raises:
        ConfigError: if max_detections is out of range or the backend is not installed.
    """

    def __init__(self, annotations: AnnotationSet, max_detections: int = 100, backend: Backend = "auto") -> None:
        if not 1 <= max_detections <= COCO_MAX_DETECTIONS:
            raise ConfigError(
                f"max_detections of the evaluation is {max_detections}; it must be 1..{COCO_MAX_DETECTIONS}, because "
                f"COCO's AP and AR100 are defined on the {COCO_MAX_DETECTIONS} best detections of an image."
            )
        self.annotations = annotations
        self.max_detections = max_detections
        self.backend = choose_backend(backend)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was collected."""
        self._rows_by_image: dict[int, Rows] = {}
        self._is_gathered = False
        self._numbers: tuple[Metrics, dict[str, float]] | None = None

    @property
    def num_images(self) -> int:
        """How many images were collected; of all processes once `compute` was called."""
        return len(self._rows_by_image)

    def update(self, image_indices: Tensor, detections: Detections) -> None:
        """Collect the detections of a batch. No process waits for another here.

        An image that comes a second time, as a sampler that fills up the last batch makes it, is left as it is.

        Args:
            image_indices: [B] int64, rows of the AnnotationSet.
            detections: boxes [B, D, 4] xyxy in ORIGINAL pixels, scores [B, D], labels [B, D]; rows with label PADDING
                are no detections. Rows with a number that is not finite are left out with a warning.

        Raises:
            ValueError: if an index or a label is out of range.
        """
        if self._is_gathered:
            raise RuntimeError("this evaluation is complete; call reset() before the next update()")
        boxes, scores, labels = (tensor.detach().float() for tensor in detections)
        packed = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1).flatten(1)
        # One transfer for the whole batch: a number that crosses by itself costs the device a stop.
        # Indices and labels are exact in float32 up to 2^24.
        packed = torch.cat([packed, image_indices.to(packed)[:, None]], dim=1).cpu()
        for index, rows in zip(packed[:, -1].int().tolist(), packed[:, :-1].numpy(), strict=True):
            if not 0 <= index < len(self.annotations):
                raise ValueError(f"image index {index} is not in 0..{len(self.annotations) - 1}")
            if index not in self._rows_by_image:
                self._rows_by_image[index] = self._best(rows.reshape(-1, 6), index)

    def compute(self) -> Metrics:
        """Return the twelve numbers, 0..1, NaN where the evaluated images hold no object to find.

        Called the first time after an update it is collective: every process must call it. The detections travel
        once, the first process evaluates, and all get the same numbers. Were every process to evaluate, they would
        only compete for the cores and the memory of the machine.
        """
        return dict(self._compute()[0])

    def per_class(self) -> dict[str, float]:
        """Return the AP (IoU 0.50:0.95) of each class by name, NaN where there is no object; see `compute`."""
        return dict(self._compute()[1])

    def results(self) -> list[JSONDict]:
        """Return COCO result records with the data set's own image and category ids, boxes as xywh in pixels.

        Collective as `compute` is, unless `compute` was called before.
        """
        self._gather()
        records = []
        for index, rows in self._rows_by_image.items():
            image_id = int(self.annotations.image_ids[index])
            file_name = Path(str(self.annotations.image_paths[index])).name
            for x1, y1, x2, y2, score, label in rows.tolist():
                records.append(
                    {
                        "image_id": image_id,
                        "file_name": file_name,  # not COCO's, whose readers pass it over; ids of a folder mean nothing
                        "category_id": int(self.annotations.category_ids[int(label)]),
                        "bbox": [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)],
                        "score": round(score, 5),
                    }
                )
        return records

    def _best(self, rows: Rows, index: int) -> Rows:
        rows = rows[rows[:, 5] != PADDING]
        is_finite = np.isfinite(rows).all(axis=1)
        if not is_finite.all():
            # pycocotools would take a NaN score for the best of all.
            count = int((~is_finite).sum())
            warnings.warn(
                f"{count} detections of {self.annotations.image_paths[index]} have a box or score that is not finite; "
                "they are left out of the evaluation. Has the training diverged?",
                stacklevel=3,
            )
            rows = rows[is_finite]
        num_classes = len(self.annotations.class_names)
        if not np.isin(rows[:, 5], np.arange(num_classes)).all():
            raise ValueError(f"detections of image {index} have labels outside 0..{num_classes - 1}: {rows[:, 5]}")
        order = np.argsort(-rows[:, 4], kind="stable")  # stable, so that ties do not depend on the batch
        return rows[order[: self.max_detections]]

    def _gather(self) -> None:
        """Give every process the detections of all, each image once, in the order of the AnnotationSet."""
        if self._is_gathered:
            return
        if _num_processes() > 1:
            indices = np.array(list(self._rows_by_image), dtype=np.int64)
            lengths = np.array([len(rows) for rows in self._rows_by_image.values()], dtype=np.int64)
            parts: list[Any] = [None] * _num_processes()
            # Plain arrays in one message: torchmetrics' own exchange sends tensor by tensor and needs equal counts.
            dist.all_gather_object(parts, (indices, lengths, _concatenate(list(self._rows_by_image.values()))))
            self._rows_by_image = {}
            for indices, lengths, rows in parts:
                ends = np.cumsum(lengths)
                for index, start, end in zip(indices.tolist(), ends - lengths, ends, strict=True):
                    self._rows_by_image.setdefault(index, rows[start:end])
        self._rows_by_image = dict(sorted(self._rows_by_image.items()))
        self._is_gathered = True

    def _compute(self) -> tuple[Metrics, dict[str, float]]:
        if self._numbers is None:
            self._gather()
            numbers: list[Any] = [None]
            if _num_processes() == 1 or dist.get_rank() == 0:
                numbers = [self._evaluate()]
            if _num_processes() > 1:
                dist.broadcast_object_list(numbers, src=0)
            self._numbers = cast(tuple[Metrics, dict[str, float]], numbers[0])
        return self._numbers

    def _evaluate(self) -> tuple[Metrics, dict[str, float]]:
        """Return the twelve numbers and the AP of each class, from one evaluation."""
        predictions = [_prediction(rows) for rows in self._rows_by_image.values()]
        targets = [self._target(index) for index in self._rows_by_image]
        metrics, by_label = average_precision(predictions, targets, self.backend)
        names = self.annotations.class_names
        return metrics, {name: by_label.get(label, float("nan")) for label, name in enumerate(names)}

    def _target(self, index: int) -> dict[str, Tensor]:
        objects = self.annotations.objects(index)
        is_left_out = self.annotations.is_crowd[objects] | self.annotations.is_difficult[objects]
        return {
            "boxes": torch.from_numpy(np.ascontiguousarray(self.annotations.boxes[objects], dtype=np.float32)),
            "labels": torch.from_numpy(self.annotations.labels[objects].astype(np.int64)),
            "area": torch.from_numpy(self.annotations.areas[objects].astype(np.float32)),
            "iscrowd": torch.from_numpy(is_left_out.astype(np.int64)),
        }


def _prediction(rows: Rows) -> dict[str, Tensor]:
    return {
        "boxes": torch.from_numpy(np.ascontiguousarray(rows[:, :4])),
        "scores": torch.from_numpy(np.ascontiguousarray(rows[:, 4])),
        "labels": torch.from_numpy(rows[:, 5].astype(np.int64)),
    }


def _concatenate(parts: list[Rows]) -> Rows:
    return np.concatenate(parts) if parts else np.zeros((0, 6), np.float32)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
