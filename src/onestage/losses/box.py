"""Box losses: how far the predicted boxes are from their objects."""

import math
from abc import ABC, abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from onestage.errors import ConfigError
from onestage.types import Anchors, BoxCoder

MIN_SIDE = 1e-3  # px, of a decoded box
EDGE_PRECISION = 1e-6  # of an edge far away, px per px: eight times what float32 tells apart


class BoxLoss(nn.Module, ABC):
    """A loss over the boxes of positive anchors, on deltas or on decoded boxes."""

    @abstractmethod
    def total(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, weights: Tensor
    ) -> Tensor:
        """Compute what `forward` returns, outside autocast, from deltas that are float32 or better."""

    def forward(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, weights: Tensor
    ) -> Tensor:
        """Return the sum of the loss over positive anchors, a scalar; the caller divides by their number.

        Args:
            box_outputs: [B, A, N], in the units of `box_coder`.
            gt_boxes: [B, A, 4] xyxy, px, the object of each anchor; arbitrary where the weight is 0.
            anchors: of the batch.
            box_coder: turns boxes into outputs and back.
            weights: [B, A] float >= 0 of each anchor; 0: not positive.
        """
        with torch.autocast(box_outputs.device.type, enabled=False):
            box_outputs = box_outputs.to(torch.promote_types(box_outputs.dtype, torch.float32))
            return self.total(box_outputs, gt_boxes, anchors, box_coder, weights)


class SmoothL1Loss(BoxLoss):
    """Smooth L1 of the deltas, summed over the four. Fast R-CNN eq. 3 (arXiv:1504.08083), SSD eq. 2.

    Args:
        beta: where the parabola |d|^2 / (2 beta) meets the line |d| - beta / 2, at least 0; 0 is plain L1.

    Raises:
        ConfigError: if beta is negative or not finite.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ConfigError(f"SmoothL1Loss: beta is {beta}; it must be a number, at least 0.\nSSD's is beta: 1.0")
        self.beta = beta

    def total(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, weights: Tensor
    ) -> Tensor:
        """Sum the loss of the deltas of positive anchors."""
        # Elsewhere the target is the prediction itself, so that log(0) never enters the graph.
        encoded = box_coder.encode(gt_boxes, anchors)
        target_deltas = torch.where((weights > 0)[..., None], encoded, box_outputs.detach())
        losses = F.smooth_l1_loss(box_outputs, target_deltas, reduction="none", beta=self.beta).sum(dim=-1)
        return (losses * weights).sum()

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"beta={self.beta}"


class L1Loss(SmoothL1Loss):
    """The absolute differences of the deltas, summed over the four: smooth L1 without its bend."""

    def __init__(self) -> None:
        super().__init__(beta=0.0)


class IoUBoxLoss(BoxLoss):
    """A loss on decoded boxes that does not depend on their size: 1 - IoU and a penalty.

    It is of order 1 for each positive anchor, where SSD's smooth L1 of deltas with variances is several times that.
    """

    @abstractmethod
    def losses(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return the loss of each pair, [N], of [N, 4] xyxy boxes with an area."""

    def total(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, weights: Tensor
    ) -> Tensor:
        """Sum the loss of the decoded boxes of positive anchors."""
        boxes = box_coder.decode(box_outputs, anchors)
        # Elsewhere an anchor is compared with itself, so that the ratios of empty boxes meet no arithmetic.
        centres, half_sizes = anchors.boxes[:, :2], 0.5 * anchors.boxes[:, 2:]
        whole = torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)
        is_positive = (weights > 0)[..., None]
        boxes, gt_boxes = torch.where(is_positive, boxes, whole), torch.where(is_positive, gt_boxes, whole)
        # A wild delta can mean a box whose edges round to one number, and then CIoU's ratio of sides is 0 / 0.
        low, high = boxes[..., :2], boxes[..., 2:]
        min_sides = (EDGE_PRECISION * low.detach().abs()).clamp(min=MIN_SIDE)
        boxes = torch.cat([low, torch.maximum(high, low + min_sides)], dim=-1)
        losses = self.losses(boxes.flatten(0, 1), gt_boxes.to(boxes.dtype).flatten(0, 1))
        return torch.where(is_positive.flatten(), losses * weights.flatten(), 0.0).sum()


class GIoULoss(IoUBoxLoss):
    """1 - IoU + share of the enclosing box that neither covers. arXiv:1902.09630, algorithm 2."""

    def losses(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return 0..2 for each pair."""
        return cast(Tensor, generalized_box_iou_loss(boxes, gt_boxes))


class DIoULoss(IoUBoxLoss):
    """1 - IoU + squared distance of centres over squared diagonal of the enclosing box. arXiv:1911.08287, eq. 7."""

    def losses(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return 0..2 for each pair."""
        return cast(Tensor, distance_box_iou_loss(boxes, gt_boxes))


class CIoULoss(IoUBoxLoss):
    """DIoU and a penalty on another aspect ratio. arXiv:1911.08287, eq. 10."""

    def losses(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return at least 0 for each pair."""
        return cast(Tensor, complete_box_iou_loss(boxes, gt_boxes))
