"""Data modules over one source, with the arguments of both in one call."""

from pathlib import Path

from onestage.data import COCO, VOC, YOLO, DetectionDataModule, Shapes, Source

SPLIT_KEYS = ("train", "val", "test", "train_images", "val_images", "test_images")


def _build(source_class: type[Source], keys: tuple[str, ...], path: str | Path, settings: dict) -> DetectionDataModule:
    source = source_class(path, **{key: settings.pop(key) for key in keys if key in settings})
    return DetectionDataModule(source, **settings)


def coco_data(path: str | Path, **settings) -> DetectionDataModule:
    return _build(COCO, SPLIT_KEYS, path, settings)


def voc_data(path: str | Path, **settings) -> DetectionDataModule:
    return _build(VOC, (*SPLIT_KEYS[:3], "train_difficult"), path, settings)


def yolo_data(path: str | Path, **settings) -> DetectionDataModule:
    return _build(YOLO, SPLIT_KEYS[:3], path, settings)


def shapes_data(path: str | Path, **settings) -> DetectionDataModule:
    return _build(Shapes, ("num_train", "num_val", "draw_seed", "format"), path, settings)
