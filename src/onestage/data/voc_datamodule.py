"""Data sets in PASCAL VOC format: one XML file for each image, and lists of images for each split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import albumentations as A

from onestage.data.datamodule import DetectionDataModule, Split
from onestage.data.loader import StartMethod
from onestage.data.sampling import Sampling
from onestage.data.voc import SPLIT_FOLDER, parse_voc
from onestage.errors import ConfigError
from onestage.types import AnnotationSet

# Of VOC2007 and VOC2012 side by side: "07+12", the papers' usual training set, and the only test set with annotations.
DEFAULT_SPLITS = {"train": ("2007_trainval", "2012_trainval"), "val": ("2007_test",), "test": ("2007_test",)}


class VOCDataModule(DetectionDataModule):
    """Reads the XML files in `Annotations` for the images that lists in `ImageSets/Main` name.

    `root` is one such folder, with splits named like the lists (by default `[train]` and `[val]`); or it holds VOC2007,
    VOC2012 and so on, with splits named by year and list (by default `[2007_trainval, 2012_trainval]` and
    `[2007_test]`). All other arguments are those of `DetectionDataModule`.

    Args:
        root: the folder of the data set.
        train_splits: the lists that make up the training set; null: `[train]`, or `[2007_trainval, 2012_trainval]`
            where `root` holds both years.
        val_splits: the lists that make up the validation set; null: `[val]`, or `[2007_test]` where `root` holds both.
        test_splits: the lists that make up the test set; null: testing uses the validation set.
        train_difficult: whether objects flagged as difficult are trained on, as in the SSD paper's own code. If not,
            the loss leaves their regions out. Evaluation counts them neither found nor missed.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train_splits: Sequence[str] | None = None,
        val_splits: Sequence[str] | None = None,
        test_splits: Sequence[str] | None = None,
        train_difficult: bool = True,
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
        self.train_difficult = train_difficult
        self._splits = {"train": train_splits, "val": val_splits, "test": test_splits}
        for split, lists in self._splits.items():
            if lists is not None and not lists:
                raise ConfigError(
                    f"data.{split}_splits is empty; it must name at least one list in ImageSets/Main.\n"
                    f"Set data.{split}_splits: [{split}], or leave it out."
                )

    @property
    def has_test_split(self) -> bool:
        """Whether a test set was given."""
        return self._splits["test"] is not None

    def parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        """Read the XML files of a split."""
        splits = self._splits[split] or DEFAULT_SPLITS[split]
        if self._splits[split] is None and (self.root / SPLIT_FOLDER).is_dir():
            splits = (split,)
        return parse_voc(self.root, splits, class_names=class_names, max_bad_fraction=self.max_bad_fraction)
