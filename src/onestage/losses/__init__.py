"""The losses of a detector, and the seams that further ones are added at."""

from onestage.losses.adaptive import AutomatedFocalLoss
from onestage.losses.box import BoxLoss, CIoULoss, DIoULoss, GIoULoss, IoUBoxLoss, L1Loss, SmoothL1Loss
from onestage.losses.class_weights import ClassWeights, EffectiveNumberWeights
from onestage.losses.classification import ClassificationLoss, SigmoidClassificationLoss, SoftmaxClassificationLoss
from onestage.losses.focal import SigmoidCrossEntropy, SigmoidFocalLoss, SoftmaxCrossEntropy, SoftmaxFocalLoss
from onestage.losses.mining import MinedCrossEntropy, OHEMCrossEntropy
from onestage.losses.normaliser import PositiveNormaliser
from onestage.losses.quality import QualityFocalLoss, VarifocalLoss

__all__ = [
    "AutomatedFocalLoss",
    "BoxLoss",
    "CIoULoss",
    "ClassWeights",
    "ClassificationLoss",
    "DIoULoss",
    "EffectiveNumberWeights",
    "GIoULoss",
    "IoUBoxLoss",
    "L1Loss",
    "MinedCrossEntropy",
    "OHEMCrossEntropy",
    "PositiveNormaliser",
    "QualityFocalLoss",
    "SigmoidClassificationLoss",
    "SigmoidCrossEntropy",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftmaxClassificationLoss",
    "SoftmaxCrossEntropy",
    "SoftmaxFocalLoss",
    "VarifocalLoss",
]
