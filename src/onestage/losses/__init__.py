"""Classification and box losses; each name is imported on first use.

Constructors raise ConfigError for an argument outside the range in their docstring.
"""

from importlib import import_module
from typing import Any

_NAMES_OF_MODULE = {
    "adaptive": "AutomatedFocalLoss",
    "box": "BoxLoss CIoULoss DIoULoss GIoULoss IoUBoxLoss L1Loss SmoothL1Loss",
    "class_weights": "ClassWeights EffectiveNumberWeights",
    "classification": "ClassificationLoss SigmoidClassificationLoss SoftmaxClassificationLoss",
    "focal": "SigmoidCrossEntropy SigmoidFocalLoss SoftmaxCrossEntropy SoftmaxFocalLoss",
    "mining": "MinedCrossEntropy OHEMCrossEntropy",
    "normaliser": "PositiveNormaliser",
    "quality": "QualityFocalLoss VarifocalLoss",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()}
__all__ = sorted(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
