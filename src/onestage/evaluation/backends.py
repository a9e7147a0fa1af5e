"""COCOeval's tables of precision and recall, from any of three packages that give equal numbers."""

import gc
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from onestage.evaluation.analysis import RECALLS, Found, Objects

Package = Literal["hotcoco", "faster_coco_eval", "pycocotools"]
Backend = Literal["auto", Package]
BACKENDS: tuple[Package, ...] = get_args(Package)  # the fastest first
Table = npt.NDArray[np.float64]

_hotcoco_processes = set[int]()  # that have started hotcoco's threads, or were forked from one of them


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
        # The default is a float32 linspace: recall bins shift at ties, and AP is wrong by up to 1.3e-4.
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
