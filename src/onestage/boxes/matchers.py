"""Matchers: which object each anchor answers for."""

import torch
from torch import Tensor
from torch.nn import functional as F

from onestage.errors import ConfigError
from onestage.types import BACKGROUND, IGNORE, PADDING, Anchors, Targets


class IoUMatcher:
    """SSD's matching strategy (section 2.2), with RetinaNet's band of ignored anchors, for a whole batch at once.

    An anchor answers for the object it overlaps best (of equal ones the first) if their IoU is at least `positive_iou`;
    it is BACKGROUND below `negative_iou`, and IGNORE in between. Beyond that:

    - Each object keeps its best anchor even below the threshold. Of two objects with the same best anchor the one with
      the higher IoU keeps it (of equal ones the first), and the other is given the best anchor that is still free;
      one that loses twice is given none.
    - An object that overlaps no anchor is given none: any choice would teach the head a box it cannot see.
    - Padding and boxes without area are never matched.
    - Regions (label IGNORE) are never matched; an anchor with at least half of its area in one is IGNORE instead of
      BACKGROUND.

    The number of operations is the same for any B and M, and none waits for the device. The result does not depend on
    the order of the device's threads.

    Args:
        positive_iou: at least this much overlap makes an anchor positive, 0..1.
        negative_iou: less overlap than this makes it background, 0..positive_iou.

    Raises:
        ConfigError: unless 0 < negative_iou <= positive_iou <= 1.
    """

    def __init__(self, positive_iou: float = 0.5, negative_iou: float = 0.5) -> None:
        if not 0 < negative_iou <= positive_iou <= 1:
            raise ConfigError(
                f"IoUMatcher: positive_iou is {positive_iou} and negative_iou is {negative_iou}; "
                "they must satisfy 0 < negative_iou <= positive_iou <= 1.\n"
                "SSD's are positive_iou: 0.5 and negative_iou: 0.5, RetinaNet's 0.5 and 0.4"
            )
        self.positive_iou = positive_iou
        self.negative_iou = negative_iou

    def __call__(self, targets: Targets, anchors: Anchors) -> Tensor:
        """Return the match of every anchor, [B, A] int64: the row of its object in `targets`, BACKGROUND or IGNORE.

        targets: M >= 1 rows for each image, of which any number may be padding.
        """
        regions = targets.labels == IGNORE
        intersection, iou = _overlaps(targets, anchors.boxes, is_object=targets.labels >= 0)
        anchor_areas = anchors.boxes[:, 2] * anchors.boxes[:, 3]  # [A]
        covered = (intersection * regions[..., None]).amax(dim=1) >= 0.5 * anchor_areas  # [B, A]

        iou = _raise_best_anchors(iou)
        iou = _raise_best_anchors(_withdraw_taken_anchors(iou))
        best_iou, match = iou.max(dim=1)  # [B, A]; of equal ones the first

        match = torch.where(best_iou < self.positive_iou, IGNORE, match)
        return torch.where((best_iou < self.negative_iou) & ~covered, BACKGROUND, match)


def _overlaps(targets: Targets, anchors: Tensor, is_object: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersections, px^2, and IoU, both [B, M, A]; IoU is 0 in rows that hold no object.

    anchors: [A, 4] cxcywh. A box without area is made empty, so that it intersects nothing; NaN compares as such.
    """
    has_area = (targets.boxes[..., 2:] > targets.boxes[..., :2]).all(dim=-1, keepdim=True)
    boxes = torch.where(has_area, targets.boxes, 0.0)[:, :, None]  # [B, M, 1, 4]
    half_sizes = 0.5 * anchors[:, 2:]
    low, high = anchors[:, :2] - half_sizes, anchors[:, :2] + half_sizes  # [A, 2]

    width = (torch.minimum(boxes[..., 2], high[:, 0]) - torch.maximum(boxes[..., 0], low[:, 0])).clamp_(min=0)
    height = (torch.minimum(boxes[..., 3], high[:, 1]) - torch.maximum(boxes[..., 1], low[:, 1])).clamp_(min=0)
    intersection = width.mul_(height)
    box_areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])  # [B, M, 1]
    union = (box_areas + anchors[:, 2] * anchors[:, 3]).sub_(intersection)  # > 0: every anchor has an area
    return intersection, (intersection / union).mul_(is_object[..., None])


_RAISE = 2.0  # more than any IoU: a raised pair wins its anchor, and among raised pairs still the higher IoU wins


def _raise_best_anchors(iou: Tensor) -> Tensor:
    """Add 2 to the IoU of each object with its best anchor, in place; [B, M, A].

    Each row writes one cell of its own: no two writes meet, so that the device's threads may run in any order.
    """
    best_iou, best_anchor = iou.max(dim=2, keepdim=True)  # [B, M, 1]
    is_new = (best_iou > 0) & (best_iou < _RAISE)
    return iou.scatter_(2, best_anchor, best_iou + _RAISE * is_new)


def _withdraw_taken_anchors(iou: Tensor) -> Tensor:
    """Set to 0, in place, the IoU of every object with the anchors that another object holds; [B, M, A]."""
    best_iou, holder = iou.max(dim=1, keepdim=True)  # [B, 1, A]
    rows = torch.arange(iou.shape[1], device=iou.device)[:, None]  # [M, 1]
    return iou.masked_fill_((best_iou >= _RAISE) & (rows != holder), 0)


@torch.no_grad()
def assign(matcher: IoUMatcher, targets: Targets, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Return what each anchor answers for: its label, BACKGROUND or IGNORE [B, A], and the box of its row [B, A, 4].

    targets: M >= 0 rows for each image. The boxes of anchors without an object are anything.
    """
    targets = _with_a_row(targets)
    match = matcher(targets, anchors)  # [B, A]
    row = match.clamp(min=0)
    gt_boxes = targets.boxes.float().gather(1, row[..., None].expand(-1, -1, 4))
    return torch.where(match >= 0, targets.labels.gather(1, row), match), gt_boxes


def _with_a_row(targets: Targets) -> Targets:
    """Append a row of padding where there is no row at all, so that every anchor has an object to look at."""
    if targets.labels.shape[1] > 0:
        return targets
    return Targets(F.pad(targets.boxes, (0, 0, 0, 1)), F.pad(targets.labels, (0, 1), value=PADDING))
