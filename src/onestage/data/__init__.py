"""From files to batches: sources, images, augmentation, samplers and the data module."""

import os
from importlib import import_module
from typing import Any

# Importing albumentations would otherwise ask the package index for a newer version, two seconds when offline. This
# file runs before every module of the package, so it stands here once.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# Lightning and albumentations take seconds to import, so that happens when a name is first used.
_NAMES_OF_MODULE = {
    "augmentation": "SSDAugmentation SSDMinIoUCrop SSDPhotometricDistort SSDZoomOut",
    "coco": "COCO",
    "datamodule": "DetectionDataModule",
    "dataset": "DetectionDataset Sample collate",
    "folder": "ImageFolder",
    "loader": "DetectionLoader",
    "resize": "Letterbox Resize Stretch",
    "samplers": "ClassBalancedSampling EvaluationSampler RepeatFactorSampling Sampling TrainingSampler",
    "shapes": "Shapes",
    "source": "Source",
    "transforms": "ScaleJitter SeededTransform ssd_transforms",
    "voc": "VOC",
    "yolo": "YOLO",
}
__all__ = sorted(" ".join(_NAMES_OF_MODULE.values()).split())


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    for module, names in _NAMES_OF_MODULE.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
