"""COCO's twelve metrics, exact for any number of processes."""

import gc
import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from onestage.evaluation.analysis import MAX_DETECTIONS, RECALLS, Analysis, Found, Objects, analyse
from onestage.types import PADDING, AnnotationSet, Detections, JSONDict, Metrics

Package = Literal["hotcoco", "faster_coco_eval", "pycocotools"]
Backend = Literal["auto", Package]
BACKENDS: tuple[Package, ...] = get_args(Package)  # the fastest first
Table = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]  # [n, 6]: x1, y1, x2, y2, score, label

SIZES = ("small", "medium", "large")
METRIC_NAMES = (
    *("mAP", "AP50", "AP75", *(f"mAP_{size}" for size in SIZES)),
    *("AR1", "AR10", "AR100", *(f"AR_{size}" for size in SIZES)),
)

_hotcoco_processes = set[int]()  # that have started hotcoco's threads, or were forked from one of them


class Evaluation(NamedTuple):
    """The result of an evaluation, the same in all processes."""

    metrics: Metrics  # the twelve of METRIC_NAMES, in [0, 1], NaN where there is no object to find
    per_class: Metrics  # AP (IoU 0.50:0.95) of each class by name, NaN where there is no object
    analysis: Analysis


class CocoEvaluator:
    """Collect detections image by image and compute COCO's twelve metrics from them.

    Only images passed to `update` are evaluated, so a run limited to a few batches gets the metrics of those images.
    Objects with `is_crowd` are neither found nor missed, as COCO defines, and neither are those with VOC's
    `is_difficult`, which VOC's own metric also ignores (its matching rule differs slightly, and so do the values).

    Args:
        annotations: the ground truth; boxes in original pixels.
        backend: the package that computes the metrics; auto: the fastest that is installed. All give equal numbers.
    """

    def __init__(self, annotations: AnnotationSet, backend: Backend = "auto") -> None:
        self.annotations, self.backend = annotations, backend
        self._rows_by_image: dict[int, Rows] = {}
        self.unreadable: dict[int, str] = {}  # reason by row; of all processes after `evaluation` or `results`
        self._is_gathered = False
        self._results: Evaluation | None = None

    @property
    def image_rows(self) -> npt.NDArray[np.int64]:
        """Rows of the AnnotationSet that were collected, [N]; those of all processes once `evaluation` was called."""
        return np.array(list(self._rows_by_image), dtype=np.int64)

    def update(self, image_indices: Tensor, detections: Detections) -> None:
        """Collect the detections of a batch, in ORIGINAL pixels, without communication between processes.

        An image that comes a second time, from a sampler that pads the last batch, is ignored. Rows with a non-finite
        number are dropped with a warning. image_indices: [B] int64, rows of the AnnotationSet.
        """
        assert not self._is_gathered, "an evaluation takes no images after its first result"
        boxes, scores, labels = (tensor.detach().float() for tensor in detections)
        packed = torch.cat([boxes, scores[..., None], labels[..., None]], dim=-1).cpu().numpy()
        for index, rows in zip(image_indices.tolist(), packed, strict=True):
            if index not in self._rows_by_image:
                self._rows_by_image[index] = self._sorted(rows, index)

    def evaluation(self) -> Evaluation:
        """Return everything. The first call is collective: every process must make it.

        The detections are exchanged once, the first process evaluates, and all processes receive its result.
        """
        if self._results is None:
            self._gather()
            results = [self._evaluate() if _num_processes() == 1 or dist.get_rank() == 0 else None]
            if _num_processes() > 1:
                dist.broadcast_object_list(results, src=0)
            self._results = cast(Evaluation, results[0])
        return self._results

    def images(self, root: Path) -> list[JSONDict]:
        """Return id, file name and number of detections, or the error, of every image. Collective like `evaluation`."""
        self._gather()
        outcomes: dict[int, JSONDict] = {i: {"detections": len(rows)} for i, rows in self._rows_by_image.items()}
        outcomes |= {i: {"error": reason.partition("\n")[0]} for i, reason in self.unreadable.items()}
        ids = self.annotations.image_ids
        return [{"id": int(ids[i]), "file_name": self._name(i, root), **outcomes[i]} for i in sorted(outcomes)]

    def results(self, root: Path) -> list[JSONDict]:
        """Return COCO result records (own ids, boxes as xywh in original pixels). Collective like `evaluation`.

        root: folder that the names of the images are relative to; an image elsewhere keeps its whole path.
        """
        self._gather()
        annotations = self.annotations
        records = []
        for index, rows in self._rows_by_image.items():
            image_id, name = int(annotations.image_ids[index]), self._name(index, root)
            for *box, score, label in rows.tolist():  # the name, because the ids of a plain folder mean nothing
                records.append(coco_record(image_id, annotations.category_ids[int(label)], box, score, file_name=name))
        return records

    def _name(self, index: int, root: Path) -> str:
        path, folder = Path(str(self.annotations.image_paths[index])).absolute(), root.absolute()
        return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()

    def _sorted(self, rows: Rows, index: int) -> Rows:
        rows = rows[rows[:, 5] != PADDING]
        is_finite = np.isfinite(rows).all(axis=1)
        if not is_finite.all():  # pycocotools would rank a NaN score first
            count, name = int((~is_finite).sum()), self.annotations.image_paths[index]
            problem = f"{count} detections of {name} have a non-finite box or score; the evaluation drops them."
            warnings.warn(f"{problem} Has the training diverged?", stacklevel=3)
            rows = rows[is_finite]
        order = np.argsort(-rows[:, 4], kind="stable")  # stable, so that ties do not depend on the batch
        return rows[order]

    def _gather(self) -> None:
        """Give every process the detections of all, each image once, in the order of the AnnotationSet."""
        if not self._is_gathered and _num_processes() > 1:
            parts: list[Any] = [None] * _num_processes()
            # One message: torchmetrics' own exchange sends tensor by tensor and needs equal counts.
            dist.all_gather_object(parts, (self._rows_by_image, self.unreadable))
            self._rows_by_image = {index: rows for part, _ in reversed(parts) for index, rows in part.items()}
            self.unreadable = {index: reason for _, part in parts for index, reason in part.items()}
        self._rows_by_image = dict(sorted(self._rows_by_image.items()))
        self._is_gathered = True

    def _evaluate(self) -> Evaluation:
        counts = np.diff(self.annotations.box_offsets)[self.image_rows]
        if num_crowded := int(np.count_nonzero(counts > MAX_DETECTIONS)):
            warnings.warn(
                f"{num_crowded} of {len(counts)} images have more than {MAX_DETECTIONS} objects, up to {counts.max()}: "
                f"COCO's metrics count {MAX_DETECTIONS} detections of an image, so some cannot be found.",
                stacklevel=1,
            )
        found, objects = self.detections(), self.objects()
        names = self.annotations.class_names
        precision, recall = precision_recall_tables(found, objects, len(self.image_rows), len(names), self.backend)
        by_class = [_mean(precision[:, :, label, 0, -1]) for label in range(len(names))]
        per_class = dict(zip(names, by_class, strict=True))
        return Evaluation(twelve_metrics(precision, recall), per_class, analyse(found, objects, len(names)))

    def detections(self) -> Found:
        """Return the best hundred detections of each collected image, sorted by score."""
        rows = [rows[:MAX_DETECTIONS] for rows in self._rows_by_image.values()]
        table = np.concatenate([np.zeros((0, 6), np.float32), *rows])
        images = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        order = np.argsort(-table[:, 4], kind="stable")  # as COCOeval orders equal scores
        table = table[order]
        return Found(images[order], table[:, :4], table[:, 4], table[:, 5].astype(np.int64))

    def objects(self) -> Objects:
        """Return the objects of the collected images."""
        annotations, evaluated = self.annotations, self.image_rows
        counts = np.diff(annotations.box_offsets)
        rows = np.isin(annotations.image_rows, evaluated)
        images = np.repeat(np.arange(len(evaluated)), counts[evaluated])
        is_ignored = (annotations.is_crowd | annotations.is_difficult)[rows]
        return Objects(images, annotations.boxes[rows], annotations.labels[rows], annotations.areas[rows], is_ignored)


def choose_backend(backend: Backend = "auto") -> Package:
    """Return the package to use; auto: the first of BACKENDS that is installed.

    Not hotcoco in a process that was forked after an evaluation: it would wait for ever for the threads of its parent.
    """
    if backend == "faster_coco_eval" or backend == "pycocotools":
        return backend
    is_forked = bool(_hotcoco_processes - {os.getpid()})
    return next(name for name in BACKENDS[is_forked:] if backend == name or find_spec(name))


def precision_recall_tables(
    found: Found, objects: Objects, num_images: int, num_classes: int, backend: Backend = "auto"
) -> tuple[Table, Table]:
    """Return COCOeval's precision [10 IoUs, 101 recalls, K, 4 areas, 3 limits] and recall [10, K, 4, 3].

    In [0, 1], -1 where there is no object. Areas: all, small, medium, large; limits: 1, 10, 100 detections per image.
    Metrics are computed by torchmetrics' MeanAveragePrecision, except with hotcoco, which torchmetrics does not know
    and which reads arrays: the dictionary for each box that torchmetrics makes takes longer than the evaluation.
    """
    precision, recall = np.full((10, 101, num_classes, 4, 3), -1.0), np.full((10, num_classes, 4, 3), -1.0)
    if not len(objects.labels):
        return precision, recall
    package = choose_backend(backend)
    if package == "hotcoco":
        return _with_hotcoco(found, objects, num_images, num_classes)
    classes, precision_found, recall_found = _with_torchmetrics(found, objects, num_images, package)
    precision[:, :, classes], recall[:, classes] = precision_found, recall_found
    return precision, recall


def _with_hotcoco(found: Found, objects: Objects, num_images: int, num_classes: int) -> tuple[Table, Table]:
    from hotcoco import COCO, COCOeval

    _hotcoco_processes.add(os.getpid())
    images = [{"id": image} for image in range(num_images)]
    categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
    boxes = _xywh(objects.boxes)
    areas = np.where(objects.areas > 0, objects.areas, boxes[:, 2] * boxes[:, 3])  # as torchmetrics
    truth = COCO.from_arrays(
        images, categories, objects.images, objects.labels, boxes,
        area=areas.astype(np.float64), iscrowd=objects.is_ignored.astype(np.int64),
    )  # fmt: skip
    rows = np.column_stack([found.images, _xywh(found.boxes), found.scores, found.labels]).astype(np.float64)
    evaluation = COCOeval(truth, truth.load_res(rows), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    tables = evaluation.eval
    assert tables is not None  # after accumulate
    return np.asarray(tables["precision"]), np.asarray(tables["recall"])


def _xywh(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


def _with_torchmetrics(
    found: Found, objects: Objects, num_images: int, backend: Literal["faster_coco_eval", "pycocotools"]
) -> tuple[list[int], Table, Table]:
    """Return the classes that occur on either side, and their tables."""
    metric = MeanAveragePrecision(
        backend=backend,
        # The defaults are float32: ties shift recall bins and IoUs, and AP is wrong by 1.3e-4 and more.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=RECALLS["COCO"].tolist(),
        extended_summary=True,  # the tables
        sync_on_compute=False,  # the detections are complete, and other processes may not be evaluating
    )
    boxes, scores, labels = _by_image(found.images, num_images, (found.boxes, found.scores, found.labels))
    gt_columns = (objects.boxes, objects.labels, objects.areas, objects.is_ignored.astype(np.int64))
    gt_boxes, gt_labels, areas, crowds = _by_image(objects.images, num_images, gt_columns)
    metric.update(
        [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(boxes, scores, labels, strict=True)],
        [
            {"boxes": b, "labels": n, "area": a, "iscrowd": c}
            for b, n, a, c in zip(gt_boxes, gt_labels, areas, crowds, strict=True)
        ],
    )
    was_enabled = gc.isenabled()
    gc.disable()  # COCO's format is a dict per box: collecting what is still in use is a quarter of the time
    try:
        values = metric.compute()
    finally:
        if was_enabled:
            gc.enable()
    tables = (torch.as_tensor(values[name]).double().numpy() for name in ("precision", "recall"))
    return values["classes"].reshape(-1).tolist(), *tables


def _by_image(
    images: npt.NDArray[np.int64], num_images: int, columns: Sequence[npt.NDArray[np.generic]]
) -> list[list[Tensor]]:
    """Return for each column the list of its rows by image, as tensors."""
    order, bounds = np.argsort(images, kind="stable"), np.cumsum(np.bincount(images, minlength=num_images))[:-1]
    return [[torch.tensor(part) for part in np.split(column[order], bounds)] for column in columns]


def twelve_metrics(precision: Table, recall: Table) -> Metrics:
    """Return COCO's twelve metrics from COCOeval's tables, as its `summarize` does; see `precision_recall_tables`."""
    by_area = [precision[..., area, -1] for area in range(1 + len(SIZES))]
    average_precisions = [by_area[0], by_area[0][0], by_area[0][5], *by_area[1:]]  # IoU 0.50:0.95, 0.50 and 0.75
    recalls = [*(recall[..., 0, limit] for limit in range(3)), *(recall[..., area, -1] for area in (1, 2, 3))]
    return dict(zip(METRIC_NAMES, map(_mean, [*average_precisions, *recalls]), strict=True))


def _mean(values: Table) -> float:
    """Return the mean of the defined values, which are not -1; NaN if there is none."""
    defined = values[values > -1]
    # COCOeval adds 2e-16 to the denominator of a precision; in float32 a perfect result is 1 again.
    return float(np.float32(defined.mean())) if defined.size else float("nan")


def coco_record(image_id: int, category_id: int, box: Sequence[float], score: float, **more: Any) -> JSONDict:
    """Return one COCO result record. box: xyxy, px. more: keys that COCO does not define; its readers ignore them."""
    x1, y1, x2, y2 = box
    bbox = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
    return {"image_id": image_id, **more, "category_id": int(category_id), "bbox": bbox, "score": round(score, 5)}


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
