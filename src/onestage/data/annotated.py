"""The annotations of a data set: each split read once, checked before training, or divided from one set."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule

from onestage.data.annotations import require_objects, require_same_categories
from onestage.data.folder import list_images
from onestage.data.image_headers import check_before_start
from onestage.data.images import read_image
from onestage.data.settings import require_classes, require_fraction, require_split
from onestage.data.splits import split_by_fold, split_by_fraction
from onestage.data.start_report import report_shared_images, report_skipped
from onestage.types import AnnotationSet, Stage

Split = Literal["train", "val", "test"]


class AnnotatedDataModule(LightningDataModule, ABC):
    """A data module as far as annotations go: classes and splits. `DetectionDataModule` adds the loaders.

    Args: see `DetectionDataModule`.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        class_names: list[str] | None,
        category_ids: list[int] | None,
        max_bad_fraction: float,
        val_fraction: float | None,
        num_folds: int | None,
        fold: int,
        predict_dir: str | Path | None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.max_bad_fraction = max_bad_fraction
        self.val_fraction = val_fraction
        self.num_folds = num_folds
        self.fold = fold
        self.predict_dir = predict_dir
        self._class_names = class_names
        self._category_ids = category_ids
        self._annotation_sets: dict[Stage, AnnotationSet] = {}
        self._divided: tuple[AnnotationSet, AnnotationSet] | None = None
        self._checked_splits: set[Stage] = set()
        some = "Set data.max_bad_fraction: 0.01 to let one box in a hundred be left out."
        require_fraction("max_bad_fraction", max_bad_fraction, some)
        require_split(val_fraction, num_folds, fold)
        require_classes(class_names, category_ids)

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of the images it delivers, px."""
        return ((self.image_size, self.image_size),)

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
        if stage == "fit":
            report_shared_images(self.annotations("train"), self.annotations("val"))

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads. It is parsed once.

        Raises:
            DataError: the split cannot be read, or its categories are not those of the training split.
        """
        stage = self._split_of(stage)
        if stage not in self._annotation_sets:
            self._annotation_sets[stage] = annotations = self._read(stage)
            report_skipped(annotations)
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
        report_skipped(replace(checked, findings=checked.findings[len(annotations.findings) :]))
        self._annotation_sets[split] = checked
        self._checked_splits.add(split)

    def _read(self, stage: Stage) -> AnnotationSet:
        if stage == "predict":
            return list_images(Path(str(self.predict_dir)), self.class_names, self.category_ids)
        if stage != "test" and self._is_divided:
            return self._parts()[stage == "val"]
        if stage == "train":
            return require_objects(self.parse("train", self._class_names))
        annotations = self.parse(stage, self.class_names)
        if self._class_names is None:
            require_same_categories(self.annotations("train"), annotations)
        return annotations

    @property
    def _is_divided(self) -> bool:
        """Whether the training set gives up a part to validate on."""
        return self.val_fraction is not None or self.num_folds is not None

    def _parts(self) -> tuple[AnnotationSet, AnnotationSet]:
        """Return the parts to train and to validate on. The set is read and divided once."""
        if self._divided is None:
            whole = self.parse("train", self._class_names)
            if self.num_folds is not None:
                train, validation = split_by_fold(whole, self.num_folds, self.fold)
            else:
                train, validation = split_by_fraction(whole, self.val_fraction or 0.0)
            self._divided = require_objects(train), validation
        return self._divided

    def read_image(self, stage: Stage, index: int) -> npt.NDArray[np.uint8]:
        """Decode image `index` of the split that `stage` reads: [H, W, 3] RGB in original pixels."""
        annotations = self.annotations(stage)
        height, width = annotations.sizes[index].tolist()
        return read_image(str(annotations.image_paths[index]), (height, width))
