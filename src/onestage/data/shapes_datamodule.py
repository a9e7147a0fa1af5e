"""The embedded data set: drawn once, then read like any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import albumentations as A

from onestage.data.coco import parse_coco
from onestage.data.datamodule import DetectionDataModule, Split
from onestage.data.loader import StartMethod
from onestage.data.sampling import Sampling
from onestage.data.scenes import SHAPE_NAMES
from onestage.data.shapes import SHAPE_CATEGORY_IDS, draw_shapes
from onestage.data.voc import parse_voc
from onestage.types import AnnotationSet


class ShapesDataModule(DetectionDataModule):
    """Draws images of shapes into `root` if they are not there yet, and reads them back as COCO or VOC files.

    All other arguments are those of `DetectionDataModule`.

    Args:
        root: the folder to draw into.
        num_train: number of training images, at least 1.
        num_val: number of validation images, at least 1; odd, so that sharing them among processes is put to the test.
        draw_seed: what is drawn, >= 0.
        format: which of the two kinds of annotation files is read.
    """

    def __init__(
        self,
        root: str | Path = "data/shapes",
        *,
        num_train: int = 1000,
        num_val: int = 201,
        draw_seed: int = 0,
        format: Literal["coco", "voc"] = "coco",
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
        on_error: Literal["raise", "skip"] = "raise",
        cache: Literal["none", "disk", "ram"] = "none",
        predict_dir: str | Path | None = None,
    ) -> None:
        if class_names is None and category_ids is None:  # known before anything is drawn
            class_names, category_ids = list(SHAPE_NAMES), list(SHAPE_CATEGORY_IDS) if format == "coco" else None
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
            on_error=on_error,
            cache=cache,
            predict_dir=predict_dir,
        )
        self.num_train = num_train
        self.num_val = num_val
        self.draw_seed = draw_seed
        self.format = format

    def prepare_data(self) -> None:
        """Draw the images, unless the folder holds just these or none of them is asked for."""
        if self.predict_dir is not None and self.trainer is not None and self.trainer.state.fn == "predict":
            return
        draw_shapes(self.root, num_train=self.num_train, num_val=self.num_val, seed=self.draw_seed)

    def parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        """Read what was drawn for a split."""
        if self.format == "voc":
            return parse_voc(self.root, [split], class_names=class_names)
        annotation_file = self.root / "annotations" / f"instances_{split}.json"
        return parse_coco(annotation_file, self.root / "JPEGImages", class_names=class_names)
