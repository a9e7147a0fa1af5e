"""Overlap of boxes, and the way back from network-input pixels to original pixels."""

import torch
from torch import Tensor


def pairwise_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection, px^2, and IoU of each box with each other box, both [..., M, N].

    The IoU of two boxes without area is 0. In place where torchvision's `box_iou` copies: matching is bound by memory.
    boxes, others: [..., M, 4] and [..., N, 4] xyxy, x1 <= x2 and y1 <= y2; the leading axes broadcast.
    """
    rows, columns = boxes[..., :, None, :], others[..., None, :, :]
    width = torch.minimum(rows[..., 2], columns[..., 2]) - torch.maximum(rows[..., 0], columns[..., 0])
    height = torch.minimum(rows[..., 3], columns[..., 3]) - torch.maximum(rows[..., 1], columns[..., 1])
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    areas, other_areas = ((corners[..., 2:] - corners[..., :2]).prod(dim=-1) for corners in (boxes, others))
    union = (areas[..., :, None] + other_areas[..., None, :]).sub_(intersection)
    return intersection, intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of each box [..., 4] xyxy with its counterpart, [...], in [0, 1]; 0 where both are empty."""
    return pairwise_overlap(boxes[..., None, :], others[..., None, :])[1][..., 0, 0]


def to_original(boxes: Tensor, placements: Tensor, original_sizes: Tensor) -> Tensor:
    """Undo the resize of boxes [B, D, 4] xyxy, px: (box - offset) / scale, clipped to the original image.

    placements: [B, 4] of `Batch`. original_sizes: [B, 2] (height, width) of each image as decoded, px.
    """
    placements = placements.to(boxes.dtype)
    scales, offsets = placements[:, :2].repeat(1, 2), placements[:, 2:].repeat(1, 2)  # [B, 4] (x, y, x, y)
    original = (boxes - offsets[:, None]) / scales[:, None]
    limits = original_sizes.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None]  # [B, 1, 4]
    return original.clamp(min=0).minimum(limits)
