"""Box coders: the link between box outputs, anchors and boxes."""

import math

import torch
from torch import Tensor

from onestage.errors import require
from onestage.types import Anchors


class DeltaBoxCoder:
    """Centre offsets in anchor sizes and logarithms of size ratios, each divided by a variance.

    R-CNN eq. 6-9 (arXiv:1311.2524), SSD eq. 2. The variances are not in the SSD paper; they come from its Caffe code.

    Args:
        variances: two numbers > 0, of the centre and of the size, so that deltas are of order one.
    """

    num_outputs = 4
    max_log_ratio = math.log(1000 / 16)  # torchvision's bound in decode: exp() of a wild delta must not overflow

    def __init__(self, variances: tuple[float, float] = (0.1, 0.2)) -> None:
        is_valid = len(variances) == 2 and all(variance > 0 for variance in variances)
        rule = "two numbers > 0, for the centre and the size"
        require(is_valid, "DeltaBoxCoder: variances", variances, rule, "SSD's are variances: [0.1, 0.2]")
        self.centre_variance, self.size_variance = variances

    def encode(self, gt_boxes: Tensor, anchors: Anchors) -> Tensor:
        """Return deltas (dx, dy, dw, dh) [..., A, 4] of boxes [..., A, 4]; infinite or NaN for boxes without area."""
        sizes = gt_boxes[..., 2:] - gt_boxes[..., :2]
        centres = gt_boxes[..., :2] + 0.5 * sizes
        anchor_centres, anchor_sizes = anchors.boxes[..., :2], anchors.boxes[..., 2:]
        shifts = (centres - anchor_centres) / anchor_sizes / self.centre_variance
        log_ratios = (sizes / anchor_sizes).log() / self.size_variance
        return torch.cat([shifts, log_ratios], dim=-1)

    def decode(self, box_outputs: Tensor, anchors: Anchors) -> Tensor:
        """Return the boxes that deltas describe, [..., A, 4] xyxy, px, of at most 62.5 times the anchor's size."""
        anchor_centres, anchor_sizes = anchors.boxes[..., :2], anchors.boxes[..., 2:]
        centres = box_outputs[..., :2] * self.centre_variance * anchor_sizes + anchor_centres
        log_ratios = (box_outputs[..., 2:] * self.size_variance).clamp(max=self.max_log_ratio)
        half_sizes = 0.5 * log_ratios.exp() * anchor_sizes
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)


class GridBoxCoder:
    """The centre as sigmoids within the anchor's cell, the sides as logarithms of ratios to the anchor's.

    YOLOv2 section 2, "Direct location prediction" (arXiv:1612.08242): b_x = (c_x + sigmoid(t_x)) stride,
    b_w = p_w exp(t_w). Anchors stand in the middle of their cells, an offset of 0.5.
    """

    num_outputs = 4
    max_log_ratio = DeltaBoxCoder.max_log_ratio
    margin = 1e-6  # of a cell: a centre on the border of its cell has no finite logit

    def encode(self, gt_boxes: Tensor, anchors: Anchors) -> Tensor:
        """Return (t_x, t_y, t_w, t_h) [..., A, 4] of boxes [..., A, 4]; a centre outside of the cell moves into it."""
        sizes = gt_boxes[..., 2:] - gt_boxes[..., :2]
        centres = gt_boxes[..., :2] + 0.5 * sizes
        fractions = (centres - anchors.boxes[..., :2]) / anchors.strides[..., None] + 0.5
        log_ratios = (sizes / anchors.boxes[..., 2:]).log()
        return torch.cat([fractions.logit(eps=self.margin), log_ratios], dim=-1)

    def decode(self, box_outputs: Tensor, anchors: Anchors) -> Tensor:
        """Return the boxes that outputs describe, [..., A, 4] xyxy, px, of at most 62.5 times the anchor's size."""
        shifts = (box_outputs[..., :2].sigmoid() - 0.5) * anchors.strides[..., None]
        centres = anchors.boxes[..., :2] + shifts
        half_sizes = 0.5 * box_outputs[..., 2:].clamp(max=self.max_log_ratio).exp() * anchors.boxes[..., 2:]
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)


class DistanceBoxCoder:
    """Distances from the anchor's centre to the left, top, right and bottom edge, in strides.

    FCOS eq. 1 (arXiv:1904.01355); negative outputs count as 0, as in arXiv:2006.09214 and in torchvision.
    """

    num_outputs = 4

    def encode(self, gt_boxes: Tensor, anchors: Anchors) -> Tensor:
        """Return the distances [..., A, 4] of boxes [..., A, 4]; negative where the centre lies outside."""
        centres = anchors.boxes[..., :2]
        return torch.cat([centres - gt_boxes[..., :2], gt_boxes[..., 2:] - centres], dim=-1) / anchors.strides[:, None]

    def decode(self, box_outputs: Tensor, anchors: Anchors) -> Tensor:
        """Return the boxes that distances describe, [..., A, 4] xyxy, px; they contain the anchor's centre."""
        centres, distances = anchors.boxes[..., :2], box_outputs.relu() * anchors.strides[:, None]
        return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)
