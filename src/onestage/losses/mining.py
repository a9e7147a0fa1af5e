"""Softmax cross-entropy over hard anchors only: SSD's hard negative mining, and OHEM."""

import torch
from torch import Tensor

from onestage.errors import require
from onestage.losses.class_weights import Weights
from onestage.losses.focal import SoftmaxCrossEntropy
from onestage.types import BACKGROUND, IGNORE


class MinedCrossEntropy(SoftmaxCrossEntropy):
    """Softmax cross-entropy over positives and each image's hardest negatives. SSD section 2.2 (arXiv:1512.02325).

    Hard negatives are the BACKGROUND anchors with the largest loss; of equal losses the first. BACKGROUND are anchors
    that overlap every object by less than the matcher's `negative_iou`, 0.5 in SSD.

    Args:
        negatives_per_positive: >= 1; 3 in SSD.
        min_negatives: per image, >= 0; the number of negatives of an image without objects. 3 gives it the weight of an
            image with one positive anchor; it is 0 in the Caffe code and in torchvision.
        label_smoothing: as in `SoftmaxFocalLoss`.
        class_weights: they do not influence which negatives are hard.
    """

    def __init__(
        self,
        negatives_per_positive: int = 3,
        min_negatives: int = 3,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
    ) -> None:
        super().__init__(None, label_smoothing, class_weights)
        _require_count("MinedCrossEntropy: negatives_per_positive", negatives_per_positive, 1)
        _require_count("MinedCrossEntropy: min_negatives", min_negatives, 0)
        self.negatives_per_positive, self.min_negatives = negatives_per_positive, min_negatives

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the cross-entropy of positives and hard negatives, [B, A]; 0 elsewhere."""
        losses = super().per_anchor_loss(class_logits, labels, box_quality)
        num_positives = (labels >= 0).sum(dim=1, keepdim=True)
        num_negatives = (self.negatives_per_positive * num_positives).clamp(min=self.min_negatives)
        is_hard = _is_hardest(losses, labels == BACKGROUND, num_negatives)
        return torch.where((labels >= 0) | is_hard, losses, 0.0)


class OHEMCrossEntropy(SoftmaxCrossEntropy):
    """Softmax cross-entropy over each image's hardest anchors, positive or background. arXiv:1604.03540.

    OHEM was published for the regions of a two-stage detector, after NMS of these regions. Over anchors it is the k
    with the largest loss, as in RetinaNet section 5.1; of equal losses the first.

    Args:
        anchors_per_image: k, >= 1. RetinaNet's table 1d has 128, 256 and 512.
        label_smoothing: as in `SoftmaxFocalLoss`.
        class_weights: they do not influence which anchors are hard.
    """

    def __init__(
        self, anchors_per_image: int = 128, label_smoothing: float = 0.0, class_weights: Weights = None
    ) -> None:
        super().__init__(None, label_smoothing, class_weights)
        _require_count("OHEMCrossEntropy: anchors_per_image", anchors_per_image, 1)
        self.anchors_per_image = anchors_per_image

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the cross-entropy of the hardest anchors, [B, A]; 0 elsewhere."""
        losses = super().per_anchor_loss(class_logits, labels, box_quality)
        return torch.where(_is_hardest(losses, labels != IGNORE, self.anchors_per_image), losses, 0.0)


def _is_hardest(losses: Tensor, is_candidate: Tensor, num_hardest: Tensor | int) -> Tensor:
    """Return which candidates have the largest losses of their image, [B, A] bool; num_hardest: [B, 1] or a number."""
    hardness = losses.detach().masked_fill(~is_candidate, -torch.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(losses.shape[1], device=losses.device).expand_as(order)
    rank_of_anchor = torch.empty_like(order).scatter_(1, order, ranks)  # a permutation: no index occurs twice
    return is_candidate & (rank_of_anchor < num_hardest)


def _require_count(name: str, value: int, minimum: int) -> None:
    require(isinstance(value, int) and value >= minimum, name, value, f"an integer >= {minimum}")
