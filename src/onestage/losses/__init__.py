"""The losses of a detector, and the seams that further ones are added at."""

from onestage.losses.box import BoxCoder, BoxLoss, SmoothL1Loss
from onestage.losses.classification import (
    ClassificationLoss,
    MinedCrossEntropy,
    SigmoidClassificationLoss,
    SigmoidFocalLoss,
    SoftmaxClassificationLoss,
)

__all__ = [
    "BoxCoder",
    "BoxLoss",
    "ClassificationLoss",
    "MinedCrossEntropy",
    "SigmoidClassificationLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftmaxClassificationLoss",
]
