"""Box losses: distances between predicted boxes and their objects."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from onestage.errors import require
from onestage.types import Anchors, BoxCoder

MIN_SIDE = 1e-3  # px, of a decoded box
EDGE_PRECISION = 1e-6  # px per px, of an edge far away: eight times the resolution of float32


class BoxLoss(nn.Module, ABC):
    """A loss over the boxes of positive anchors, on box outputs or on decoded boxes."""

    @abstractmethod
    def per_anchor_loss(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, is_positive: Tensor
    ) -> Tensor:
        """Return the loss of each anchor, [B, A]; where `is_positive` [B, A] is false, finite with gradient 0.

        `forward` calls it outside autocast with float32 box outputs, or better.
        """

    def forward(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, is_positive: Tensor
    ) -> Tensor:
        """Return the sum over positive anchors, a scalar; the detector divides it by their number.

        Args:
            box_outputs: [B, A, N], in the units of `box_coder`.
            gt_boxes: [B, A, 4] xyxy, px, the object of each anchor; arbitrary for non-positive anchors.
            anchors: of all levels.
            box_coder: encodes and decodes boxes.
            is_positive: [B, A] bool.
        """
        with torch.autocast(box_outputs.device.type, enabled=False):
            box_outputs = box_outputs.to(torch.promote_types(box_outputs.dtype, torch.float32))
            return (self.per_anchor_loss(box_outputs, gt_boxes, anchors, box_coder, is_positive) * is_positive).sum()


class SmoothL1Loss(BoxLoss):
    """Smooth L1 of the box outputs, summed over an anchor's outputs. Fast R-CNN eq. 3 (arXiv:1504.08083), SSD eq. 2.

    Args:
        beta: |d| at which the parabola |d|^2 / (2 beta) meets the line |d| - beta / 2, >= 0; 0 is plain L1.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        require(0 <= beta < math.inf, "SmoothL1Loss: beta", beta, "finite and >= 0", "SSD uses 1.0.")
        self.beta = beta

    def per_anchor_loss(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, is_positive: Tensor
    ) -> Tensor:
        """Return the smooth L1 distance of box outputs and encoded objects, [B, A]."""
        # Non-positive anchors have their own prediction as target, so that log(0) never enters the graph.
        encoded = box_coder.encode(gt_boxes, anchors)
        target = torch.where(is_positive[..., None], encoded, box_outputs.detach())
        return F.smooth_l1_loss(box_outputs, target, reduction="none", beta=self.beta).sum(dim=-1)


class L1Loss(SmoothL1Loss):
    """The absolute differences of the box outputs, summed over an anchor's outputs."""

    def __init__(self) -> None:
        super().__init__(beta=0.0)


class IoUBoxLoss(BoxLoss):
    """1 - IoU plus a penalty, on decoded boxes; independent of box size.

    Of order 1 per positive anchor; SSD's smooth L1 of deltas with variances is several times larger.
    """

    @staticmethod
    @abstractmethod
    def pair_losses(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return the loss of each pair of [N, 4] xyxy boxes of non-zero area, [N]."""

    def per_anchor_loss(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, is_positive: Tensor
    ) -> Tensor:
        """Return the loss of decoded boxes and objects, [B, A]."""
        boxes = box_coder.decode(box_outputs, anchors)
        # Non-positive anchors are compared with themselves, so that ratios of empty boxes never enter the graph.
        is_positive, anchor_boxes = is_positive[..., None], box_convert(anchors.boxes, "cxcywh", "xyxy")
        boxes = torch.where(is_positive, boxes, anchor_boxes)
        gt_boxes = torch.where(is_positive, gt_boxes, anchor_boxes).to(boxes.dtype)
        # Large box outputs can give boxes whose edges round to the same number: 0 / 0 in CIoU's ratio of sides.
        low, high = boxes[..., :2], boxes[..., 2:]
        min_sides = (EDGE_PRECISION * low.detach().abs()).clamp(min=MIN_SIDE)
        boxes = torch.cat([low, torch.maximum(high, low + min_sides)], dim=-1)
        return self.pair_losses(boxes.flatten(0, 1), gt_boxes.flatten(0, 1)).view(boxes.shape[:2])


class GIoULoss(IoUBoxLoss):
    """1 - IoU + the share of the enclosing box outside both boxes. arXiv:1902.09630, algorithm 2."""

    pair_losses = staticmethod(generalized_box_iou_loss)


class DIoULoss(IoUBoxLoss):
    """1 - IoU + squared distance of centres over squared diagonal of the enclosing box. arXiv:1911.08287, eq. 7."""

    pair_losses = staticmethod(distance_box_iou_loss)


class CIoULoss(IoUBoxLoss):
    """DIoU plus a penalty on the difference of aspect ratios. arXiv:1911.08287, eq. 10."""

    pair_losses = staticmethod(complete_box_iou_loss)
