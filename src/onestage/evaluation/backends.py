"""COCOeval's tables of precision and recall, from any of three packages that give equal numbers."""

import contextlib
import io
import os
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onestage.evaluation.matching import Found, Objects

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
    """
    if not len(objects.labels):
        return np.full((10, 101, num_classes, 4, 3), -1.0), np.full((10, num_classes, 4, 3), -1.0)
    package, boxes = choose_backend(backend), _xywh(objects.boxes)
    if package == "hotcoco":
        _hotcoco_processes.add(os.getpid())
    areas = np.where(objects.areas > 0, objects.areas, boxes[:, 2] * boxes[:, 3])
    ids = np.arange(1, 1 + len(areas))  # 0 would mean that a detection has no object
    columns = (ids, objects.images, objects.labels, boxes, areas, objects.is_ignored.astype(np.int64))
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
        "annotations": [dict(zip(keys, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)],
    }
    rows = np.column_stack([found.images, _xywh(found.boxes), found.scores, found.labels]).astype(np.float64)
    coco, coco_eval = _classes_of(package)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = _indexed(coco(), dataset)
        # pycocotools cannot load results without a row.
        results = truth.loadRes(rows) if len(rows) else _indexed(coco(), {**dataset, "annotations": []})
        evaluation = coco_eval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _classes_of(package: Package) -> tuple[Any, Any]:
    if package == "hotcoco":
        from hotcoco import COCO, COCOeval
    elif package == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    return COCO, COCOeval


def _indexed(coco: Any, dataset: dict[str, Any]) -> Any:
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _xywh(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
