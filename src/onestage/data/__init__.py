"""From files to batches: sources, annotations, images, augmentation, samplers and the data module."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Importing albumentations would otherwise ask the package index for a newer version, two seconds when offline. This
# file runs before every module of the package, so it stands here once.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from onestage.data.coco import COCO
    from onestage.data.crops import ScaleJitter, SSDMinIoUCrop, SSDZoomOut
    from onestage.data.datamodule import DetectionDataModule
    from onestage.data.dataset import DetectionDataset, Sample, collate
    from onestage.data.folder import ImageFolder
    from onestage.data.loader import DetectionLoader
    from onestage.data.photometric import SSDPhotometricDistort
    from onestage.data.samplers import EvaluationSampler, TrainingSampler
    from onestage.data.sampling import ClassBalancedSampling, RepeatFactorSampling, Sampling
    from onestage.data.shapes import Shapes
    from onestage.data.source import Source
    from onestage.data.ssd_augmentation import SSDAugmentation
    from onestage.data.transforms import SeededTransform, resize_transforms, ssd_transforms
    from onestage.data.voc import VOC
    from onestage.data.yolo import YOLO

__all__ = [
    "COCO",
    "VOC",
    "YOLO",
    "ClassBalancedSampling",
    "DetectionDataModule",
    "DetectionDataset",
    "DetectionLoader",
    "EvaluationSampler",
    "ImageFolder",
    "RepeatFactorSampling",
    "SSDAugmentation",
    "SSDMinIoUCrop",
    "SSDPhotometricDistort",
    "SSDZoomOut",
    "Sample",
    "Sampling",
    "ScaleJitter",
    "SeededTransform",
    "Shapes",
    "Source",
    "TrainingSampler",
    "collate",
    "resize_transforms",
    "ssd_transforms",
]

# Lightning and albumentations take seconds to import, so that happens when one of these is first asked for.
_MODULE_OF_NAME = {
    "COCO": "coco",
    "ImageFolder": "folder",
    "Shapes": "shapes",
    "Source": "source",
    "VOC": "voc",
    "YOLO": "yolo",
    "ClassBalancedSampling": "sampling",
    "DetectionDataModule": "datamodule",
    "DetectionDataset": "dataset",
    "DetectionLoader": "loader",
    "EvaluationSampler": "samplers",
    "RepeatFactorSampling": "sampling",
    "SSDAugmentation": "ssd_augmentation",
    "SSDMinIoUCrop": "crops",
    "SSDPhotometricDistort": "photometric",
    "SSDZoomOut": "crops",
    "Sample": "dataset",
    "Sampling": "sampling",
    "ScaleJitter": "crops",
    "SeededTransform": "transforms",
    "TrainingSampler": "samplers",
    "collate": "dataset",
    "resize_transforms": "transforms",
    "ssd_transforms": "transforms",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted({*globals(), *__all__})
