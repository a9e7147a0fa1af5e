"""Random anchors and every classification loss, for tests of losses."""

import torch

from onestage import losses
from onestage.types import BACKGROUND, IGNORE

FAMILY = {
    "focal": lambda: losses.SigmoidFocalLoss(),
    "focal, gamma 0.5": lambda: losses.SigmoidFocalLoss(None, 0.5),
    "focal, smoothed": lambda: losses.SigmoidFocalLoss(label_smoothing=0.1),
    "focal, weighted": lambda: losses.SigmoidFocalLoss(class_weights=[0.5, 2.0, 1.0]),
    "softmax focal": lambda: losses.SoftmaxFocalLoss(),
    "softmax focal, gamma 0.5": lambda: losses.SoftmaxFocalLoss(None, 0.5),
    "softmax focal, smoothed": lambda: losses.SoftmaxFocalLoss(gamma=0.5, label_smoothing=0.1),
    "cross-entropy": lambda: losses.SigmoidCrossEntropy(),
    "balanced": lambda: losses.SigmoidCrossEntropy(0.25),
    "softmax cross-entropy": lambda: losses.SoftmaxCrossEntropy(label_smoothing=0.1),
    "mining": lambda: losses.MinedCrossEntropy(),
    "OHEM": lambda: losses.OHEMCrossEntropy(8),
    "adaptive": lambda: losses.AutomatedFocalLoss(),
    "quality": lambda: losses.QualityFocalLoss(),
    "varifocal": lambda: losses.VarifocalLoss(),
}


def random_anchors(num_logits: int, num_classes: int | None = None, dtype: torch.dtype = torch.float32):
    """Return logits [2, 20, C'] of both signs, and labels [2, 20] of every kind."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, num_logits, generator=generator, dtype=dtype) * 3
    labels = torch.randint(-2, num_classes or num_logits, (2, 20), generator=generator)
    assert {BACKGROUND, IGNORE, 0} <= set(labels.flatten().tolist())
    return logits.requires_grad_(), labels
