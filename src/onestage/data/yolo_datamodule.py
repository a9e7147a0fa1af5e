"""Data sets in YOLO format: a text file of labels for each image, and data.yaml or folders for the splits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import albumentations as A

from onestage.data.datamodule import DetectionDataModule, Split
from onestage.data.loader import StartMethod
from onestage.data.sampling import Sampling
from onestage.data.yolo import parse_yolo
from onestage.types import AnnotationSet


class YOLODataModule(DetectionDataModule):
    """Reads the splits that data.yaml names, or images/<split> and labels/<split>.

    All other arguments are those of `DetectionDataModule`.

    Args:
        root: data.yaml, or the folder of the data set; see `onestage.data.yolo.read_settings`.
        train: name of the training split.
        val: name of the validation split.
        test: name of the test split; null: testing uses the validation split.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        image_size: int = 300,
        batch_size: int = 32,
        num_workers: int | Literal["auto"] = "auto",
        prefetch_factor: int = 4,
        worker_start_method: StartMethod | None = None,
        worker_timeout_seconds: float = 300.0,
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
        super().__init__(
            root,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            worker_start_method=worker_start_method,
            worker_timeout_seconds=worker_timeout_seconds,
            train_transforms=train_transforms,
            mosaic=mosaic,
            mixup=mixup,
            multi_scale=multi_scale,
            sampling=sampling,
            seed=seed,
            class_names=class_names,
            category_ids=category_ids,
            max_bad_fraction=max_bad_fraction,
            on_error=on_error,
            cache=cache,
            val_fraction=val_fraction,
            num_folds=num_folds,
            fold=fold,
            predict_dir=predict_dir,
        )
        self._names = {"train": train, "val": val, "test": test}

    @property
    def has_test_split(self) -> bool:
        """Whether a test split was named."""
        return self._names["test"] is not None

    def parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        """Read the label files of a split."""
        return parse_yolo(
            self.root, self._names[split] or split, class_names=class_names, max_bad_fraction=self.max_bad_fraction
        )
