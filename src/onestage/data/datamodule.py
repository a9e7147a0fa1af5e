"""The Lightning data module that all data sets share: checked settings, splits read once, loaders for every stage."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from onestage.data.dataset import DetectionDataset, collate
from onestage.data.findings import start_messages
from onestage.data.folder import list_images
from onestage.data.image_headers import check_before_start
from onestage.data.images import read_image
from onestage.data.loader import DetectionLoader, num_auto_workers, start_worker
from onestage.data.records import require_objects
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.data.sampling import Sampling
from onestage.data.settings import (
    require_at_least,
    require_classes,
    require_fraction,
    require_same_categories,
    require_split,
)
from onestage.data.transforms import SeededTransform, resize_transforms, ssd_transforms
from onestage.types import AnnotationSet, Stage

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
        mosaic: probability that a training image is put together from four, 0..1.
        mixup: probability that a training image is blended with another, 0..1.
        multi_scale: smallest and largest factor by which training images are scaled at random; null: never.
        sampling: how often an epoch shows each training image, such as `onestage.data.RepeatFactorSampling`; null:
            every image once.
        seed: of the order of the images and of the augmentation, >= 0.
        class_names: the classes in label order; null: those of the training annotations.
        category_ids: the data set's own id of each class, for result files; null: those of the training annotations.
        max_bad_fraction: the fraction of boxes, and of images, that may be left out because they cannot be used.
        on_error: what happens to an image that cannot be decoded in training: `raise` ends the run, `skip` takes
            another in its place and reports it.
        cache: where images are kept once they are decoded and resized: `none`, `disk` or `ram`.
        val_fraction: share of the training set to validate on, between 0 and 1, where no split was made; null: the
            data set's own validation split.
        num_folds: number of parts to divide the training set into, >= 2: one to validate on, the others to train on.
        fold: which of the parts to validate on, 0..num_folds - 1.
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
        mosaic: float = 0.0,
        mixup: float = 0.0,
        multi_scale: tuple[float, float] | None = None,
        sampling: Sampling | None = None,
        seed: int = 42,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        max_bad_fraction: float = 0.01,
        on_error: Literal["raise", "skip"] = "raise",
        cache: Literal["none", "disk", "ram"] = "none",
        val_fraction: float | None = None,
        num_folds: int | None = None,
        fold: int = 0,
        predict_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.train_transforms = train_transforms
        self.mosaic = mosaic
        self.mixup = mixup
        self.multi_scale = multi_scale
        self.sampling = sampling
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.on_error = on_error
        self.cache = cache
        self.val_fraction = val_fraction
        self.num_folds = num_folds
        self.fold = fold
        self.predict_dir = predict_dir
        self._class_names = class_names
        self._category_ids = category_ids
        self._annotation_sets: dict[Stage, AnnotationSet] = {}
        self._checked_splits: set[Stage] = set()
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
            self._check_images(self._split_of(name))

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads. It is parsed once.

        Raises:
            DataError: the split cannot be read, or its categories are not those of the training split.
        """
        stage = self._split_of(stage)
        if stage not in self._annotation_sets:
            self._annotation_sets[stage] = annotations = self._read(stage)
            _report_skipped(annotations)
        return self._annotation_sets[stage]

    def _split_of(self, stage: Stage) -> Stage:
        is_other = (stage == "test" and not self.has_test_split) or (stage == "predict" and self.predict_dir is None)
        return "val" if is_other else stage

    def _check_images(self, split: Stage) -> None:
        """Leave out the images of a split whose headers show that they cannot be used, once."""
        annotations = self.annotations(split)
        if split in self._checked_splits or split == "predict":
            return
        checked = check_before_start(annotations, self.image_size, self.max_bad_fraction)
        _report_skipped(replace(checked, findings=checked.findings[len(annotations.findings) :]))
        self._annotation_sets[split] = checked
        self._checked_splits.add(split)

    def _read(self, stage: Stage) -> AnnotationSet:
        if stage == "predict":
            return list_images(Path(str(self.predict_dir)), self.class_names, self.category_ids)
        if stage == "train":
            return require_objects(self.parse("train", self._class_names))
        annotations = self.parse(stage, self.class_names)
        if self._class_names is None:
            require_same_categories(self.annotations("train"), annotations)
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
        require_at_least("image_size", self.image_size, 32)
        require_at_least("batch_size", self.batch_size, 1)
        require_at_least("num_workers", 0 if self.num_workers == "auto" else self.num_workers, 0)
        require_at_least("prefetch_factor", self.prefetch_factor, 1)
        require_at_least("seed", self.seed, 0)
        some = "Set data.max_bad_fraction: 0.01 to let one box in a hundred be left out."
        require_fraction("max_bad_fraction", self.max_bad_fraction, some)
        for name, value in (("mosaic", self.mosaic), ("mixup", self.mixup)):
            require_fraction(name, value, f"Set data.{name}: 0.5 to do so with every second image, or 0.")
        require_split(self.val_fraction, self.num_folds, self.fold)
        require_classes(self._class_names, self._category_ids)

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
        num_processes = self.trainer.num_devices if self.trainer is not None else 1
        num_workers = num_auto_workers(num_processes) if self.num_workers == "auto" else self.num_workers
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


@rank_zero_only
def _report_skipped(annotations: AnnotationSet) -> None:
    """Warn, on one process, about what was left out of a split."""
    for message in start_messages(annotations):
        logger.warning(message)
