"""From files to batches: sources, images, augmentation, samplers and the data module."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Importing albumentations would otherwise ask the package index for a newer version, two seconds when offline. This
# file runs before every module of the package, so it stands here once.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from onestage.data.augmentation import SSDAugmentation, SSDPhotometricDistort
    from onestage.data.coco import COCO
    from onestage.data.crops import ScaleJitter, SSDMinIoUCrop, SSDZoomOut
    from onestage.data.datamodule import DetectionDataModule
    from onestage.data.dataset import DetectionDataset, Sample, collate
    from onestage.data.folder import ImageFolder
    from onestage.data.loader import DetectionLoader
    from onestage.data.resize import Letterbox, Resize, Stretch
    from onestage.data.samplers import (
        ClassBalancedSampling,
        EvaluationSampler,
        RepeatFactorSampling,
        Sampling,
        TrainingSampler,
    )
    from onestage.data.shapes import Shapes
    from onestage.data.source import Source
    from onestage.data.transforms import SeededTransform, ssd_transforms
    from onestage.data.voc import VOC
    from onestage.data.yolo import YOLO

__all__ = [
    "COCO", "VOC", "YOLO", "ClassBalancedSampling", "DetectionDataModule", "DetectionDataset", "DetectionLoader",
    "EvaluationSampler", "ImageFolder", "Letterbox", "RepeatFactorSampling", "Resize", "SSDAugmentation",
    "SSDMinIoUCrop", "SSDPhotometricDistort", "SSDZoomOut", "Sample", "Sampling", "ScaleJitter", "SeededTransform",
    "Shapes", "Source", "Stretch", "TrainingSampler", "collate", "ssd_transforms",
]  # fmt: skip

# Lightning and albumentations take seconds to import, so that happens when a name is first used.
_NAMES_OF_MODULE = {
    "augmentation": "SSDAugmentation SSDPhotometricDistort",
    "coco": "COCO",
    "crops": "SSDMinIoUCrop SSDZoomOut ScaleJitter",
    "datamodule": "DetectionDataModule",
    "dataset": "DetectionDataset Sample collate",
    "folder": "ImageFolder",
    "loader": "DetectionLoader",
    "resize": "Letterbox Resize Stretch",
    "samplers": "ClassBalancedSampling EvaluationSampler RepeatFactorSampling Sampling TrainingSampler",
    "shapes": "Shapes",
    "source": "Source",
    "transforms": "SeededTransform ssd_transforms",
    "voc": "VOC",
    "yolo": "YOLO",
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
