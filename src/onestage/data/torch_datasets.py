"""torch data sets as a source: samples (image, {"boxes", "labels"}), the convention of torchvision's detectors."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_only
from torchvision.ops import box_convert

from onestage.data.annotations import ImageColumns, ObjectColumns, build_annotation_set, malformed
from onestage.data.datamodule import DetectionDataModule
from onestage.data.images import RGBImage
from onestage.data.source import ImageReader, ReadImage, Source, Split
from onestage.errors import ConfigError, ImageError, require
from onestage.types import AnnotationSet

BACKGROUND_NAMES = ("__background__", "background")  # torchvision's list of COCO's classes begins with the first

logger = logging.getLogger(__name__)


def from_datasets(
    train: Any, val: Any = None, test: Any = None, *, class_names: Sequence[str], **settings: Any
) -> DetectionDataModule:
    """Return a data module over torch data sets: `from_datasets(my_set, class_names=["cat", "dog"], batch_size=8)`.

    The data sets, `class_names` and `first_label` are described at `TorchDatasets`, the other `settings` at
    `DetectionDataModule`.
    """
    first_label = settings.pop("first_label", None)
    source = TorchDatasets(train, val, test, class_names=class_names, first_label=first_label)
    return DetectionDataModule(source, **settings)


class TorchDatasets(Source):
    """Data sets with a length whose items are (image, {"boxes", "labels"}).

    An image is a PIL image, a tensor [3, H, W] or an array [H, W, 3]; uint8, or floats in [0, 1]. Boxes are [M, 4] xyxy
    edges in its pixels, labels [M]; `iscrowd` and `area` [M] are used if they are there. Augment with the data module:
    a set's own random transforms would move the boxes, which are read once. All samples are read when training starts.

    Args:
        train: the training split; None: only to evaluate.
        val: the validation split; None: a part of the training split.
        test: the test split.
        class_names: [K]. A leading "__background__" is removed, and labels then count from 1.
        first_label: label of the first class: 1 where 0 is the background, as torchvision's detectors have it, else 0.
            None: decided by the labels of the first split, if 0 or K occurs.
    """

    format = "torch"
    path = Path("torch data sets")

    def __init__(
        self,
        train: Any = None,
        val: Any = None,
        test: Any = None,
        *,
        class_names: Sequence[str],
        first_label: Literal[0, 1] | None = None,
    ) -> None:
        names = list(class_names)
        if names and names[0] in BACKGROUND_NAMES:
            names, first_label = names[1:], 1
        require(len(set(names)) == len(names) > 0, "from_datasets: class_names", class_names, "different names")
        require(first_label in (None, 0, 1), "from_datasets: first_label", first_label, "0, 1 or None")
        self._names, self._first_label = tuple(names), first_label
        given: dict[Split, Any] = {"train": train, "val": val, "test": test}
        self._sets = {split: samples for split, samples in given.items() if samples is not None}
        for split, samples in self._sets.items():
            has_both = hasattr(samples, "__len__") and hasattr(samples, "__getitem__") and len(samples) > 0
            rule = "a data set with a length > 0 and items (image, target), not a loader"
            require(has_both, f"from_datasets: {split}", type(samples).__name__, rule)
        require(bool(self._sets), "from_datasets", None, "at least one data set", "Pass train=..., val=...")

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those that were given."""
        return tuple(self._sets)

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The given names, and ids 1..K."""
        return self._names, tuple(range(1, len(self._names) + 1))

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the targets of a split, which also loads its images once."""
        names, samples = self._names if class_names is None else tuple(class_names), self._sets[split]
        if sorted(names) != sorted(self._names):
            problem = f"data.class_names {', '.join(names)} conflict with those of from_datasets"
            raise ConfigError(f"{problem}: {', '.join(self._names)}.\nPass the model's class_names to from_datasets.")
        rank_zero_only(logger.info)("%s: reading the targets of %d samples", split, len(samples))
        targets = [_read_target(f"{split}[{index}]", samples[index]) for index in range(len(samples))]
        labels = np.concatenate([target["labels"] for target in targets]).astype(np.int64)
        labels = labels - self._offset(split, labels)
        order = np.array([names.index(name) for name in self._names])
        boxes, areas, is_crowd = (np.concatenate([t[key] for t in targets]) for key in ("boxes", "area", "iscrowd"))
        rows = np.repeat(np.arange(len(targets)), [len(target["labels"]) for target in targets])
        paths, sizes = [f"{split}[{index}]" for index in range(len(targets))], [target["size"] for target in targets]
        return build_annotation_set(
            f"{type(samples).__name__} ({split})",
            ImageColumns(paths, np.arange(1, len(targets) + 1), np.array(sizes, np.int32)),
            ObjectColumns(rows, boxes, order[labels], areas=areas, is_crowd=is_crowd.astype(bool)),
            names,
            [self._names.index(name) + 1 for name in names],
            describe=lambda row: f"{paths[rows[row]]}: box {boxes[row].tolist()}",
        )

    def image_reader(self, split: Split, annotations: AnnotationSet) -> ImageReader:
        """Return a function that loads the image of a row."""
        return partial(_load_sample, self._sets[split], annotations)  # which workers can receive

    def _offset(self, split: Split, labels: npt.NDArray[np.int64]) -> int:
        """Return the label of the first class; AnnotationError if a label is out of range."""
        if not len(labels):
            return 0
        lowest, highest, count = int(labels.min()), int(labels.max()), len(self._names)
        if self._first_label is None:
            if lowest > 0 and highest < count:
                problem = f"from_datasets: labels {lowest}..{highest} of {count} classes may count from 0 or from 1"
                raise ConfigError(f"{problem}.\nPass first_label=1 if 0 is the background, else first_label=0.")
            self._first_label = 0 if lowest == 0 else 1
        first = self._first_label
        if not (first <= lowest and highest < first + count):
            problem = f"labels must be in {first}..{first + count - 1}, got {lowest}..{highest}"
            raise malformed(split, problem, f"Correct the labels, or class_names ({', '.join(self._names)}).")
        return first


def _load_sample(samples: Any, annotations: AnnotationSet, row: int) -> ReadImage:
    """Return the image of a row; ImageError if the data set raises or its size has changed."""
    place = str(annotations.image_paths[row])
    try:
        image = _to_rgb(place, samples[int(annotations.image_ids[row]) - 1][0])
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{place}: cannot be loaded: {str(error)[:200]}.\nCorrect the data set.") from error
    size = (image.shape[0], image.shape[1])
    if size != tuple(annotations.sizes[row].tolist()):
        problem = f"is now {size[1]} x {size[0]} px; its boxes were read for another size"
        raise ImageError(f"{place}: {problem}.\nRemove random transforms from the data set.")
    return ReadImage(image, size)


def _read_target(place: str, sample: Any) -> dict[str, npt.NDArray[Any]]:
    """Return size (height, width), boxes [M, 4], labels, area (NaN: the box's) and iscrowd [M] of a sample."""
    is_pair = isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[1], Mapping)
    if not is_pair or not sample[1].keys() >= {"boxes", "labels"}:
        found = sorted(map(str, sample[1])) if is_pair else type(sample).__name__
        remedy = "Wrap the data set, for example by torchvision.datasets.wrap_dataset_for_transforms_v2."
        raise malformed(place, f'a sample must be (image, {{"boxes", "labels"}}), got {found}', remedy)
    image, target = sample
    boxes = target["boxes"]
    if hasattr(boxes, "format"):  # torchvision's BoundingBoxes
        if (written := boxes.format.value) not in ("XYXY", "XYWH", "CXCYWH"):
            raise malformed(place, f"has boxes of the format {written}", "Give upright boxes: XYXY, XYWH or CXCYWH.")
        boxes = box_convert(boxes, written.lower(), "xyxy")
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(target["labels"]).reshape(-1)
    if len(boxes) != len(labels):
        raise malformed(place, f"has {len(boxes)} boxes and {len(labels)} labels", "Give every box a label.")
    size = _to_rgb(place, image).shape[:2]
    area = np.asarray(target.get("area", np.full(len(boxes), np.nan)), dtype=np.float64).reshape(-1)
    is_crowd = np.asarray(target.get("iscrowd", np.zeros(len(boxes)))).reshape(-1)
    return {"size": np.array(size), "boxes": boxes, "labels": labels, "area": area, "iscrowd": is_crowd}


def _to_rgb(place: str, image: Any) -> RGBImage:
    """Return [H, W, 3] uint8 of a PIL image, a tensor [3, H, W] or an array [H, W, 3]."""
    if hasattr(image, "convert") and image.mode[0] not in "IF":  # PIL; these modes have no fixed range
        return np.array(image.convert("RGB"))
    pixels = np.asarray(image)
    if hasattr(image, "permute") and pixels.ndim == 3:  # a tensor
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise malformed(place, f"an image must be RGB, got shape {tuple(pixels.shape)}", "Convert it to RGB.")
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        if not (pixels.dtype.kind == "f" and low >= 0 and high <= 1):
            problem = f"an image must be uint8, or floats in [0, 1], got {pixels.dtype} of {low:g}..{high:g}"
            raise malformed(place, problem, "Leave out Normalize: the backbone normalises.")
        pixels = (255 * pixels).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
