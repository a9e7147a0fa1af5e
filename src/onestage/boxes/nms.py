"""From decoded boxes and scores to the few detections of an image: threshold, top-k, non-maximum suppression."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from onestage.types import PADDING, Detections

_SHORTLIST_FACTOR = 5  # candidates in the shortlist per wanted detection


class _Candidates(NamedTuple):
    """Boxes of one image above the threshold, at most so many of a class: by falling score, then label, then anchor."""

    scores: Tensor  # [N]
    labels: Tensor  # [N] int64
    anchors: Tensor  # [N] int64


@torch.no_grad()
def select_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    candidates_per_class: int,
    max_detections: int,
) -> Detections:
    """Keep the best boxes of each image, as SSD section 2.2 and with the same result as torchvision's SSD.

    For each class the boxes scoring above the threshold, of these the best `candidates_per_class`, of these the ones
    that no better one overlaps by more than `iou_threshold`; of all classes together the best `max_detections`. Equal
    scores are ordered by label, then by anchor.

    A lower score never suppresses a higher one, so a shortlist of the highest scores is suppressed first; the rest is
    looked at only for images where fewer than `max_detections` of the shortlist survive.

    Args:
        boxes: [B, A, 4] xyxy, px, clipped to the image.
        scores: [B, A, K], 0..1.
        score_threshold: 0..1.
        iou_threshold: 0..1.
        candidates_per_class: at least 1.
        max_detections: D, at least 1.

    Returns:
        Detections of D rows, padded with score 0 and label PADDING.
    """
    detections = _padding(boxes, max_detections)
    shortlists, is_complete = _shortlist(scores, score_threshold, candidates_per_class, max_detections)
    for image, candidates in enumerate(shortlists):
        kept = _suppress(boxes[image], candidates, iou_threshold, max_detections)
        if len(kept.scores) < max_detections and not is_complete[image]:
            candidates = _best_of_each_class(scores[image], score_threshold, candidates_per_class)
            kept = _suppress(boxes[image], candidates, iou_threshold, max_detections)
        rows = slice(len(kept.scores))
        detections.boxes[image, rows] = boxes[image, kept.anchors].float()
        detections.scores[image, rows], detections.labels[image, rows] = kept.scores, kept.labels
    return detections


def rescale_boxes(boxes: Tensor, image_size: int, original_sizes: Tensor) -> Tensor:
    """Undo the resize to a square.

    Args:
        boxes: [B, D, 4] xyxy in network-input pixels.
        image_size: side of the network input, px.
        original_sizes: [B, 2] (height, width) of each image as decoded, px.

    Returns:
        [B, D, 4] xyxy in original pixels.
    """
    factors = original_sizes.flip(-1).to(boxes.dtype) / image_size  # [B, 2] (x, y)
    return boxes * factors.repeat(1, 2)[:, None]


def _padding(boxes: Tensor, max_detections: int) -> Detections:
    batch_size = len(boxes)
    return Detections(
        boxes.new_zeros(batch_size, max_detections, 4, dtype=torch.float32),
        boxes.new_zeros(batch_size, max_detections, dtype=torch.float32),
        boxes.new_full((batch_size, max_detections), PADDING, dtype=torch.int64),
    )


def _shortlist(
    scores: Tensor, score_threshold: float, candidates_per_class: int, max_detections: int
) -> tuple[list[_Candidates], list[bool]]:
    """Return the highest scores of each image, and whether they are all there is.

    The N highest of [A, K] scores stand in the N rows with the highest maxima, so that only those rows are searched.
    A shortlist holds every better candidate of each of its own, hence its ranks within a class are the final ones.
    Only scores above the lowest of the N are taken: of those equal to it some may be missing.
    """
    num_images, num_anchors, num_classes = scores.shape
    num_rows = min(_SHORTLIST_FACTOR * max_detections, num_anchors)
    rows = scores.amax(dim=2).topk(num_rows, sorted=False).indices.sort().values  # [B, N] anchors
    offsets = torch.arange(num_images, device=scores.device)[:, None] * num_anchors
    by_label = scores.flatten(0, 1)[(rows + offsets).flatten()].view(num_images, num_rows, num_classes).mT  # [B, K, N]

    size = min(_SHORTLIST_FACTOR * max_detections, num_rows * num_classes)
    flat = by_label.flatten(1)
    places = flat.topk(size, sorted=False).indices.sort().values  # by label, then anchor
    best, order = flat.gather(1, places).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)
    labels = places // num_rows
    anchors = rows.gather(1, places % num_rows)

    all_seen = size == num_anchors * num_classes
    is_complete = (best[:, -1] <= score_threshold) | all_seen
    lowest = best[:, -1:].masked_fill(is_complete[:, None], -torch.inf)
    is_candidate = (best > score_threshold) & (best > lowest) & (_rank_in_class(labels) < candidates_per_class)
    candidates = [
        _Candidates(best[image, kept], labels[image, kept], anchors[image, kept])
        for image, kept in enumerate(is_candidate)
    ]
    return candidates, is_complete.tolist()


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return how many earlier entries of its row have the same label: [B, N] -> [B, N]."""
    grouped, order = labels.sort(dim=1, stable=True)
    starts = torch.searchsorted(grouped, grouped)
    positions = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(labels).scatter_(1, order, positions - starts)


def _best_of_each_class(scores: Tensor, score_threshold: float, candidates_per_class: int) -> _Candidates:
    """Return all candidates of one image. scores: [A, K]."""
    size = min(candidates_per_class, len(scores))
    anchors = scores.mT.topk(size, sorted=False).indices.sort().values  # [K, N]
    best, order = scores.mT.gather(1, anchors).flatten().sort(descending=True, stable=True)
    order = order[best > score_threshold]
    return _Candidates(best[: len(order)], order // size, anchors.flatten()[order])


def _suppress(boxes: Tensor, candidates: _Candidates, iou_threshold: float, max_detections: int) -> _Candidates:
    """Return the best survivors of class-wise non-maximum suppression. boxes: [A, 4].

    Beginnings of growing length are tried, since the cost is their length times their survivors.
    """
    length = 2 * max_detections
    while True:
        scores, labels, anchors = (column[:length] for column in candidates)
        kept = _class_wise_nms(boxes[anchors], scores, labels, iou_threshold)
        if len(kept) >= max_detections or length >= len(candidates.scores):
            kept = kept[:max_detections]
            return _Candidates(scores[kept], labels[kept], anchors[kept])
        length *= 2


def _class_wise_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Move each class to a place of its own, where only boxes of the same class meet, and suppress once.

    In float64: far from the origin float32 would change the overlaps in the third decimal.
    """
    if len(scores) == 0:
        return labels  # empty, as is its list of survivors
    boxes = boxes.double()
    step = boxes.max() - boxes.min() + 1
    kept: Tensor = nms(boxes + (labels * step)[:, None], scores.double(), iou_threshold)
    return kept
