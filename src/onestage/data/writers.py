"""Write an `AnnotationSet` as COCO, VOC or YOLO files; count what the format cannot carry."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from onestage.types import AnnotationSet

DECIMALS = 4  # of a pixel
FRACTION_DIGITS = 9  # of a coordinate in 0..1: a millionth of a pixel in the largest image
MIN_VOC_SIDE = 1.001  # px; a VOC box of one pixel has xmin equal to xmax, which readers take for a mistake

Losses = Counter[str]  # what a format cannot carry -> number of objects, images or classes


class WritableSplit(NamedTuple):
    """A split, ready to be written: sizes known, a file name for each image."""

    name: str
    annotations: AnnotationSet
    file_names: Sequence[str]  # [N] without folders; their stems are unique


def write_coco(root: Path, splits: Sequence[WritableSplit]) -> Losses:
    """Write annotations/instances_<split>.json for images in <split>/. Nothing of a set is lost.

    VOC's flag `difficult` becomes a key of that name, which `parse_coco` reads and other tools ignore.
    """
    losses: Losses = Counter()
    (root / "annotations").mkdir(exist_ok=True)
    for name, annotations, file_names in splits:
        images = zip(annotations.image_ids.tolist(), file_names, annotations.sizes.tolist(), strict=True)
        categories = zip(annotations.category_ids, annotations.class_names, strict=True)
        content = {
            "info": {"description": annotations.source},  # pycocotools asks for it
            "images": [
                {"id": image_id, "file_name": file_name, "width": width, "height": height}
                for image_id, file_name, (height, width) in images
            ],
            "annotations": list(_coco_objects(annotations)),
            "categories": [{"id": int(category), "name": class_name} for category, class_name in categories],
        }
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")
        num_difficult = int(annotations.is_difficult.sum())
        losses["difficult flags are in a key `difficult`, which other tools ignore"] += num_difficult
    return +losses


def _coco_objects(annotations: AnnotationSet) -> Iterator[dict[str, object]]:
    image_ids = np.repeat(annotations.image_ids, np.diff(annotations.box_offsets)).tolist()
    boxes = annotations.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    for row, box in enumerate(boxes.round(DECIMALS).tolist()):
        entry: dict[str, object] = {
            "id": row + 1,
            "image_id": image_ids[row],
            "category_id": int(annotations.category_ids[annotations.labels[row]]),
            "bbox": box,
            "area": round(float(annotations.areas[row]), DECIMALS),
            "iscrowd": int(annotations.is_crowd[row]),
        }
        yield entry | ({"difficult": 1} if annotations.is_difficult[row] else {})


def write_voc(root: Path, splits: Sequence[WritableSplit]) -> Losses:
    """Write Annotations/<image>.xml and ImageSets/Main/<split>.txt for images in JPEGImages/."""
    losses = _lost_outside_coco(splits)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "Annotations").mkdir(exist_ok=True)
    for name, annotations, file_names in splits:
        boxes = _at_least_one_pixel(annotations.boxes)
        stems = [Path(file_name).stem for file_name in file_names]
        for row, file_name in enumerate(file_names):
            xml = _voc_xml(annotations, row, file_name, boxes)
            (root / "Annotations" / f"{stems[row]}.xml").write_text(xml, encoding="utf-8")
        (lists / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
        losses["boxes of at most one pixel are made a little wider"] += int((boxes != annotations.boxes).any(1).sum())
        losses["crowds are written as difficult objects"] += int(annotations.is_crowd.sum())
    used = set().union(*(split.annotations.labels.tolist() for split in splits))
    losses["classes without objects are lost"] += len(splits[0].annotations.class_names) - len(used)
    return +losses


def _voc_xml(annotations: AnnotationSet, row: int, file_name: str, boxes: npt.NDArray[np.float32]) -> str:
    height, width = annotations.sizes[row].tolist()
    lines = [
        "<annotation>",
        f"  <filename>{escape(file_name, quote=False)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for t in range(len(boxes))[annotations.objects(row)]:
        name = escape(annotations.class_names[annotations.labels[t]], quote=False)
        difficult = int(annotations.is_difficult[t] or annotations.is_crowd[t])
        x1, y1, x2, y2 = boxes[t].astype(np.float64).tolist()
        corners = {"xmin": x1 + 1, "ymin": y1 + 1, "xmax": x2, "ymax": y2}  # pixels from 1, both ends inside
        # A coordinate is nearly always a whole number, and is then written as one.
        numbers = {corner: f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".") for corner, value in corners.items()}
        bndbox = "".join(f"<{corner}>{number}</{corner}>" for corner, number in numbers.items())
        lines += [
            "  <object>",
            f"    <name>{name}</name>",
            f"    <difficult>{difficult}</difficult>",
            f"    <bndbox>{bndbox}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _at_least_one_pixel(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Widen boxes of at most one pixel, about their centre."""
    sides = boxes[:, 2:] - boxes[:, :2]
    missing = np.where(sides <= 1, MIN_VOC_SIDE - sides, 0)
    low = np.maximum(boxes[:, :2] - missing / 2, 0)
    high = np.where(missing > 0, low + sides + missing, boxes[:, 2:])
    return np.concatenate([low, high], axis=1).astype(np.float32)


def write_yolo(root: Path, splits: Sequence[WritableSplit]) -> Losses:
    """Write data.yaml, and labels/<split>/<image>.txt for images in images/<split>/."""
    losses = _lost_outside_coco(splits)
    for name, annotations, file_names in splits:
        folder = root / "labels" / name
        folder.mkdir(parents=True)
        lines = _yolo_lines(annotations)
        for row, file_name in enumerate(file_names):
            objects = annotations.objects(row)
            are_crowds = annotations.is_crowd[objects]
            written = [line for line, is_crowd in zip(lines[objects], are_crowds, strict=True) if not is_crowd]
            unique = dict.fromkeys(written)
            losses["objects that occur twice are written once"] += len(written) - len(unique)
            (folder / f"{Path(file_name).stem}.txt").write_text("".join(unique), encoding="utf-8")
        losses["crowds are skipped"] += int(annotations.is_crowd.sum())
        losses["difficult objects are written as any other"] += int(annotations.is_difficult.sum())
    # Without `path`, every reader takes the folder of the file.
    settings: dict[str, object] = {split.name: f"images/{split.name}" for split in splits}
    settings["names"] = dict(enumerate(splits[0].annotations.class_names))
    (root / "data.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return +losses


def _yolo_lines(annotations: AnnotationSet) -> list[str]:
    """Return `class cx cy width height` of every object, in fractions of its image."""
    sizes = np.repeat(annotations.sizes, np.diff(annotations.box_offsets), axis=0)[:, ::-1]
    low, high = annotations.boxes[:, :2].astype(np.float64), annotations.boxes[:, 2:].astype(np.float64)
    fractions = np.concatenate([(low + high) / 2 / sizes, (high - low) / sizes], axis=1).tolist()
    return [
        " ".join([str(label), *(f"{value:.{FRACTION_DIGITS}g}" for value in box)]) + "\n"
        for label, box in zip(annotations.labels.tolist(), fractions, strict=True)
    ]


def _lost_outside_coco(splits: Sequence[WritableSplit]) -> Losses:
    """Count what neither VOC nor YOLO carries."""
    losses: Losses = Counter()
    for _, annotations, _ in splits:
        box_areas = np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1)
        is_outline = ~np.isclose(annotations.areas, box_areas, rtol=1e-3)
        losses["objects lose the area of their outline"] += int(np.count_nonzero(is_outline))
    ids = splits[0].annotations.category_ids
    losses["classes lose their category ids"] = sum(category != place for place, category in enumerate(ids, start=1))
    return losses
