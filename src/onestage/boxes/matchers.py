"""Matchers: assign an object, background or "ignored" to every anchor."""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from onestage.boxes.geometry import pairwise_overlap
from onestage.errors import require
from onestage.types import BACKGROUND, IGNORE, PADDING, Anchors, Targets

BestAnchors = Literal["one", "ties"]
MAX_PAIRS = 2**25  # object-anchor pairs matched at once: 128 MB for each float32 tensor of that size


class Matcher(Protocol):
    """Rule that assigns anchors to objects."""

    needs_predictions: bool  # whether `predicted_boxes` must be given

    def __call__(self, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None) -> Tensor:
        """Return the match of every anchor, [B, A] int64: a row of `targets` (M >= 1), BACKGROUND or IGNORE.

        predicted_boxes: [B, A, 4] xyxy, px, without gradient.
        """


class IoUMatcher:
    """SSD's matching (section 2.2) with RetinaNet's band of ignored anchors, for a whole batch at once.

    An anchor matches the object it overlaps best (the first of equal ones) if their IoU is at least `positive_iou`;
    it is BACKGROUND below `negative_iou`, and IGNORE in between. In addition:

    - Each object keeps its best anchor even below the threshold. "one": one anchor per object. If two objects share
      their best anchor, the higher IoU keeps it (the first of equal ones), and the other object gets the best anchor
      that is still free; an object that loses twice gets none. "ties": every anchor that ties the best IoU of an
      object is positive, for the object that the anchor overlaps best (torchvision's and detectron2's RetinaNet).
    - An object that overlaps no anchor gets none: any choice would train the head on a box that it cannot see.
    - Padding and boxes without area are never matched.
    - Regions (label IGNORE) are never matched; an anchor with at least half of its area in one is IGNORE instead of
      BACKGROUND.

    Args:
        positive_iou: at least this IoU makes an anchor positive, in (0, 1].
        negative_iou: a lower IoU makes it background, in (0, positive_iou].
        best_anchors: the rule for the best anchors of an object, "one" or "ties".
        min_best_iou: with a lower IoU an object does not keep its best anchor, in [0, positive_iou].
    """

    needs_predictions = False

    def __init__(
        self,
        positive_iou: float = 0.5,
        negative_iou: float = 0.5,
        best_anchors: BestAnchors = "one",
        min_best_iou: float = 0.0,
    ) -> None:
        remedy = "SSD's are positive_iou: 0.5 and negative_iou: 0.5, RetinaNet's 0.5 and 0.4"
        require(0 < positive_iou <= 1, "IoUMatcher: positive_iou", positive_iou, "in (0, 1]", remedy)
        rule = f"in (0, positive_iou], and positive_iou is {positive_iou}"
        require(0 < negative_iou <= positive_iou, "IoUMatcher: negative_iou", negative_iou, rule, remedy)
        require(best_anchors in ("one", "ties"), "IoUMatcher: best_anchors", best_anchors, "one or ties")
        require(0 <= min_best_iou <= positive_iou, "IoUMatcher: min_best_iou", min_best_iou, f"in [0, {positive_iou}]")
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.best_anchors, self.min_best_iou = best_anchors, min_best_iou

    def __call__(self, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None = None) -> Tensor:
        """Return the match of every anchor; see `Matcher`."""
        boxes = empty_without_area(targets.boxes)
        intersection, iou = pairwise_overlap(boxes, box_convert(anchors.boxes, "cxcywh", "xyxy"))  # [B, M, A]
        iou = iou.mul_((targets.labels >= 0)[..., None])
        regions = (targets.labels == IGNORE)[..., None]
        is_covered = (intersection * regions).amax(dim=1) >= 0.5 * anchors.boxes[:, 2:].prod(dim=1)  # [B, A]

        if self.best_anchors == "one":
            iou = _raise_best_anchors(iou, self.min_best_iou)
            iou = _raise_best_anchors(_withdraw_taken_anchors(iou), self.min_best_iou)
        best_iou, match = iou.max(dim=1)  # [B, A]; the first of equal ones
        is_matched = best_iou >= self.positive_iou  # raised pairs are
        if self.best_anchors == "ties":
            is_best = (iou == iou.amax(dim=2, keepdim=True)) & (iou > 0) & (iou >= self.min_best_iou)
            is_matched |= is_best.any(dim=1)
        unmatched = torch.where((best_iou < self.negative_iou) & ~is_covered, BACKGROUND, IGNORE)
        return torch.where(is_matched, match, unmatched)


def empty_without_area(boxes: Tensor) -> Tensor:
    """Replace boxes without area, or with NaN, by empty ones, which overlap nothing. boxes: [..., 4] xyxy."""
    return torch.where((boxes[..., 2:] > boxes[..., :2]).all(dim=-1, keepdim=True), boxes, 0.0)


_RAISE = 2.0  # above any IoU: a raised pair wins its anchor, and among raised pairs the higher IoU still wins


def _raise_best_anchors(iou: Tensor, minimum: float) -> Tensor:
    """Add 2 to the IoU of each object with its best anchor, if it is at least `minimum`, in place; [B, M, A].

    Each row writes its own cell, so the result does not depend on the order of the device's threads.
    """
    best_iou, best_anchor = iou.max(dim=2, keepdim=True)  # [B, M, 1]
    is_new = (best_iou > 0) & (best_iou >= minimum) & (best_iou < _RAISE)
    return iou.scatter_(2, best_anchor, best_iou + _RAISE * is_new)


def _withdraw_taken_anchors(iou: Tensor) -> Tensor:
    """Set to 0, in place, the IoU of every object with anchors that another object holds; [B, M, A]."""
    best_iou, holder = iou.max(dim=1, keepdim=True)  # [B, 1, A]
    rows = torch.arange(iou.shape[1], device=iou.device)[:, None]  # [M, 1]
    return iou.masked_fill_((best_iou >= _RAISE) & (rows != holder), 0)


def image_chunks(targets: Targets, anchors: Anchors) -> list[slice]:
    """Return slices of a batch of which each has at most `MAX_PAIRS` pairs of an object and an anchor, if it can."""
    num_images, num_objects = targets.labels.shape
    size = max(1, MAX_PAIRS // max(1, num_objects * len(anchors.boxes)))
    return [slice(start, start + size) for start in range(0, max(1, num_images), size)]


@torch.no_grad()
def assign(
    matcher: Matcher, targets: Targets, anchors: Anchors, predicted_boxes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Match all anchors of a batch, in chunks of images.

    Return the label of every anchor, BACKGROUND or IGNORE, [B, A], and the box of its object, [B, A, 4] xyxy, px,
    arbitrary for anchors without an object.
    """
    if targets.labels.shape[1] == 0:  # a row of padding, so that reductions over objects are defined
        targets = Targets(F.pad(targets.boxes, (0, 0, 0, 1)), F.pad(targets.labels, (0, 1), value=PADDING))
    matches = []
    for images in image_chunks(targets, anchors):
        part = predicted_boxes[images] if predicted_boxes is not None else None
        matches.append(matcher(Targets(targets.boxes[images], targets.labels[images]), anchors, part))
    match = torch.cat(matches)  # [B, A]
    row = match.clamp(min=0)
    gt_boxes = targets.boxes.float().gather(1, row[..., None].expand(-1, -1, 4))
    return torch.where(match >= 0, targets.labels.gather(1, row), match), gt_boxes
