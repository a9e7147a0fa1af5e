"""Data modules over one source, with the arguments of both in one call."""

from functools import partial
from inspect import signature
from pathlib import Path

from onestage.data import COCO, VOC, YOLO, DetectionDataModule, Shapes, Source


def data_of(kind: type[Source], path: str | Path, **settings) -> DetectionDataModule:
    source = {key: settings.pop(key) for key in signature(kind).parameters if key in settings}
    return DetectionDataModule(kind(path, **source), **settings)


coco_data, voc_data, yolo_data, shapes_data = (partial(data_of, kind) for kind in (COCO, VOC, YOLO, Shapes))
