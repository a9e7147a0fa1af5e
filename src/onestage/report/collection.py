"""The part of a report that no other file of a run holds, collected while data and detections are in memory."""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from onestage.data.annotations import grouped, quoted
from onestage.data.datamodule import DetectionDataModule
from onestage.errors import ImageError
from onestage.evaluation.analysis import Found, Integers, Match, Objects, match, overlapping_pairs
from onestage.evaluation.drawing import draw_boxes
from onestage.files import atomic_folder
from onestage.report.comparison import collect_matches, write_matches
from onestage.report.report import DATA_FOLDER, FACTS_FILE, MATCHES_FILE, PAGE_FILE, write_page
from onestage.training.module import DetectionModule
from onestage.types import AnnotationSet, Detections, Finding, JSONDict, Stage

NUM_IMAGES = 24  # of the worst and of the random ones
SHORT_SIDE, LONG_SIDE, MAX_IMAGE_BYTES = 300, 600, 36_000  # px, px, bytes: 48 of them make 2.3 MB of the page
SIZES = (8, 16, 32, 64, 128, 256, 512)  # px, bounds of the bins of object sizes
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # bounds of the bins of objects per image
STAGES: dict[str, tuple[Stage, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


def write_after_run(
    folder: Path, command: str, module: DetectionModule, data: DetectionDataModule, *, draw: bool
) -> None:
    """Write report.html and what it is made of into a run folder, and print its place; the first process calls it.

    draw: with the worst and random images.
    """
    evaluator, stages = module.evaluator, STAGES[command]
    if evaluator is None:
        return
    found, objects, num_images = evaluator.detections(), evaluator.objects(), len(evaluator.image_rows)
    pairs, splits = overlapping_pairs(found, objects), [data.annotations(stage) for stage in stages]
    findings = [*(finding for split in splits for finding in split.findings), *data.shared]
    facts: JSONDict = {"command": command, "findings": _kinds(findings)}
    facts["splits"] = [_describe(stage, split) for stage, split in zip(stages, splits, strict=True)]
    shutil.rmtree(folder / DATA_FOLDER, ignore_errors=True)  # of the run before a resume
    with atomic_folder(folder / DATA_FOLDER) as place:
        ids = evaluator.annotations.image_ids[evaluator.image_rows]
        write_matches(place / MATCHES_FILE, collect_matches(found, objects, pairs, ids, len(data.class_names)))
        if draw:
            errors = image_errors(found, objects, match(found, objects, pairs), module.score_threshold, num_images)
            num_worst = min(NUM_IMAGES, np.count_nonzero(errors.any(axis=0)))
            worst = np.argsort(-errors.sum(axis=0), kind="stable")[:num_worst].tolist()
            random = sorted(np.random.default_rng(0).permutation(num_images)[:NUM_IMAGES].tolist())
            entries: dict[int, JSONDict] = {}
            for position in {*worst, *random}:
                row = int(evaluator.image_rows[position])
                mine = Detections(*(torch.from_numpy(column[found.images == position]) for column in found[1:]))
                with suppress(ImageError):  # a file that has vanished since
                    image = data.read_image(stages[-1], row)
                    picture = _draw(image, evaluator.annotations, row, mine, module.score_threshold)
                    (place / f"{row}.jpg").write_bytes(picture)
                name, (missed, wrong) = Path(evaluator.annotations.image_paths[row]).name, errors[:, position].tolist()
                entries[position] = {"file": f"{row}.jpg", "name": name, "missed": missed, "wrong": wrong}
            facts |= {"worst": [entries[n] for n in worst], "random": [entries[n] for n in random]}
        (place / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    print(f"report: {write_page([folder], folder / PAGE_FILE)}")


def image_errors(found: Found, objects: Objects, matched: Match, threshold: float | None, num_images: int) -> Integers:
    """Return the number of missed objects and of wrong detections with a score >= threshold of each image, [2, N]."""
    shown = found.scores >= (2.0 if threshold is None else threshold)
    is_missed = ~objects.is_ignored
    is_missed[matched.objects[shown & (matched.objects >= 0)]] = False
    is_wrong = shown & (matched.objects < 0) & ~matched.is_ignored
    missed, wrong = objects.images[is_missed], found.images[is_wrong]
    return np.array([np.bincount(missed, minlength=num_images), np.bincount(wrong, minlength=num_images)])


def _draw(
    image: npt.NDArray[np.uint8], annotations: AnnotationSet, row: int, found: Detections, threshold: float | None
) -> bytes:
    """Return a small JPEG of an image with its objects and detections."""
    objects, (height, width) = annotations.objects(row), image.shape[:2]
    scale = min(1.0, SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    found = found._replace(boxes=found.boxes * scale)
    boxes, labels, names = annotations.boxes[objects] * scale, annotations.labels[objects], annotations.class_names
    picture = Image.fromarray(draw_boxes(small, boxes, labels, found, names, score_threshold=threshold))
    picture.thumbnail((LONG_SIDE, LONG_SIDE))
    for quality in (80, 60, 40, 20):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality)
        if buffer.tell() <= MAX_IMAGE_BYTES:
            break
    return buffer.getvalue()


def _describe(stage: Stage, annotations: AnnotationSet) -> JSONDict:
    """Return the counts of a split: by class, by size and by objects per image."""
    sides = np.sqrt(np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1))
    per_image = np.diff(annotations.box_offsets)
    counts = np.bincount(annotations.labels, minlength=len(annotations.class_names)).tolist()
    return {
        "name": stage,
        "source": annotations.source,
        "num_images": len(annotations),
        "num_boxes": len(annotations.boxes),
        "classes": dict(zip(annotations.class_names, counts, strict=True)),
        "sizes": _histogram(sides, SIZES),
        "objects per image": _histogram(per_image, COUNTS),
    }


def _histogram(values: npt.NDArray[Any], bounds: tuple[int, ...]) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1).tolist()
    return dict(zip((f"<{bounds[0]}", *(f"{bound}+" for bound in bounds)), counts, strict=True))


def _kinds(findings: list[Finding]) -> list[JSONDict]:
    kinds = []
    for (effect, rule), members in grouped(findings).items():
        kind = {"effect": effect, "rule": rule, "num_items": sum(finding.num_items for finding in members)}
        kinds.append({**kind, "lines": quoted([finding.line for finding in members]), "remedy": members[0].remedy})
    return kinds
