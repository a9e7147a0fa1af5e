"""YOLO's matcher: each object trains one anchor, or a few, of the cells that hold its centre."""

import torch
from torch import Tensor

from onestage.boxes.geometry import pairwise_overlap
from onestage.boxes.matchers import empty_without_area
from onestage.errors import require
from onestage.types import BACKGROUND, IGNORE, Anchors, Targets


class CellMatcher:
    """The matching of YOLOv2 and YOLOv3 (arXiv:1804.02767, section 2.1; yolo_layer.c and region_layer.c of darknet).

    - An object matches one anchor: of the cells that hold its centre, one per level, the anchor whose shape overlaps it
      best (the first of equal ones). If two objects match one anchor, the later row of the targets keeps it.
    - With `anchors_per_object` above 1 it also matches the anchors with the next best shapes in these cells. If
      several objects want an anchor, the one that ranks it higher keeps it.
    - Any other anchor is IGNORE if its predicted box overlaps an object by more than `ignore_iou`, else BACKGROUND.
    - Padding, boxes without area, and boxes whose centre lies outside the canvas are never matched.
    - Regions (label IGNORE) are never matched; an anchor whose predicted box has at least half of its area in one is
      IGNORE instead of BACKGROUND.

    Args:
        ignore_iou: in [0, 1]; 0.6 in YOLOv2, 0.7 in YOLOv3 on COCO, 0.5 in its paper and on VOC.
        anchors_per_object: n, >= 1; 1 in YOLOv2 and YOLOv3. More of them learn faster.
    """

    needs_predictions = True

    def __init__(self, ignore_iou: float = 0.7, anchors_per_object: int = 1) -> None:
        require(0 <= ignore_iou <= 1, "CellMatcher: ignore_iou", ignore_iou, "in [0, 1]", "YOLOv3's is 0.7.")
        require(anchors_per_object >= 1, "CellMatcher: anchors_per_object", anchors_per_object, ">= 1", "YOLO's is 1.")
        self.ignore_iou, self.anchors_per_object = ignore_iou, anchors_per_object

    def __call__(self, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None) -> Tensor:
        """Return the match of every anchor; see `onestage.boxes.matchers.Matcher`."""
        assert predicted_boxes is not None  # because of `needs_predictions`
        best = self.best_anchors(targets, anchors)  # [B, n M]
        rows = torch.where(best >= 0, torch.arange(best.shape[1], device=best.device), BACKGROUND)
        match = torch.full((len(best), len(anchors.boxes)), BACKGROUND, device=best.device)
        match = match.scatter_reduce(1, best.clamp(min=0), rows, "amax")  # the later row, in any order of threads
        match = torch.where(match >= 0, match % max(targets.labels.shape[1], 1), match)  # row = rank * M + object

        intersection, iou = pairwise_overlap(empty_without_area(targets.boxes), predicted_boxes)  # [B, M, A]
        is_near = (iou * (targets.labels >= 0)[..., None]).amax(dim=1) > self.ignore_iou
        in_region = (intersection * (targets.labels == IGNORE)[..., None]).amax(dim=1)
        areas = (predicted_boxes[..., 2:] - predicted_boxes[..., :2]).prod(dim=-1)
        is_covered = (in_region > 0) & (in_region >= 0.5 * areas)
        return torch.where(match >= 0, match, torch.where(is_near | is_covered, IGNORE, BACKGROUND))

    def best_anchors(self, targets: Targets, anchors: Anchors) -> Tensor:
        """Return the anchors that each object matches, [B, n M] int64, -1 for none; the best of all objects last."""
        boxes = empty_without_area(targets.boxes)
        sides, centres = boxes[..., 2:] - boxes[..., :2], (boxes[..., 2:] + boxes[..., :2]) / 2
        strides = anchors.strides[:, None]  # [A, 1]
        cells, anchor_cells = (centres[:, :, None] / strides).floor(), (anchors.boxes[:, :2] / strides).floor()
        is_in_cell = (cells == anchor_cells).all(dim=-1)  # [B, M, A]
        half, anchor_half = sides / 2, anchors.boxes[:, 2:] / 2
        shape_iou = pairwise_overlap(torch.cat([-half, half], -1), torch.cat([-anchor_half, anchor_half], -1))[1]
        shape_iou, ranks = torch.where(is_in_cell, shape_iou, 0.0), []
        for _ in range(self.anchors_per_object):
            best_iou, best = shape_iou.max(dim=2)
            ranks.append(torch.where((best_iou > 0) & (targets.labels >= 0), best, -1))
            shape_iou = shape_iou.scatter(2, best[..., None], 0.0)
        return torch.cat(ranks[::-1], dim=1)
