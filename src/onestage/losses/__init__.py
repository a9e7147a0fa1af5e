"""Classification and box losses; each name is imported on first use.

Constructors raise ConfigError for an argument outside the range in their docstring.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_NAMES = {
    "adaptive": "AutomatedFocalLoss",
    "box": "BoxLoss CIoULoss DIoULoss GIoULoss IoUBoxLoss L1Loss SmoothL1Loss",
    "class_weights": "ClassWeights EffectiveNumberWeights",
    "classification": "ClassificationLoss SigmoidClassificationLoss SoftmaxClassificationLoss",
    "focal": "SigmoidCrossEntropy SigmoidFocalLoss SoftmaxCrossEntropy SoftmaxFocalLoss",
    "mining": "MinedCrossEntropy OHEMCrossEntropy",
    "normaliser": "PositiveNormaliser",
    "quality": "QualityFocalLoss VarifocalLoss",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
