"""The Lightning data module that all data sets share: checked settings, splits read once, loaders for every stage."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from onestage.data.dataset import DetectionDataset, collate
from onestage.data.folder import list_images
from onestage.data.images import read_image
from onestage.data.loader import DetectionLoader, start_worker
from onestage.data.records import require_objects
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.data.transforms import SeededTransform, resize_transforms, ssd_transforms
from onestage.errors import AnnotationError, ConfigError
from onestage.types import AnnotationSet, Stage

MAX_AUTO_WORKERS = 16  # at 200 images/s and core more than one GPU takes
NUM_QUOTED = 3  # lines of what was skipped that the warning quotes

Split = Literal["train", "val", "test"]

logger = logging.getLogger(__name__)


class DetectionDataModule(LightningDataModule, ABC):
    """What every data set needs beside its own files. A data set is a subclass that says how to `parse` a split.

    Args:
        image_size: side of the square images it delivers, px, at least 32; must be the detector's.
        batch_size: images per process and step.
        num_workers: processes that load images, 0 for none; auto: one per CPU core that this process may use, less
            one for training, and at most 16.
        prefetch_factor: batches that each worker loads ahead.
        train_transforms: albumentations transforms of the training images, in order; null: SSD's augmentation
            (`onestage.data.ssd_transforms`). A resize to `image_size` follows where it is needed.
        seed: of the order of the images and of the augmentation, >= 0.
        class_names: the classes in label order; null: those of the training annotations.
        category_ids: the data set's own id of each class, for result files; null: those of the training annotations.
        max_bad_fraction: the fraction of boxes, and of images, that may be left out because they cannot be used.
        predict_dir: folder of images, or one image, for `onestage predict`; null: the validation split.

    Raises:
        ConfigError: a value is out of its range.
    """

    train_difficult: bool = True  # a data set that flags difficult objects lets the user decide

    def __init__(
        self,
        *,
        image_size: int = 300,
        batch_size: int = 32,
        num_workers: int | Literal["auto"] = "auto",
        prefetch_factor: int = 4,
        train_transforms: list[A.BasicTransform] | None = None,
        seed: int = 42,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        max_bad_fraction: float = 0.01,
        predict_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.train_transforms = train_transforms
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.predict_dir = predict_dir
        self._class_names = class_names
        self._category_ids = category_ids
        self._annotation_sets: dict[Stage, AnnotationSet] = {}
        self._train_loader: DetectionLoader | None = None
        self._position: dict[str, int] = {}  # of a checkpoint, until there is a loader to take it
        self._require_valid_settings()

    @abstractmethod
    def parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        """Read the annotations of a split.

        Args:
            split: which one; "test" only if `has_test_split`.
            class_names: [K] names in label order; None takes those of the annotations.

        Raises:
            AnnotationError: they are missing, malformed, or of other classes.
        """

    @property
    def has_test_split(self) -> bool:
        """Whether testing has a split of its own; if not, it uses the validation split."""
        return False

    @property
    def num_classes(self) -> int:
        """K. Reads the training annotations if `class_names` was not given."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """The name of each label, [K]. Reads the training annotations if it was not given."""
        return list(self._class_names or self.annotations("train").class_names)

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of each label, [K]; 1..K where a data set has none."""
        if self._category_ids is not None:
            return list(self._category_ids)
        if self._class_names is None:
            return list(self.annotations("train").category_ids)
        return list(range(1, self.num_classes + 1))

    def setup(self, stage: str) -> None:
        """Read the annotations that a Trainer call needs, so that whatever is wrong with them shows before it starts.

        Args:
            stage: Lightning's word for the call: fit, validate, test or predict.
        """
        stages: dict[str, tuple[Stage, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for name in stages[stage]:
            self.annotations(name)

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads. It is parsed once.

        Raises:
            DataError: the split cannot be read, or its categories are not those of the training split.
        """
        if (stage == "test" and not self.has_test_split) or (stage == "predict" and self.predict_dir is None):
            stage = "val"
        if stage not in self._annotation_sets:
            self._annotation_sets[stage] = annotations = self._read(stage)
            _report_skipped(annotations)
        return self._annotation_sets[stage]

    def _read(self, stage: Stage) -> AnnotationSet:
        if stage == "predict":
            return list_images(Path(str(self.predict_dir)), self.class_names, self.category_ids)
        if stage == "train":
            return require_objects(self.parse("train", self._class_names))
        annotations = self.parse(stage, self.class_names)
        if self._class_names is None:
            _require_same_categories(self.annotations("train"), annotations)
        return annotations

    def read_image(self, stage: Stage, index: int) -> npt.NDArray[np.uint8]:
        """Decode image `index` of the split that `stage` reads: [H, W, 3] RGB in original pixels."""
        annotations = self.annotations(stage)
        height, width = annotations.sizes[index].tolist()
        return read_image(str(annotations.image_paths[index]), (height, width))

    def train_dataloader(self) -> DetectionLoader:
        """Return the augmented training images, in an order and with an augmentation that (seed, epoch) decide."""
        transforms = self.train_transforms if self.train_transforms is not None else ssd_transforms(self.image_size)
        dataset = self._dataset("train", transforms)
        rank, world_size = self._place()
        sampler = TrainingSampler(dataset, batch_size=self.batch_size, seed=self.seed, rank=rank, world_size=world_size)
        self._train_loader = self._loader(dataset, sampler)
        self._train_loader.load_state_dict(self._position)
        self._position = {}
        return self._train_loader

    def val_dataloader(self) -> DetectionLoader:
        """Return the validation images, each once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DetectionLoader:
        """Return the test images, each once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DetectionLoader:
        """Return the images to predict on, each once."""
        return self._evaluation_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Return the position inside the epoch, for a checkpoint. The loader alone would be restored too late."""
        return self._train_loader.state_dict() if self._train_loader is not None else dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's position for the training loader; that one refuses what does not fit its settings."""
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)
        else:
            self._position = dict(state_dict)

    def _require_valid_settings(self) -> None:
        num_workers = 0 if self.num_workers == "auto" else self.num_workers
        _require_at_least("image_size", self.image_size, 32)
        _require_at_least("batch_size", self.batch_size, 1)
        _require_at_least("num_workers", num_workers, 0)
        _require_at_least("prefetch_factor", self.prefetch_factor, 1)
        _require_at_least("seed", self.seed, 0)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(
                f"data.max_bad_fraction is {self.max_bad_fraction:g}; it must be in 0..1.\n"
                "Set data.max_bad_fraction: 0.01 to let one box in a hundred be left out."
            )
        _require_classes(self._class_names, self._category_ids)

    def _evaluation_loader(self, stage: Stage) -> DetectionLoader:
        dataset = self._dataset(stage, resize_transforms(self.image_size))
        rank, world_size = self._place()
        return self._loader(dataset, EvaluationSampler(dataset, rank=rank, world_size=world_size))

    def _dataset(self, stage: Stage, transforms: list[A.BasicTransform]) -> DetectionDataset:
        return DetectionDataset(
            self.annotations(stage),
            SeededTransform(transforms, self.image_size),
            seed=self.seed,
            train_difficult=self.train_difficult,
        )

    def _loader(self, dataset: DetectionDataset, sampler: TrainingSampler | EvaluationSampler) -> DetectionLoader:
        num_workers = self._auto_workers() if self.num_workers == "auto" else self.num_workers
        return DetectionLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            prefetch_factor=self.prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
        )

    def _place(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _auto_workers(self) -> int:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(max(num_cores // num_processes - 1, 0), MAX_AUTO_WORKERS)


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(
            f"data.{name} is {value}; it must be at least {minimum}.\nSet data.{name}: {minimum} or more."
        )


def _require_classes(class_names: list[str] | None, category_ids: list[int] | None) -> None:
    """Check the classes that were given by hand or by a checkpoint."""
    if class_names is not None and (not class_names or len(set(class_names)) < len(class_names)):
        raise ConfigError(
            f"data.class_names is {class_names}; it must hold at least one name, and none twice.\n"
            "Leave it out to take the classes of the training annotations."
        )
    if category_ids is None:
        return
    if class_names is None or len(set(category_ids)) != len(class_names) or len(category_ids) != len(class_names):
        raise ConfigError(
            f"data.category_ids is {category_ids}; it must give each of data.class_names ({class_names}) its own id.\n"
            "Leave both out to take those of the training annotations."
        )


def _require_same_categories(train: AnnotationSet, other: AnnotationSet) -> None:
    def written(annotations: AnnotationSet) -> str:
        pairs = zip(annotations.category_ids, annotations.class_names, strict=True)
        return f"{annotations.source}: " + ", ".join(f"{category} {name}" for category, name in pairs)

    if (train.class_names, train.category_ids) != (other.class_names, other.category_ids):
        raise AnnotationError(
            f"The splits have different categories; ids and names must be the same in all.\n{written(train)}\n"
            f"{written(other)}\nCorrect the 'categories' of one of the files."
        )


@rank_zero_only
def _report_skipped(annotations: AnnotationSet) -> None:
    """Warn, on one process, about what was left out of a split."""
    skipped = annotations.skipped
    if skipped:
        more = len(skipped) - NUM_QUOTED
        lines = [*skipped[:NUM_QUOTED], *([f"and {more} more"] if more > 0 else [])]
        logger.warning(
            "%s: %d boxes or images were left out:\n  %s", annotations.source, len(skipped), "\n  ".join(lines)
        )
