"""Data sets in COCO format: one JSON file and one folder of images for each split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import albumentations as A

from onestage.data.coco import parse_coco
from onestage.data.datamodule import DetectionDataModule, Split
from onestage.data.loader import StartMethod
from onestage.data.sampling import Sampling
from onestage.types import AnnotationSet


class COCODataModule(DetectionDataModule):
    """Reads `<root>/annotations/instances_<split>.json` and the images in `<root>/<split>/`.

    Where COCO's own train2017 and val2017 are not there, train and val are the names by default. Each of the paths can
    be given instead, relative to `root` or absolute. All other arguments are those of `DetectionDataModule`.

    Args:
        root: the folder of the data set.
        train: name of the training split.
        val: name of the validation split.
        test: name of the test split; null: testing uses the validation split.
        train_annotations: JSON file of the training split.
        train_images: its image folder.
        val_annotations: JSON file of the validation split.
        val_images: its image folder.
        test_annotations: JSON file of the test split.
        test_images: its image folder.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = "train2017",
        val: str = "val2017",
        test: str | None = None,
        train_annotations: str | Path | None = None,
        train_images: str | Path | None = None,
        val_annotations: str | Path | None = None,
        val_images: str | Path | None = None,
        test_annotations: str | Path | None = None,
        test_images: str | Path | None = None,
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
        self._annotation_files = {"train": train_annotations, "val": val_annotations, "test": test_annotations}
        self._image_folders = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def has_test_split(self) -> bool:
        """Whether a test split was named, or its annotation file given."""
        return self._names["test"] is not None or self._annotation_files["test"] is not None

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of each label, [K]; 1..K only where neither they nor training annotations are there."""
        if self._category_ids is None and self._annotation_file("train").exists():
            return list(self.annotations("train").category_ids)
        return super().category_ids

    def parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        """Read the JSON file of a split."""
        annotation_file = self._annotation_file(split)
        image_root = self.root / (self._image_folders[split] or self._name(split) or "")
        fraction = self.max_bad_fraction
        return parse_coco(annotation_file, image_root, class_names=class_names, max_bad_fraction=fraction)

    def _annotation_file(self, split: Split) -> Path:
        given = self._annotation_files[split]
        return self.root / (given or Path("annotations", f"instances_{self._name(split)}.json"))

    def _name(self, split: Split) -> str | None:
        """Return what a split is called. The default is COCO's own name, or else the plain word."""
        name = self._names[split]
        plain_file, own_file = (self.root / "annotations" / f"instances_{word}.json" for word in (split, name))
        is_default = name == f"{split}2017" and self._annotation_files[split] is None
        return split if is_default and plain_file.exists() and not own_file.exists() else name
