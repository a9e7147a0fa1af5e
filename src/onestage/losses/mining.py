"""Softmax cross-entropy over a few hard anchors instead of all: SSD's hard negative mining, and OHEM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from onestage.losses.arguments import require_count
from onestage.losses.class_weights import ClassWeights
from onestage.losses.focal import SoftmaxCrossEntropy
from onestage.types import BACKGROUND, IGNORE


class MinedCrossEntropy(SoftmaxCrossEntropy):
    """Softmax cross-entropy over the positives and each image's hardest negatives. SSD section 2.2 (arXiv:1512.02325).

    The hardest are the BACKGROUND anchors of largest loss, of equal ones the first. BACKGROUND are those that overlap
    every object by less than the matcher's `negative_iou`, SSD's 0.5.

    Args:
        negatives_per_positive: at least 1.
        min_negatives: of an image, at least 0; what an image without objects teaches of the background. The Caffe code
            and torchvision have 0.
        label_smoothing: as in `SoftmaxFocalLoss`.
        class_weights: see `ClassificationLoss`; they do not decide which negatives are hard.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    def __init__(
        self,
        negatives_per_positive: int = 3,
        min_negatives: int = 3,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(None, label_smoothing, class_weights)
        require_count("MinedCrossEntropy: negatives_per_positive", negatives_per_positive, 1, "SSD's is 3")
        remedy = "min_negatives: 3 lets an image without objects count like one with a single positive anchor"
        require_count("MinedCrossEntropy: min_negatives", min_negatives, 0, remedy)
        self.negatives_per_positive = negatives_per_positive
        self.min_negatives = min_negatives

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the cross-entropy of positives and mined negatives, 0 elsewhere."""
        costs = super().costs(class_logits, labels, box_quality)
        num_positives = (labels >= 0).sum(dim=1, keepdim=True)
        num_negatives = (self.negatives_per_positive * num_positives).clamp(min=self.min_negatives)
        is_mined = _hardest(costs, labels == BACKGROUND, num_negatives)
        return torch.where((labels >= 0) | is_mined, costs, 0.0)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return (
            f"negatives_per_positive={self.negatives_per_positive}, min_negatives={self.min_negatives}, "
            f"label_smoothing={self.label_smoothing}"
        )


class OHEMCrossEntropy(SoftmaxCrossEntropy):
    """Softmax cross-entropy over each image's hardest anchors, positives and background alike. arXiv:1604.03540.

    OHEM was made for the regions of a two-stage detector, where a suppression of overlapping regions comes before;
    over anchors it is the k of largest loss, as RetinaNet section 5.1 compares it. Of equal ones the first.

    Args:
        anchors_per_image: k, at least 1. RetinaNet's table 1d tries 128, 256 and 512.
        label_smoothing: as in `SoftmaxFocalLoss`.
        class_weights: see `ClassificationLoss`; they do not decide which anchors are hard.

    Raises:
        ConfigError: if an argument is out of its range.
    """

    def __init__(
        self,
        anchors_per_image: int = 128,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | ClassWeights | None = None,
    ) -> None:
        super().__init__(None, label_smoothing, class_weights)
        remedy = "RetinaNet's comparison has 128, 256 and 512"
        require_count("OHEMCrossEntropy: anchors_per_image", anchors_per_image, 1, remedy)
        self.anchors_per_image = anchors_per_image

    def costs(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the cross-entropy of the hardest anchors, 0 elsewhere."""
        costs = super().costs(class_logits, labels, box_quality)
        num_hardest = labels.new_tensor(self.anchors_per_image)
        return torch.where(_hardest(costs, labels != IGNORE, num_hardest), costs, 0.0)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"anchors_per_image={self.anchors_per_image}, label_smoothing={self.label_smoothing}"


def _hardest(costs: Tensor, is_candidate: Tensor, num_hardest: Tensor) -> Tensor:
    """Return which candidates of each image have the largest costs, [B, A] bool; num_hardest: [B, 1] or scalar."""
    hardness = costs.detach().masked_fill(~is_candidate, -torch.inf)
    order = hardness.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(costs.shape[1], device=costs.device).expand_as(order)
    rank_of_anchor = torch.empty_like(order).scatter_(1, order, ranks)  # a permutation: no two writes meet
    return is_candidate & (rank_of_anchor < num_hardest)
