"""Differences between runs: of mAP, by a paired bootstrap over the images, and of the configurations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.evaluation.analysis import RECALLS, Found, Integers, Objects, Pairs, match, rows_by_class

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's
NUM_RESAMPLES = 1000
MAX_ELEMENTS = 5_000_000  # of a temporary array: 40 MB
MAX_BYTES = 2_000_000  # of a file of matches; COCO's validation split with 100 detections an image stays below it


class Matches(NamedTuple):
    """All that mAP and its resampling need: which detection is right at which IoU, without scores and boxes."""

    image_ids: Integers  # [N] the data set's own
    object_images: Integers  # [G] position of the image of each counted object, class by class
    num_objects: Integers  # [K]
    found_images: Integers  # [D] the same of each detection, the best score of a class first
    num_found: Integers  # [K]
    correct: npt.NDArray[np.uint16]  # [D] bit t is set if the detection finds an object at IOUS[t]
    ignored: npt.NDArray[np.uint16]  # [D] bit t is set if it counts neither as right nor as wrong there


def collect_matches(found: Found, objects: Objects, pairs: Pairs, image_ids: Integers, num_classes: int) -> Matches:
    """Match at all of COCO's IoU thresholds. image_ids: [N], of the positions in `found` and `objects`."""
    counted = np.flatnonzero(~objects.is_ignored)
    by_class = rows_by_class(objects.labels[counted], num_classes)
    object_images = objects.images[counted[np.concatenate(by_class)]]
    order = np.lexsort((-found.scores, found.labels))  # stable, as COCOeval
    correct, ignored = np.zeros((2, len(order)), dtype=np.uint16)
    for bit, iou in enumerate(IOUS):
        matched = match(found, objects, pairs, iou=float(iou))
        correct |= (matched.objects[order] >= 0).astype(np.uint16) << bit
        ignored |= matched.is_ignored[order].astype(np.uint16) << bit
    num_found = np.bincount(found.labels, minlength=num_classes)
    num_objects = np.array([len(rows) for rows in by_class])
    return Matches(image_ids, object_images, num_objects, found.images[order], num_found, correct, ignored)


def write_matches(path: Path, matches: Matches) -> None:
    """Write matches as a compressed file in the smallest integers; none if it would be larger than MAX_BYTES."""
    small = [column.astype(np.min_scalar_type(int(column.max(initial=0)))) for column in matches[1:]]
    columns: dict[str, Any] = dict(zip(Matches._fields, (matches.image_ids, *small), strict=True))
    np.savez_compressed(path, **columns)
    if path.stat().st_size > MAX_BYTES:
        path.unlink()


def read_matches(path: Path) -> Matches | None:
    """Return the matches of a file; None if there is none."""
    if not path.is_file():
        return None
    with np.load(path) as file:  # without pickles
        return Matches(*(file[name].astype(np.int64) for name in Matches._fields))


def resampled_map(matches: Matches, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the mAP, [B], if each image occurred as often as its weight says.

    weights: [B, N]; all ones give COCO's mAP. NaN where no object is left.

    The interpolated precision changes at correct detections only, so each costs B x D once and little more.
    """
    totals, num_classes = np.zeros((2, len(weights)))
    objects = np.split(matches.object_images, np.cumsum(matches.num_objects)[:-1])
    bounds = np.cumsum(matches.num_found)[:-1]
    detections = (np.split(column, bounds) for column in (matches.found_images, matches.correct, matches.ignored))
    for object_images, found_images, correct, ignored in zip(objects, *detections, strict=True):
        num_objects = weights[:, object_images].sum(axis=1)  # [B]
        drawn = weights[:, found_images]  # [B, n]
        seen = np.cumsum(drawn, axis=1)
        by_iou = [_precision(drawn, seen, num_objects, correct >> t & 1, ignored >> t & 1) for t in range(len(IOUS))]
        totals += np.mean(by_iou, axis=0)
        num_classes += num_objects > 0
    with np.errstate(invalid="ignore"):
        return totals / num_classes


def _precision(
    drawn: Integers, seen: Integers, num_objects: Integers, correct: Integers, ignored: Integers
) -> npt.NDArray[np.float64]:
    """Return the AP of a class at one IoU, [B]; 0 without objects.

    drawn, seen: [B, n] how often each detection occurs, and their sums up to it; correct, ignored: [n] 0 or 1.
    """
    hits, skipped = np.flatnonzero(correct & ~ignored), np.flatnonzero(ignored)
    if not len(hits):
        return np.zeros(len(drawn))
    num_skipped = np.cumsum(np.pad(drawn[:, skipped], [(0, 0), (1, 0)]), axis=1)
    num_seen = seen[:, hits] - num_skipped[:, np.searchsorted(skipped, hits)]
    num_right = np.cumsum(drawn[:, hits], axis=1)
    precision = num_right / np.maximum(num_seen, 1)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    highest = np.concatenate([highest, np.zeros((len(drawn), 1))], axis=1)
    # How many of the objects a recall needs, exactly as `num_right / num_objects >= recall` decides it.
    total, recalls = np.maximum(num_objects, 1)[:, None], RECALLS["COCO"]
    needed = np.ceil(recalls * total)
    needed -= (needed - 1) / total >= recalls
    needed += needed / total < recalls
    # Rows one after the other, so that one search finds the place of all recalls in all of them.
    offsets = np.arange(len(drawn))[:, None] * (total.max() + 2)
    places = np.searchsorted((num_right + offsets).ravel(), (needed + offsets).ravel()).reshape(needed.shape)
    places -= np.arange(len(drawn))[:, None] * len(hits)
    values = np.take_along_axis(highest, np.minimum(places, len(hits)), axis=1).mean(axis=1)
    return np.asarray(values * (num_objects > 0))


def difference_interval(first: Matches, second: Matches, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """Return the 95 % interval of mAP(second) - mAP(first) over images drawn with replacement, the same for both.

    Efron's percentile interval, paired: the difficulty of an image cancels out. Both must have the same images.
    """
    random, num_images = np.random.default_rng(0), len(first.image_ids)
    rows = max(1, MAX_ELEMENTS // max(1, num_images, *first.num_found, *second.num_found))
    differences = []
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        weights = random.multinomial(num_images, np.full(num_images, 1 / num_images), size=count)
        differences.append(resampled_map(second, weights) - resampled_map(first, weights))
    low, high = np.nanpercentile(np.concatenate(differences), [2.5, 97.5])
    return float(low), float(high)


def are_comparable(first: Matches, second: Matches) -> bool:
    """Return whether two evaluations saw the same images with the same objects."""
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in Matches._fields[:3])


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ, and their values as JSON; "-" where a configuration has no such key."""
    flat = [dict(_flattened(config)) for config in configs]
    keys = sorted({key for one in flat for key in one})
    values = [(key, [one.get(key, "-") for one in flat]) for key in keys]
    return [(key, texts) for key, texts in values if len(set(texts)) > 1]


def _flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(config, default=str, ensure_ascii=False)
