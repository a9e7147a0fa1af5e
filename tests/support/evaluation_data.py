"""Small annotation sets, random detections, and pycocotools' evaluation of them."""

from collections.abc import Sequence

import numpy as np
import torch
from annotation_sets import hand_written
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn.utils.rnn import pad_sequence

from onestage.evaluation.analysis import Found, Objects
from onestage.evaluation.coco import CocoEvaluator
from onestage.types import PADDING, AnnotationSet, Detections

NAMES_IN_COCO_ORDER = (
    *("mAP", "AP50", "AP75", "mAP_small", "mAP_medium", "mAP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def annotation_set(
    boxes: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]],
    class_names: Sequence[str] = ("cat", "dog", "owl"),
    crowds: Sequence[Sequence[int]] | None = None,
    areas: Sequence[Sequence[float]] | None = None,
    difficult: Sequence[Sequence[int]] | None = None,
) -> AnnotationSet:
    """Return a set with boxes[i], labels[i], ... in image i; image ids are 10, 20, ..., category ids 7, 14, ..."""
    fields = {
        "image_ids": 10 * np.arange(1, len(boxes) + 1),
        "sizes": np.full((len(boxes), 2), 640, np.int32),
        "class_names": class_names,
        "category_ids": tuple(7 * (label + 1) for label in range(len(class_names))),
    }
    of_objects = {"areas": (areas, np.float32), "is_crowd": (crowds, bool), "is_difficult": (difficult, bool)}
    given = {name: (rows, dtype) for name, (rows, dtype) in of_objects.items() if rows is not None}
    fields |= {name: np.concatenate(rows).astype(dtype) for name, (rows, dtype) in given.items()}
    return hand_written(labels, boxes, **fields)


def detections(
    boxes: Sequence[Sequence[Sequence[float]]], scores: Sequence[Sequence[float]], labels: Sequence[Sequence[int]]
) -> Detections:
    """Pad lists per image into a batch."""
    return Detections(
        pad_sequence([torch.tensor(image).reshape(-1, 4).float() for image in boxes], batch_first=True),
        pad_sequence([torch.tensor(image).float() for image in scores], batch_first=True),
        pad_sequence([torch.tensor(image).long() for image in labels], batch_first=True, padding_value=PADDING),
    )


def random_evaluation(
    seed: int, num_images: int = 40, num_classes: int = 5, num_detections: int = 30, crowd_rate: float = 0.1
) -> tuple[AnnotationSet, Detections]:
    """Objects of all sizes, every seventh image without any; half of the detections are jittered objects."""
    random = np.random.default_rng(seed)
    boxes, labels, crowds, areas = [], [], [], []
    found = Detections(
        torch.zeros(num_images, num_detections, 4),
        torch.zeros(num_images, num_detections),
        torch.zeros(num_images, num_detections, dtype=torch.int64),
    )
    for index in range(num_images):
        objects = _random_boxes(random, 0 if index % 7 == 3 else int(random.integers(1, 9)))
        boxes.append(objects)
        labels.append(random.integers(0, num_classes, len(objects)))
        crowds.append(random.random(len(objects)) < crowd_rate)
        areas.append(np.prod(objects[:, 2:] - objects[:, :2], axis=1) * random.uniform(0.3, 1.0, len(objects)))
        guesses = _random_boxes(random, num_detections)
        guess_labels = random.integers(0, num_classes, num_detections)
        if len(objects):
            copies = random.integers(0, len(objects), num_detections // 2)
            sides = np.tile(objects[copies, 2:] - objects[copies, :2], 2)
            guesses[: len(copies)] = objects[copies] + sides * random.normal(0, 0.06, sides.shape)
            guess_labels[: len(copies)] = labels[-1][copies]
        found.boxes[index] = torch.from_numpy(guesses)
        # Two decimals, so that many scores are equal and the order of ties matters.
        found.scores[index] = torch.from_numpy(random.uniform(0.05, 1.0, num_detections).round(2))
        found.labels[index] = torch.from_numpy(guess_labels)
    class_names = [f"class {label}" for label in range(num_classes)]
    return annotation_set(boxes, labels, class_names, crowds, areas), found


def _random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
    corners = random.uniform(0, 1, (count, 2)) * (640 - sides)
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def flat(annotations: AnnotationSet, found: Detections) -> tuple[Found, Objects]:
    """Return detections and objects as the flat arrays of an evaluator that has seen all images in order."""
    evaluator = CocoEvaluator(annotations)
    evaluator.update(torch.arange(len(found.boxes)), found)
    return evaluator.detections(), evaluator.objects()


def coco_objects(annotations: AnnotationSet, found: Detections) -> tuple[dict, list[dict]]:
    """Return the content of a COCO annotation file and of a results file."""
    objects, records = [], []
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        for row in range(*annotations.objects(index).indices(len(annotations.labels))):
            entry = {"id": row + 1, "image_id": image_id, "bbox": _xywh(annotations.boxes[row])}
            entry |= {"category_id": annotations.category_ids[annotations.labels[row]]}
            objects.append({**entry, "area": float(annotations.areas[row]), "iscrowd": int(annotations.is_crowd[row])})
        for box, score, label in zip(found.boxes[index], found.scores[index], found.labels[index], strict=True):
            if label != PADDING:
                category = annotations.category_ids[int(label)]
                values = {"bbox": _xywh(box.numpy()), "score": float(score)}
                records.append({"image_id": image_id, "category_id": category, **values})
    categories = [{"id": category, "name": str(category)} for category in annotations.category_ids]
    images = [{"id": image_id} for image_id in annotations.image_ids.tolist()]
    return {"info": {}, "images": images, "annotations": objects, "categories": categories}, records


def coco_numbers(annotations: AnnotationSet, found: Detections, category_id: int | None = None) -> dict[str, float]:
    """Return the metrics of pycocotools from the records of a COCO file; NaN for -1."""
    truth = COCO()
    truth.dataset, records = coco_objects(annotations, found)
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(records), "bbox")
    if category_id is not None:
        evaluation.params.catIds = [category_id]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(value) if value >= 0 else float("nan") for value in evaluation.stats]
    return dict(zip(NAMES_IN_COCO_ORDER, values, strict=True))


def _xywh(box: np.ndarray) -> list[float]:
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]
