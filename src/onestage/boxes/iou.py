"""Intersection over union of boxes, pairwise and paired."""

import torch
from torch import Tensor


def pairwise_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection, px^2, and IoU of each box with each other box, both [..., M, N].

    The IoU of two boxes without area is 0.

    Args:
        boxes: [..., M, 4] xyxy, x1 <= x2 and y1 <= y2; the leading axes broadcast.
        others: [..., N, 4] xyxy.
    """
    rows, columns = boxes[..., :, None, :], others[..., None, :, :]
    width = torch.minimum(rows[..., 2], columns[..., 2]) - torch.maximum(rows[..., 0], columns[..., 0])
    height = torch.minimum(rows[..., 3], columns[..., 3]) - torch.maximum(rows[..., 1], columns[..., 1])
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = (box_areas(boxes)[..., :, None] + box_areas(others)[..., None, :]).sub_(intersection)
    return intersection, intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of each box with its counterpart, [...], in [0, 1]; 0 where both are empty.

    boxes, others: [..., 4] xyxy in one unit, x1 <= x2 and y1 <= y2.
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = box_areas(boxes) + box_areas(others) - intersection
    return torch.where(union > 0, intersection / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def box_areas(boxes: Tensor) -> Tensor:
    """Return the areas [...] of boxes [..., 4] xyxy."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def as_corners(boxes: Tensor) -> Tensor:
    """Turn [..., 4] cxcywh into xyxy."""
    half_sizes = 0.5 * boxes[..., 2:]
    return torch.cat([boxes[..., :2] - half_sizes, boxes[..., :2] + half_sizes], dim=-1)
