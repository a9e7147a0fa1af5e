"""From scores of anchors to the detections of an image: threshold, top-k, non-maximum suppression."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import nms

from onestage.errors import require
from onestage.types import PADDING, Detections

CANDIDATE_FACTOR = 8  # candidates of an image per wanted detection
# Time and memory grow with the square of the boxes of one call; on a GPU every call waits, so it takes 2^16 (0.5 GB).
IMAGES_PER_CALL = {"cpu": 1}


class Selection(NamedTuple):
    """Thresholds and limits from scores to detections."""

    score_threshold: float  # lowest score, exclusive, in [0, 1)
    nms_threshold: float  # highest IoU of two detections of a class, inclusive, in [0, 1]
    max_detections: int  # D, >= 1
    candidates_per_class: int | None = None  # boxes of a class that enter suppression, >= 1 (SSD)
    candidates_per_level: int | None = None  # (anchor, class) pairs of a level that enter it, >= 1 (RetinaNet)

    def require_valid(self, name: str) -> None:
        """Raise ConfigError if a value is out of its range. name: the detector's class."""
        require(0 <= self.score_threshold < 1, f"{name}: score_threshold", self.score_threshold, "in [0, 1)")
        require(0 <= self.nms_threshold <= 1, f"{name}: nms_threshold", self.nms_threshold, "in [0, 1]")
        for key, limit in list(self._asdict().items())[2:]:
            require(limit is None or limit >= 1, f"{name}: {key}", limit, ">= 1")


@torch.no_grad()
def select_detections(boxes: Tensor, scores: Tensor, level_sizes: Sequence[int], selection: Selection) -> Detections:
    """Keep the best boxes of each image, ordered by score, then label, then anchor.

    Candidates are the best (anchor, class) pairs above the threshold: `candidates_per_level` of each level, or
    `CANDIDATE_FACTOR` per wanted detection of all levels together. A candidate survives unless a better survivor of
    its class overlaps it by more than the threshold. All shapes are fixed, so the function exports.

    boxes: [B, A, 4] xyxy, px, clipped to the image. scores: [B, A, K]. level_sizes: [L] anchors of each level.
    """
    score_threshold, nms_threshold, max_detections, candidates_per_class, candidates_per_level = selection
    if candidates_per_level is None:
        level_sizes, candidates_per_level = [scores.shape[1]], CANDIDATE_FACTOR * max_detections
    best, anchors, labels = _best_pairs(scores, level_sizes, candidates_per_level)
    is_candidate = best > score_threshold
    if candidates_per_class is not None:
        is_candidate &= _rank_in_class(labels) < candidates_per_class
    boxes = boxes.gather(1, anchors[..., None].expand(-1, -1, 4))  # [B, N, 4]
    is_kept = is_candidate & survives(boxes, labels, is_candidate, nms_threshold)

    order = (~is_kept).int().sort(dim=1, stable=True).indices[:, :max_detections]  # survivors first
    is_kept, best, labels = (values.gather(1, order) for values in (is_kept, best, labels))
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    missing = max_detections - order.shape[1]
    return Detections(
        pad(torch.where(is_kept[..., None], boxes, 0.0).float(), (0, 0, 0, missing)),
        pad(torch.where(is_kept, best, 0.0).float(), (0, missing)),
        pad(torch.where(is_kept, labels, PADDING), (0, missing), value=PADDING),
    )


def _best_pairs(scores: Tensor, level_sizes: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, anchors and labels of the best `count` pairs of each level, [B, N] each, best first."""
    num_anchors, num_classes = scores.shape[1:]
    anchors, labels, start = [], [], 0
    for size in level_sizes:
        level = scores[:, start : start + size]
        # The best pairs belong to the anchors with the highest maxima, so only their rows are sorted.
        rows = level.amax(dim=2).topk(min(count, size), sorted=False).indices  # [B, n]
        pairs = level.gather(1, rows[..., None].expand(-1, -1, num_classes)).flatten(1)
        places = pairs.topk(min(count, pairs.shape[1]), sorted=False).indices
        anchors.append(rows.gather(1, places // num_classes) + start)
        labels.append(places % num_classes)
        start += size
    # By label, then anchor, so that the stable sort by score leaves equal scores in that order.
    order = (torch.cat(labels, dim=1) * num_anchors + torch.cat(anchors, dim=1)).sort(dim=1).values
    label, anchor = order // num_anchors, order % num_anchors
    best, order = scores.flatten(1).gather(1, anchor * num_classes + label).sort(dim=1, descending=True, stable=True)
    return best, anchor.gather(1, order), label.gather(1, order)


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return the number of earlier entries of a row with the same label, [B, N]."""
    grouped, order = labels.sort(dim=1, stable=True)
    starts = torch.searchsorted(grouped, grouped)
    positions = torch.arange(labels.shape[1], device=labels.device)
    return torch.empty_like(labels).scatter_(1, order, positions - starts)


def survives(boxes: Tensor, labels: Tensor, is_candidate: Tensor, iou_threshold: float) -> Tensor:
    """Return whether a box, [B, N] best first, survives suppression by the better candidates of its class.

    Each class of each image moves to a place of its own, where no other boxes are, so that one pass suppresses all.
    In float64: far from the origin float32 would change the overlaps in the third decimal.
    """
    num_images, num_boxes = labels.shape
    if num_images == 0:
        return is_candidate
    if boxes.device.type == "mps":  # has no float64
        return survives(boxes.cpu(), labels.cpu(), is_candidate.cpu(), iou_threshold).to(boxes.device)
    ranks = torch.arange(num_boxes, device=labels.device)
    order = -(ranks + num_boxes * ~is_candidate).double()  # non-candidates rank last, so they suppress no candidate
    boxes = boxes.double().nan_to_num()  # one NaN would change the places of all boxes
    step = boxes.max() - boxes.min() + 1
    images_per_call = IMAGES_PER_CALL.get(boxes.device.type, max(1, 2**16 // num_boxes))
    kept = []
    for start in range(0, num_images, images_per_call):
        images = slice(start, start + images_per_call)
        rows = torch.arange(len(labels[images]), device=labels.device)[:, None]
        places = (labels[images] + (labels.max() + 1) * rows) * step
        moved = (boxes[images] + places[..., None]).flatten(0, 1)
        indices = nms(moved, order[images].flatten(), iou_threshold)
        kept.append(torch.zeros(len(moved), dtype=torch.bool, device=labels.device).index_fill(0, indices, True))
    return torch.cat(kept).view(num_images, num_boxes)
