"""Random anchors and every classification loss, for tests of losses."""

import torch

from onestage.losses import (
    AutomatedFocalLoss,
    MinedCrossEntropy,
    OHEMCrossEntropy,
    QualityFocalLoss,
    SigmoidCrossEntropy,
    SigmoidFocalLoss,
    SoftmaxCrossEntropy,
    SoftmaxFocalLoss,
    VarifocalLoss,
)
from onestage.types import BACKGROUND, IGNORE

FAMILY = {
    "focal": lambda: SigmoidFocalLoss(),
    "focal, gamma 0.5": lambda: SigmoidFocalLoss(None, 0.5),
    "focal, smoothed": lambda: SigmoidFocalLoss(label_smoothing=0.1),
    "focal, weighted": lambda: SigmoidFocalLoss(class_weights=[0.5, 2.0, 1.0]),
    "softmax focal": lambda: SoftmaxFocalLoss(),
    "softmax focal, gamma 0.5": lambda: SoftmaxFocalLoss(None, 0.5),
    "softmax focal, smoothed": lambda: SoftmaxFocalLoss(gamma=0.5, label_smoothing=0.1),
    "cross-entropy": lambda: SigmoidCrossEntropy(),
    "balanced": lambda: SigmoidCrossEntropy(0.25),
    "softmax cross-entropy": lambda: SoftmaxCrossEntropy(label_smoothing=0.1),
    "mining": lambda: MinedCrossEntropy(),
    "OHEM": lambda: OHEMCrossEntropy(8),
    "adaptive": lambda: AutomatedFocalLoss(),
    "quality": lambda: QualityFocalLoss(),
    "varifocal": lambda: VarifocalLoss(),
}


def random_anchors(num_logits: int, num_classes: int | None = None, dtype: torch.dtype = torch.float32):
    """Return logits [2, 20, C'] of both signs, and labels [2, 20] of every kind."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, num_logits, generator=generator, dtype=dtype) * 3
    labels = torch.randint(-2, num_classes or num_logits, (2, 20), generator=generator)
    assert {BACKGROUND, IGNORE, 0} <= set(labels.flatten().tolist())
    return logits.requires_grad_(), labels
