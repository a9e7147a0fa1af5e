from .augmentation import (
    SSDAugmentation as SSDAugmentation,
    SSDMinIoUCrop as SSDMinIoUCrop,
    SSDPhotometricDistort as SSDPhotometricDistort,
    SSDZoomOut as SSDZoomOut,
)
from .coco import COCO as COCO
from .datamodule import DetectionDataModule as DetectionDataModule
from .dataset import DetectionDataset as DetectionDataset, Sample as Sample, collate as collate
from .folder import ImageFolder as ImageFolder
from .loader import DetectionLoader as DetectionLoader
from .resize import (
    Letterbox as Letterbox,
    Resize as Resize,
    ShortestEdge as ShortestEdge,
    Stretch as Stretch,
)
from .samplers import (
    ClassBalancedSampling as ClassBalancedSampling,
    EvaluationSampler as EvaluationSampler,
    RepeatFactorSampling as RepeatFactorSampling,
    Sampling as Sampling,
    TrainingSampler as TrainingSampler,
)
from .shapes import Shapes as Shapes
from .source import Source as Source
from .torch_datasets import TorchDatasets as TorchDatasets, from_datasets as from_datasets
from .transforms import ScaleJitter as ScaleJitter, SeededTransform as SeededTransform, ssd_transforms as ssd_transforms
from .voc import VOC as VOC
from .yolo import YOLO as YOLO

__all__: list[str]
