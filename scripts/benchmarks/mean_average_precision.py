"""COCO's twelve numbers: pycocotools, torchmetrics as it comes, and `CocoEvaluator`."""

import contextlib
import io
import math
from functools import partial

import numpy as np
import torch

from benchmarks.timing import compare
from onestage.evaluation.coco import BACKENDS, METRIC_NAMES, CocoEvaluator, Package
from onestage.types import AnnotationSet, Detections

NUM_CLASSES = 80
MEAN_OBJECTS = 7.25  # of COCO val2017, so that 5,000 images hold 36,000
BATCH_SIZE = 32


def run(rounds: int, quick: bool) -> None:
    """Evaluate 5,000 images with 100 detections each; half of the detections are jittered objects."""
    annotations, detections = synthetic_evaluation(*((60, 20) if quick else (5000, 100)))
    numbers: dict[str, dict[str, float]] = {}

    def record(name: str, values: dict[str, float]) -> None:
        numbers[name] = values

    def evaluate_and_record(package: Package) -> None:
        record(f"onestage, {package}", with_onestage(annotations, detections, package))

    contestants = {
        "pycocotools": lambda: record("pycocotools", with_pycocotools(annotations, detections)),
        "torchmetrics, default": lambda: record("torchmetrics, default", with_torchmetrics(annotations, detections)),
    }
    for package in BACKENDS[:2]:
        contestants[f"onestage, {package}"] = partial(evaluate_and_record, package)
    num_images, num_detections = detections.scores.shape
    title = f"mAP of {num_images} images x {num_detections} detections x {NUM_CLASSES} classes"
    compare(f"{title}, {len(annotations.labels)} objects", contestants, rounds, warm_up=False)
    for name, values in numbers.items():
        difference = max(
            abs(value - values[metric]) for metric, value in numbers["pycocotools"].items() if not math.isnan(value)
        )
        print(f"{name}: mAP {values['mAP']:.6f}, largest difference of the twelve to pycocotools {difference:.1e}")
    expected = list(numbers["pycocotools"].values())
    for backend in BACKENDS[:2]:
        ours = list(numbers[f"onestage, {backend}"].values())
        assert np.allclose(ours, expected, rtol=0, atol=1e-6, equal_nan=True), f"{backend} differs from pycocotools"
    print("asserted: all twelve numbers within 1e-6 of pycocotools")


def synthetic_evaluation(num_images: int, num_detections: int) -> tuple[AnnotationSet, Detections]:
    """Return objects in 640 x 640 images and as many detections in each; the same on every call."""
    random = np.random.default_rng(0)
    counts = random.poisson(MEAN_OBJECTS, num_images)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    boxes = _random_boxes(random, int(offsets[-1]))
    labels = random.integers(0, NUM_CLASSES, len(boxes))
    found = _random_boxes(random, num_images * num_detections).reshape(num_images, num_detections, 4)
    found_labels = random.integers(0, NUM_CLASSES, (num_images, num_detections))
    for image in np.flatnonzero(counts):
        rows = random.integers(offsets[image], offsets[image + 1], num_detections // 2)
        sides = np.tile(boxes[rows, 2:] - boxes[rows, :2], 2)
        found[image, : len(rows)] = boxes[rows] + sides * random.normal(0, 0.08, sides.shape)
        found_labels[image, : len(rows)] = labels[rows]
    scores = np.sort(random.uniform(0.01, 1, (num_images, num_detections)))[:, ::-1]
    order = random.permuted(np.tile(np.arange(num_detections), (num_images, 1)), axis=1)
    detections = Detections(
        torch.from_numpy(np.take_along_axis(found, order[..., None], 1)),
        torch.from_numpy(scores.astype(np.float32)),
        torch.from_numpy(np.take_along_axis(found_labels, order, 1)),
    )
    annotations = AnnotationSet(
        source="synthetic",
        image_paths=np.array([f"{image}.jpg" for image in range(num_images)], dtype=np.str_),
        image_ids=np.arange(1, num_images + 1),
        sizes=np.full((num_images, 2), 640, np.int32),
        box_offsets=offsets,
        boxes=boxes,
        labels=labels,
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        is_crowd=random.random(len(boxes)) < 0.01,
        is_difficult=np.zeros(len(boxes), bool),
        class_names=tuple(f"class {label}" for label in range(NUM_CLASSES)),
        category_ids=tuple(range(1, NUM_CLASSES + 1)),
    )
    return annotations, detections


def _random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
    corners = random.uniform(0, 1, (count, 2)) * (640 - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def with_onestage(annotations: AnnotationSet, detections: Detections, backend: Package) -> dict[str, float]:
    """Batch by batch, as a validation epoch does; the AP of each class and the analysis included."""
    evaluator = CocoEvaluator(annotations, backend)
    for indices in torch.arange(len(annotations)).split(BATCH_SIZE):
        evaluator.update(indices, Detections(*(tensor[indices] for tensor in detections)))
    metrics, per_class, _ = evaluator.evaluation()
    assert len(per_class) == NUM_CLASSES
    return metrics


def with_torchmetrics(annotations: AnnotationSet, detections: Detections) -> dict[str, float]:
    """MeanAveragePrecision() without any argument."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for index in range(len(annotations)):
        objects = annotations.objects(index)
        prediction = {name: tensor[index] for name, tensor in detections._asdict().items()}
        target = {
            "boxes": torch.from_numpy(annotations.boxes[objects]),
            "labels": torch.from_numpy(annotations.labels[objects]),
            "area": torch.from_numpy(annotations.areas[objects]),
            "iscrowd": torch.from_numpy(annotations.is_crowd[objects].astype(np.int64)),
        }
        metric.update([prediction], [target])
    values = metric.compute()
    sizes = ("small", "medium", "large")
    keys = ("map", "map_50", "map_75", *(f"map_{size}" for size in sizes))
    keys += ("mar_1", "mar_10", "mar_100", *(f"mar_{size}" for size in sizes))
    return _with_nan({name: float(values[key]) for name, key in zip(METRIC_NAMES, keys, strict=True)})


def with_pycocotools(annotations: AnnotationSet, detections: Detections) -> dict[str, float]:
    """COCOeval on the records that a COCO file and a results file would hold."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = _coco_dataset(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(_coco_results(annotations, detections))
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _with_nan(dict(zip(METRIC_NAMES, evaluation.stats.tolist(), strict=True)))


def _coco_dataset(annotations: AnnotationSet) -> dict[str, object]:
    image_ids = np.repeat(annotations.image_ids, np.diff(annotations.box_offsets)).tolist()
    boxes, labels = _xywh(annotations.boxes).tolist(), annotations.labels.tolist()
    areas, crowds = annotations.areas.tolist(), annotations.is_crowd.astype(int).tolist()
    columns = zip(image_ids, boxes, labels, areas, crowds, strict=True)
    return {
        "info": {},
        "images": [{"id": image_id} for image_id in annotations.image_ids.tolist()],
        "categories": [{"id": category} for category in annotations.category_ids],
        "annotations": [
            {"id": row, "image_id": image, "bbox": box, "category_id": label + 1, "area": area, "iscrowd": crowd}
            for row, (image, box, label, area, crowd) in enumerate(columns, start=1)  # id 0 would never match
        ],
    }


def _coco_results(annotations: AnnotationSet, detections: Detections) -> list[dict[str, object]]:
    image_ids = annotations.image_ids.repeat(detections.scores.shape[1]).tolist()
    boxes = _xywh(detections.boxes.numpy().reshape(-1, 4)).tolist()
    scores, labels = detections.scores.flatten().tolist(), detections.labels.flatten().tolist()
    return [
        {"image_id": image, "bbox": box, "score": score, "category_id": label + 1}
        for image, box, score, label in zip(image_ids, boxes, scores, labels, strict=True)
    ]


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _with_nan(values: dict[str, float]) -> dict[str, float]:
    return {name: value if value >= 0 else float("nan") for name, value in values.items()}
