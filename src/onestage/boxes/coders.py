"""Box coders: what a box head predicts, relative to an anchor, and the box that it means."""

import math

import torch
from torch import Tensor

from onestage.errors import ConfigError


class DeltaBoxCoder:
    """Offsets of the centre in anchor sizes and logarithms of the size ratios, each divided by a variance.

    R-CNN eq. 6-9 (arXiv:1311.2524), SSD eq. 2. The variances are not in the SSD paper; they come from its Caffe code.

    Args:
        variances: of the centre and of the size. Deltas are divided by them, so that they are of order one.

    Raises:
        ConfigError: if there are not two variances, both > 0.
    """

    max_log_ratio = math.log(1000 / 16)  # of decode; torchvision's bound: exp() of a wild delta must not overflow

    def __init__(self, variances: tuple[float, float] = (0.1, 0.2)) -> None:
        if len(variances) != 2 or min(variances) <= 0:
            raise ConfigError(
                f"DeltaBoxCoder: variances is {variances}; the centre's and the size's are needed, both > 0.\n"
                "SSD's are: variances: [0.1, 0.2]"
            )
        self.centre_variance, self.size_variance = variances

    def encode(self, gt_boxes: Tensor, anchors: Tensor) -> Tensor:
        """Express each ground-truth box relative to the anchor that answers for it.

        Args:
            gt_boxes: [..., 4] xyxy, px, with x1 < x2 and y1 < y2; others give infinite or NaN deltas.
            anchors: [..., 4] cxcywh, px; the leading axes broadcast.

        Returns:
            [..., 4] deltas (dx, dy, dw, dh), unitless, what the box head should have predicted.
        """
        sizes = gt_boxes[..., 2:] - gt_boxes[..., :2]
        centres = gt_boxes[..., :2] + 0.5 * sizes
        anchor_centres, anchor_sizes = anchors[..., :2], anchors[..., 2:]
        shifts = (centres - anchor_centres) / anchor_sizes / self.centre_variance
        log_ratios = (sizes / anchor_sizes).log() / self.size_variance
        return torch.cat([shifts, log_ratios], dim=-1)

    def decode(self, box_deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return the boxes that the deltas mean, the inverse of `encode`; they may reach beyond the image.

        Args:
            box_deltas: [..., 4] (dx, dy, dw, dh), unitless. A size is at most 62.5 times the anchor's.
            anchors: [..., 4] cxcywh, px; the leading axes broadcast.

        Returns:
            [..., 4] xyxy, px.
        """
        anchor_centres, anchor_sizes = anchors[..., :2], anchors[..., 2:]
        centres = box_deltas[..., :2] * self.centre_variance * anchor_sizes + anchor_centres
        log_ratios = (box_deltas[..., 2:] * self.size_variance).clamp(max=self.max_log_ratio)
        half_sizes = 0.5 * log_ratios.exp() * anchor_sizes
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)
