"""TIDE's error types: how much AP50 each kind of mistake costs (Bolya et al., arXiv:2008.08115)."""

from collections.abc import Iterator

import numpy as np

from onestage.evaluation.matching import (
    MIN_OVERLAP,
    POSITIVE_IOU,
    Booleans,
    Found,
    Integers,
    Match,
    Objects,
    Pairs,
    best_overlaps,
)
from onestage.evaluation.precision_recall import average_precision, class_curves

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")


def error_types(found: Found, objects: Objects, pairs: Pairs, matched: Match, num_classes: int) -> dict[str, float]:
    """Return by how much AP50 would rise if one type of error did not occur, in [0, 1]; NaN without objects.

    A wrong detection has one type, the first that applies (section 2.2; t_f = 0.5, t_b = 0.1):

    - localisation: 0.1 <= IoU < 0.5 with an object of its class; the oracle moves it onto the object
    - classification: IoU >= 0.5 with an object of another class; the oracle corrects the class
    - duplicate: IoU >= 0.5 with an object of its class that a better detection has found; removed
    - background: IoU < 0.1 with every object; removed
    - both: the rest, 0.1 <= IoU < 0.5 with an object of another class; removed

    A corrected detection of an object that is found already, or by a better corrected one, is removed as a duplicate.
    `missed` are objects that no detection has found and no error of the first two types belongs to; the oracle
    removes them.
    """
    counted = ~objects.is_ignored
    num_objects = objects.count(num_classes)
    if not num_objects.any():
        return dict.fromkeys(ERROR_TYPES, float("nan"))
    is_correct, kept = matched.objects >= 0, ~matched.is_ignored
    before = _mean_ap(found, found.labels, is_correct, kept, num_objects)
    gains, claimed = {}, [matched.objects[is_correct]]
    types = dict(zip(ERROR_TYPES, _types(found, objects, pairs, kept & ~is_correct), strict=False))
    for name, (members, targets) in types.items():
        labels, correct = found.labels, is_correct
        if name in ("classification", "localisation"):
            fixed = _first_claims(members, targets, found, matched.objects[is_correct])
            claimed.append(targets[members])
            correct = is_correct.copy()
            correct[fixed] = True
            labels = np.where(correct & members, objects.labels[targets], labels)
        after = _mean_ap(found, labels, correct, kept & (correct | ~members), num_objects)
        gains[name] = after - before
    missed = counted.copy()
    missed[np.concatenate(claimed)] = False
    left = num_objects - np.bincount(objects.labels[missed], minlength=num_classes)
    return {**gains, "missed": _mean_ap(found, found.labels, is_correct, kept, left) - before}


def _types(found: Found, objects: Objects, pairs: Pairs, wrong: Booleans) -> Iterator[tuple[Booleans, Integers]]:
    """Yield the detections of each type, [D], and the object they belong to, [D], in the order of ERROR_TYPES."""
    pairs, num_found = pairs.where(~objects.is_ignored[pairs.objects]), len(found.scores)
    own_iou, own = best_overlaps(pairs.where(pairs.is_same_class), num_found)
    other_iou, other = best_overlaps(pairs.where(~pairs.is_same_class), num_found)
    localisation = wrong & (own_iou >= MIN_OVERLAP) & (own_iou < POSITIVE_IOU)
    classification = wrong & ~localisation & (other_iou >= POSITIVE_IOU)
    duplicate = wrong & ~classification & (own_iou >= POSITIVE_IOU)
    background = wrong & (own_iou < MIN_OVERLAP) & (other_iou < MIN_OVERLAP)
    both = wrong & ~(localisation | classification | duplicate | background)
    yield classification, other
    yield localisation, own
    for members in (both, duplicate, background):
        yield members, own


def _first_claims(members: Booleans, targets: Integers, found: Found, taken: Integers) -> Integers:
    """Return the best member of each target that is not taken."""
    rows = np.flatnonzero(members)
    rows = rows[~np.isin(targets[rows], taken)]
    rows = rows[np.argsort(-found.scores[rows], kind="stable")]
    return np.asarray(rows[np.unique(targets[rows], return_index=True)[1]])


def _mean_ap(found: Found, labels: Integers, correct: Booleans, kept: Booleans, num_objects: Integers) -> float:
    """Return AP50 over the classes with objects."""
    curves = class_curves(found.scores, labels, correct, kept, num_objects)
    values = [average_precision(curve) for curve in curves if curve.num_objects]
    return float(np.mean(values)) if values else float("nan")
