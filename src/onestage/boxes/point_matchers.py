"""Matchers of FCOS and ATSS: an object trains cells whose centres lie inside its box."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

from onestage.boxes.geometry import pairwise_overlap
from onestage.errors import require
from onestage.types import BACKGROUND, IGNORE, Anchors, Targets


class PointMatcher:
    """FCOS's matching (arXiv:1904.01355, section 3.2), with the centre sampling of arXiv:2006.09214.

    The centre of an anchor, its point, matches an object if it lies inside the box and less than `radius` strides from
    the box's centre along both axes, and if the farthest edge is more than 4 and less than 8 strides away. The finest
    level has no lower limit, the coarsest no upper one. A point that matches several objects takes the smallest.

    An object between the points matches none. Regions (label IGNORE) are never matched; an unmatched point inside one
    is IGNORE instead of BACKGROUND.

    Args:
        radius: of the centre, in strides, > 0.
    """

    needs_predictions = False

    def __init__(self, radius: float = 1.5) -> None:
        require(radius > 0, "PointMatcher: radius", radius, "> 0", "FCOS's is 1.5.")
        self.radius = radius

    def __call__(self, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None = None) -> Tensor:
        """Return the match of every anchor; see `onestage.boxes.matchers.Matcher`."""
        shifts, half_sides, is_inside = _offsets(targets.boxes, anchors)
        farthest = torch.maximum(half_sides[0] + shifts[0], half_sides[1] + shifts[1])
        low, high = 4 * anchors.strides, 8 * anchors.strides
        low[: anchors.level_sizes[0]] = 0
        high[len(high) - anchors.level_sizes[-1] :] = torch.inf
        is_match = is_inside & (torch.maximum(*shifts) < self.radius * anchors.strides)
        is_match &= (farthest > low) & (farthest < high) & (targets.labels >= 0)[..., None]
        areas = torch.where(is_match, half_sides[0] * half_sides[1], torch.inf)  # a quarter, in the same order
        smallest, match = areas.min(dim=1)  # the first of equal ones
        return torch.where(smallest < torch.inf, match, _unmatched(is_inside, targets))


class ATSSMatcher:
    """Adaptive training sample selection (arXiv:1912.02424, algorithm 1), for one anchor per cell.

    The candidates of an object are the `num_candidates` anchors of each level whose centres are nearest to its own. It
    matches those whose IoU is at least the mean of the candidates' IoUs plus their standard deviation, and whose centre
    lies inside its box. Of several objects an anchor takes the one that it overlaps most. Of candidates at the same
    distance any may be chosen. Regions: see `PointMatcher`.

    Args:
        num_candidates: of each level, >= 1; the paper's k.
    """

    needs_predictions = False

    def __init__(self, num_candidates: int = 9) -> None:
        require(num_candidates >= 1, "ATSSMatcher: num_candidates", num_candidates, ">= 1", "The paper's is 9.")
        self.num_candidates = num_candidates

    def __call__(self, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None = None) -> Tensor:
        """Return the match of every anchor; see `onestage.boxes.matchers.Matcher`."""
        shifts, _, is_inside = _offsets(targets.boxes, anchors)
        iou = pairwise_overlap(targets.boxes, box_convert(anchors.boxes, "cxcywh", "xyxy"))[1]  # [B, M, A]
        nearest, start = [], 0
        for level in torch.split(torch.hypot(*shifts), list(anchors.level_sizes), dim=2):
            nearest.append(start + level.topk(min(self.num_candidates, level.shape[2]), largest=False).indices)
            start += level.shape[2]
        candidates = torch.cat(nearest, dim=2)  # [B, M, N]
        ious = iou.gather(2, candidates)
        threshold = ious.mean(dim=2, keepdim=True) + ious.std(dim=2, keepdim=True)
        is_match = (ious >= threshold) & is_inside.gather(2, candidates) & (targets.labels >= 0)[..., None]
        best, match = torch.zeros_like(iou).scatter_(2, candidates, ious * is_match).max(dim=1)
        return torch.where(best > 0, match, _unmatched(is_inside, targets))


def _offsets(boxes: Tensor, anchors: Anchors) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Return |dx| and |dy| from box to anchor centres, [B, M, A], and half widths and heights, [B, M, 1], px.

    And whether the anchor centre lies inside the box, [B, M, A]; false for boxes without area, or with NaN.
    """
    centres = (boxes[..., None, :2] + boxes[..., None, 2:]) / 2
    half_width, half_height = ((boxes[..., None, 2:] - boxes[..., None, :2]) / 2).unbind(-1)
    dx, dy = ((anchors.boxes[:, axis] - centres[..., axis]).abs() for axis in (0, 1))
    return (dx, dy), (half_width, half_height), (dx < half_width) & (dy < half_height)


def _unmatched(is_inside: Tensor, targets: Targets) -> Tensor:
    """Return IGNORE in regions and else BACKGROUND, [B, A]."""
    return torch.where((is_inside & (targets.labels == IGNORE)[..., None]).any(dim=1), IGNORE, BACKGROUND)
