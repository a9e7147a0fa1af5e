"""PASCAL VOC's average precision, by the matching rule of its development kit."""

import numpy as np

from onestage.evaluation.matching import POSITIVE_IOU, Found, Objects, Pairs, best_overlaps, rows_by_class
from onestage.evaluation.precision_recall import average_precision, make_curve

RULES = ("VOC07", "VOC10")  # 11 recalls until 2009, the area under the curve from 2010 on


def voc_average_precision(found: Found, objects: Objects, pairs: Pairs, num_classes: int) -> dict[str, list[float]]:
    """Return the AP of each class, [K] in [0, 1], by each of RULES; NaN for a class without objects.

    The rule of VOCevaldet.m (Everingham et al., 2010, section 4.2.2): a detection is compared with the object of its
    class that it overlaps most, even if a better detection has found that one already; COCO's would take a second-best
    object then. It is right at IoU >= 0.5, and ignored if that object is difficult (or a crowd, which VOC has not).
    """
    ious, nearest = best_overlaps(pairs.where(pairs.is_same_class), len(found.scores))
    hits = ious >= POSITIVE_IOU
    is_ignored = hits & objects.is_ignored[nearest] if len(objects.labels) else hits
    order = np.argsort(-found.scores, kind="stable")
    candidates = order[(hits & ~is_ignored)[order]]
    _, first = np.unique(nearest[candidates], return_index=True)  # the best detection of each object
    is_correct = np.zeros(len(found.scores), dtype=bool)
    is_correct[candidates[first]] = True
    values: dict[str, list[float]] = {rule: [] for rule in RULES}
    num_objects = np.bincount(objects.labels[~objects.is_ignored], minlength=num_classes)
    for rows, count in zip(rows_by_class(found.labels, num_classes), num_objects.tolist(), strict=True):
        kept = rows[~is_ignored[rows]]
        curve = make_curve(found.scores[kept], is_correct[kept], count)
        for rule in RULES:
            values[rule].append(average_precision(curve, rule))
    return values
