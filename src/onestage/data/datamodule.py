"""The Lightning data module that all data sets share: checked settings, and loaders for every stage."""

from pathlib import Path
from typing import Any, Literal

import albumentations as A

from onestage.data.annotated import AnnotatedDataModule, Split
from onestage.data.dataset import DetectionDataset
from onestage.data.image_cache import open_images
from onestage.data.loader import DetectionLoader, StartMethod, num_auto_workers, open_loader
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.data.sampling import Sampling, checked_repeats
from onestage.data.settings import require_at_least, require_fraction, require_positive
from onestage.data.start_report import report_sampling
from onestage.data.transforms import SeededTransform, resize_transforms, training_transforms
from onestage.types import Stage

__all__ = ["DetectionDataModule", "Split"]  # what a data set of one's own needs


class DetectionDataModule(AnnotatedDataModule):
    """What every data set needs beside its own files. A data set is a subclass that says how to `parse` a split.

    Args:
        root: the folder of the data set, or the file that describes it.
        image_size: side of the square images it delivers, px, at least 32; must be the detector's.
        batch_size: images per process and step.
        num_workers: processes that load images, 0 for none; auto: one per CPU core that this process may use, less
            one for training, and at most 16.
        prefetch_factor: batches that each worker loads ahead.
        worker_start_method: how workers are started; null: as Python does by default. The samples are the same.
        worker_timeout_seconds: how long a batch is waited for, > 0, before the worker that stands still is ended and
            named with its file.
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
        on_error: whether an unreadable training image ends the run (`raise`) or another is taken for it (`skip`).
        cache: where smaller copies of the training images are kept: `none`, `disk` or `ram` (docs/data_pipeline.md).
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
        root: str | Path,
        *,
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
            image_size=image_size,
            class_names=class_names,
            category_ids=category_ids,
            max_bad_fraction=max_bad_fraction,
            val_fraction=val_fraction,
            num_folds=num_folds,
            fold=fold,
            predict_dir=predict_dir,
        )
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.worker_start_method = worker_start_method
        self.worker_timeout_seconds = worker_timeout_seconds
        self.train_transforms = train_transforms
        self.mosaic = mosaic
        self.mixup = mixup
        self.multi_scale = multi_scale
        self.sampling = sampling
        self.seed = seed
        self.on_error = on_error
        self.cache = cache
        self._train_loader: DetectionLoader | None = None
        self._position: dict[str, int] = {}  # of a checkpoint, until there is a loader to take it
        self._require_valid_settings()

    def train_dataloader(self) -> DetectionLoader:
        """Return the augmented training images, in an order and with an augmentation that (seed, epoch) decide."""
        annotations = self.annotations("train")
        transforms = training_transforms(self.train_transforms, self.image_size, self.multi_scale)
        dataset = DetectionDataset(
            annotations,
            SeededTransform(transforms, self.image_size),
            seed=self.seed,
            train_difficult=self.train_difficult,
            mosaic=self.mosaic,
            mixup=self.mixup,
            on_error=self.on_error,
            images=open_images(self.cache, annotations, self.image_size, self._num_processes),
            max_bad_fraction=self.max_bad_fraction,
        )
        repeats = None
        if self.sampling is not None:
            repeats = checked_repeats(self.sampling, annotations)
            report_sampling(annotations, repeats)
        rank, world_size = self._place()
        sampler = TrainingSampler(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            repeats=repeats,
        )
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
        for name, minimum in (("image_size", 32), ("batch_size", 1), ("prefetch_factor", 1), ("seed", 0)):
            require_at_least(name, getattr(self, name), minimum)
        require_at_least("num_workers", 0 if self.num_workers == "auto" else self.num_workers, 0)
        remedy = "Set data.worker_timeout_seconds: 300."
        require_positive("worker_timeout_seconds", self.worker_timeout_seconds, remedy)
        for name, value in (("mosaic", self.mosaic), ("mixup", self.mixup)):
            require_fraction(name, value, f"Set data.{name}: 0.5 to do so with every second image, or 0.")

    def _evaluation_loader(self, stage: Stage) -> DetectionLoader:
        dataset = DetectionDataset(
            self.annotations(stage),
            SeededTransform(resize_transforms(self.image_size), self.image_size),
            train_difficult=self.train_difficult,
        )
        rank, world_size = self._place()
        return self._loader(dataset, EvaluationSampler(dataset, rank=rank, world_size=world_size))

    def _loader(self, dataset: DetectionDataset, sampler: TrainingSampler | EvaluationSampler) -> DetectionLoader:
        return open_loader(
            dataset,
            sampler,
            batch_size=self.batch_size,
            num_workers=num_auto_workers(self._num_processes) if self.num_workers == "auto" else self.num_workers,
            prefetch_factor=self.prefetch_factor,
            start_method=self.worker_start_method,
            timeout_seconds=self.worker_timeout_seconds,
        )

    @property
    def _num_processes(self) -> int:
        """Return how many processes train on this machine."""
        return self.trainer.num_devices if self.trainer is not None else 1

    def _place(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
