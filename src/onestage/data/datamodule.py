"""The one Lightning data module: splits, classes and loaders of any source."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import onestage.data.annotations as rules
from onestage.data.annotations import require_objects, start_messages
from onestage.data.cache import CacheKind, FileReader, open_images
from onestage.data.dataset import DetectionDataset
from onestage.data.folder import ImageFolder
from onestage.data.image_headers import check_before_start
from onestage.data.layouts import describe_source, recognise
from onestage.data.loader import DetectionLoader, StartMethod, num_auto_workers, open_loader
from onestage.data.resize import Resize, Stretch
from onestage.data.samplers import EvaluationSampler, Sampling, TrainingSampler, count_repeats
from onestage.data.source import ImageReader, Source, Split
from onestage.data.splits import DEFAULT_VAL_FRACTION, find_shared_images, split_by_fold, split_by_fraction
from onestage.data.transforms import ScaleJitter, SeededTransform, ssd_transforms
from onestage.errors import AnnotationError, ConfigError, require
from onestage.files import as_path, printable
from onestage.types import AnnotationSet, Finding, Stage

DEFAULT_IMAGE_SIZE, MIN_IMAGE_SIZE = 300, 32  # px
CALLS: dict[str, list[Stage]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}

logger = logging.getLogger(__name__)


class DetectionDataModule(LightningDataModule):
    """Loaders for a source: your data in one line with `path`, or any `source` by name.

    Args:
        source: the files and splits, such as `onestage.data.COCO`.
        path: a data set whose layout is recognised; it replaces `source`.
        image_size: side of the square network input, px, >= 32: short for `resize: Stretch(image_size)`.
        resize: fits images to the network input in another way, such as `onestage.data.Letterbox(300)` or
            `onestage.data.ShortestEdge(800, 1333)`; its size is then the network's.
        batch_size: images per process and batch.
        num_workers: processes that load images, 0 for none; auto: one per CPU core that this process may use, less
            one for training, at most 16; none on a CPU with two cores, which training needs itself.
        prefetch_factor: batches that each worker loads ahead.
        worker_start_method: how workers are started; null: Python's default. The samples are the same.
        worker_timeout_seconds: longest wait for a batch, > 0; a worker that takes longer stops the run.
        train_transforms: albumentations transforms of the training images, in order; null: SSD's augmentation. The
            resize to the network input follows.
        mosaic: probability that a training image is composed of four, in [0, 1].
        mixup: probability that a training image is blended with another, in [0, 1].
        scale_jitter: smallest and largest factor by which training images are scaled at random; null: none.
        sampling: how often an epoch shows each training image, such as `onestage.data.RepeatFactorSampling`; null:
            every image once.
        seed: of the order of the images and of the augmentation, >= 0.
        class_names: the classes in label order; null: those of the training annotations.
        category_ids: the data set's own id of each class, for result files; null: those of the training annotations.
        max_bad_fraction: fraction of the boxes, and of the images, that may be skipped, in [0, 1].
        on_error: whether an unreadable training image stops the run (`raise`) or is replaced by another (`skip`).
        cache: where smaller copies of the training images are kept: `none` or `disk` (docs/data_pipeline.md).
        val_fraction: fraction of the training set to validate on, in (0, 1); null: the source's validation split, or
            0.2 of the training set if there is none.
        num_folds: number of parts of the training set, >= 2: one to validate on, the others to train on.
        fold: which of the parts to validate on, 0..num_folds - 1.
        predict_dir: folder of images, or one image, for `onestage predict`; null: the validation split.

    Raises:
        ConfigError: a value is out of its range.
        DataError: `path` is no known data set.
    """

    def __init__(
        self,
        source: Source | None = None,
        *,
        path: str | Path | None = None,
        image_size: int = DEFAULT_IMAGE_SIZE,
        resize: Resize | None = None,
        batch_size: int = 32,
        num_workers: int | Literal["auto"] = "auto",
        prefetch_factor: int = 4,
        worker_start_method: StartMethod | None = None,
        worker_timeout_seconds: float = 300.0,
        train_transforms: list[A.BasicTransform | A.BaseCompose] | None = None,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        sampling: Sampling | None = None,
        seed: int = 42,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        max_bad_fraction: float = 0.01,
        on_error: Literal["raise", "skip"] = "raise",
        cache: CacheKind = "none",
        val_fraction: float | None = None,
        num_folds: int | None = None,
        fold: int = 0,
        predict_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        require(image_size >= MIN_IMAGE_SIZE, "data.image_size", image_size, f">= {MIN_IMAGE_SIZE}")
        self._source = source
        self.path = path
        self._recognised: str | Path | None = None  # the path whose source is known
        self.resize = resize if resize is not None else Stretch(image_size)
        self.image_size, self.canvases = self.resize.longest_side, self.resize.canvases
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.worker_start_method = worker_start_method
        self.worker_timeout_seconds = worker_timeout_seconds
        self.train_transforms = train_transforms
        self.mosaic = mosaic
        self.mixup = mixup
        self._scale_jitter = [ScaleJitter(scale_jitter)] if scale_jitter is not None else []
        self.sampling = sampling
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.on_error = on_error
        self.cache = cache
        self.val_fraction = val_fraction
        self.num_folds = num_folds
        self.fold = fold
        self.predict_dir = as_path(predict_dir) if predict_dir is not None else None
        self._class_names = class_names
        self._category_ids = category_ids
        self._require_valid_settings(image_size)
        self._annotation_sets: dict[Stage, AnnotationSet] = {}
        self.shared: list[Finding] = []  # images of both training and validation split, found by `setup`
        self._train_loader: DetectionLoader | None = None
        self._position: dict[str, int] = {}  # from a checkpoint, until the training loader exists

    # What training asks for

    @property
    def source(self) -> Source:
        """The files and splits: those of `path` if given; ConfigError if there is none, DataError if it is unknown."""
        if self.path is not None and self._recognised != self.path:
            self._source, self._recognised = recognise(self.path), self.path
        if self._source is None:
            raise ConfigError("data.source: missing. Set data.path to your data set, or data.source to a class.")
        return self._source

    @property
    def num_classes(self) -> int:
        """K. Reads the training annotations unless the names are known."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """The name of each label, [K]. Reads the training annotations unless they are known."""
        if self._class_names is not None:
            return list(self._class_names)
        known = self.source.known_classes
        return list(known[0] if known is not None else self._train.class_names)

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of each label, [K]; 1..K where a data set has none."""
        if self._category_ids is not None:
            return list(self._category_ids)
        if self._source is not None or self.path is not None:
            if self.source.known_classes is not None:
                id_by_name = dict(zip(*self.source.known_classes, strict=True))
                return [id_by_name.get(name, label) for label, name in enumerate(self.class_names, start=1)]
            if "train" in self.source.splits:
                return list(self._train.category_ids)
        return list(range(1, self.num_classes + 1))

    def prepare_data(self) -> None:
        """Let the source create its files, unless only a folder of images is read."""
        is_predicting = self.trainer is not None and self.trainer.state.fn == "predict"
        if not (is_predicting and self.predict_dir is not None):
            self.source.prepare()

    def setup(self, stage: str) -> None:
        """Read what a Trainer call (fit, validate, test, predict) needs, so that all problems show before it starts."""
        if stage == "fit":  # a position that a checkpoint restores next is for the loader of this fit
            self._train_loader = None
        splits = {self._split_of(name) for name in CALLS[stage]}
        has_new = not splits <= self._annotation_sets.keys()
        for split in sorted(splits):
            self.annotations(split)
        if stage == "test" and has_new and splits == {"val"}:
            _warn("there is no test split: the validation images are read, by which a run chooses its best checkpoint")
        if stage == "fit" and has_new:
            found = [(name, self.annotations(name)) for name in self._annotation_sets]
            counts = [f"{name} {len(part)} images with {len(part.boxes)} boxes" for name, part in found]
            used = [line for line in describe_source(self.source) if not (self._is_divided and line[2:6] == "val:")]
            lines = [*used, f"  {', '.join(counts)}; {self.num_classes} classes"]
            rank_zero_info("data: " + "\n".join(lines))
            pair = [("training", self.annotations("train")), ("validation", self.annotations("val"))]
            self.shared = [] if self._is_divided else find_shared_images(pair)[0]
            for message in start_messages(self.shared, ""):
                _warn(message)

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads, without images whose header shows that they cannot be used.

        It is read and checked once. Raises DataError if it is unreadable, or of other categories than for training.
        """
        stage = self._split_of(stage)
        if stage not in self._annotation_sets:
            self._annotation_sets[stage] = annotations = self._read(stage)
            for message in start_messages(annotations.findings, annotations.source):
                _warn(message)
        return self._annotation_sets[stage]

    def read_image(self, stage: Stage, index: int) -> npt.NDArray[np.uint8]:
        """Decode image `index` of the split that `stage` reads: [H, W, 3] RGB in original pixels."""
        return self._images(stage)(index).pixels

    def _images(self, stage: Stage, cache: CacheKind = "none") -> ImageReader:
        annotations, split = self.annotations(stage), self._split_of(stage)
        if split == "predict":
            return FileReader(annotations)
        of_source = self.source.image_reader("train" if split == "val" and self._is_divided else split, annotations)
        return of_source or open_images(cache, annotations, min(map(min, self.canvases)))

    @property
    def predicted_root(self) -> Path:
        """The folder of `predict_dir`, or else of the data set: results name its images relative to it."""
        given = self.predict_dir or self.source.path
        return given if given.is_dir() else given.parent

    # Loaders

    def train_dataloader(self) -> DetectionLoader:
        """Return the augmented training images; (seed, epoch) decide their order and augmentation."""
        annotations = self.annotations("train")
        transforms = ssd_transforms(self.resize) if self.train_transforms is None else self.train_transforms
        dataset = DetectionDataset(
            annotations,
            SeededTransform([*self._scale_jitter, *transforms], self.resize),
            seed=self.seed,
            train_difficult=self.source.train_difficult,
            mosaic=self.mosaic,
            mixup=self.mixup,
            on_error=self.on_error,
            images=self._images("train", self.cache),
            max_bad_fraction=self.max_bad_fraction,
        )
        if getattr(self.trainer, "overfit_batches", 0):  # the same images in every epoch
            return self._loader(dataset, partial(EvaluationSampler, is_even=True))
        repeats = None if self.sampling is None else count_repeats(self.sampling, annotations)
        self._train_loader = self._loader(dataset, partial(TrainingSampler, seed=self.seed, repeats=repeats))
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
        """Return the position inside the epoch for a checkpoint; Lightning would restore the loader's too late."""
        return self._train_loader.state_dict() if self._train_loader is not None else dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's position for the training loader, which refuses one of other settings."""
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)
        else:
            self._position = dict(state_dict)

    def _evaluation_loader(self, stage: Stage) -> DetectionLoader:
        dataset = DetectionDataset(
            self.annotations(stage),
            SeededTransform([], self.resize),
            train_difficult=self._source is None or self._source.train_difficult,
            images=self._images(stage),
            on_error="leave_out",
        )
        return self._loader(dataset, EvaluationSampler)

    def _loader(
        self, dataset: DetectionDataset, sampler: Callable[..., TrainingSampler | EvaluationSampler]
    ) -> DetectionLoader:
        rank, world_size, num_local, is_cpu = 0, 1, 1, False
        if self.trainer is not None:
            rank, world_size, num_local = self.trainer.global_rank, self.trainer.world_size, self.trainer.num_devices
            is_cpu = self.trainer.strategy.root_device.type == "cpu"
        return open_loader(
            dataset,
            sampler(dataset, batch_size=self.batch_size, rank=rank, world_size=world_size),
            batch_size=self.batch_size,
            num_workers=num_auto_workers(num_local, is_cpu) if self.num_workers == "auto" else self.num_workers,
            prefetch_factor=self.prefetch_factor,
            start_method=self.worker_start_method,
            timeout_seconds=self.worker_timeout_seconds,
        )

    # Splits

    def _split_of(self, stage: Stage) -> Stage:
        """Return the split that a stage reads: test and predict fall back to the validation split."""
        if stage == "predict" and self.predict_dir is None and self.source.splits == ("test",):
            return "test"  # such as a folder of images
        no_test = stage == "test" and "test" not in self.source.splits
        return "val" if no_test or (stage == "predict" and self.predict_dir is None) else stage

    def _read(self, stage: Stage) -> AnnotationSet:
        if stage == "predict":
            images = ImageFolder(str(self.predict_dir)).read("test", self.class_names)
            return replace(images, category_ids=tuple(self.category_ids))
        if stage != "test" and self._is_divided:
            return self._parts[stage == "val"]
        if stage == "train":
            return require_objects(self._checked(self._train, stage))
        try:
            annotations = self._parse(stage, self.class_names)
        except AnnotationError as reason:
            if stage == "test":
                raise
            raise AnnotationError(f"{reason}\nOr hold out training images instead: data.val_fraction: 0.2") from None
        return self._checked(annotations, stage)

    def _checked(self, annotations: AnnotationSet, split: Split) -> AnnotationSet:
        """Return a split without images that cannot be used, if they are files."""
        if self.source.image_reader(split, annotations) is not None:
            return annotations
        return check_before_start(annotations, self.image_size, self.max_bad_fraction)

    def _parse(self, split: Split, class_names: Sequence[str] | None) -> AnnotationSet:
        annotations = self.source.read(split, class_names)
        num_used = len(annotations), len(annotations.boxes)
        rules.require_few_skipped(annotations.source, *num_used, annotations.findings, self.max_bad_fraction)
        of_train = split != "train" and self._class_names is None and "train" in self.source.splits
        if of_train:
            rules.require_same_categories(self._train, annotations)
        return rules.fill_category_ids(annotations, self._train.category_ids if of_train else self._category_ids or ())

    @cached_property
    def _train(self) -> AnnotationSet:
        """The source's training split, parsed once."""
        return require_objects(self._parse("train", self._class_names))

    @property
    def _is_divided(self) -> bool:
        """Whether a part of the training set is held out for validation."""
        splits = self.source.splits
        without_val = "train" in splits and "val" not in splits
        return self.val_fraction is not None or self.num_folds is not None or without_val

    @cached_property
    def _parts(self) -> tuple[AnnotationSet, AnnotationSet]:
        """The parts of the training set to train and to validate on."""
        whole = self._checked(self._train, "train")
        if self.num_folds is not None:
            train, validation = split_by_fold(whole, self.num_folds, self.fold)
        else:
            if self.val_fraction is None:
                rank_zero_info(
                    f"data: {printable(self.source.path)} has no validation split; {DEFAULT_VAL_FRACTION:g} of the "
                    "training images are held out (data.val_fraction)"
                )
            train, validation = split_by_fraction(whole, self.val_fraction or DEFAULT_VAL_FRACTION)
        return require_objects(train), validation

    def _require_valid_settings(self, image_size: int) -> None:
        side = self.resize.longest_side
        remedy = f"Set data.image_size: {side}, or leave it out."
        is_same = image_size in (DEFAULT_IMAGE_SIZE, side)
        require(is_same, "data.image_size", image_size, f"{side}, the size of data.resize", remedy)
        for name, minimum in {"batch_size": 1, "prefetch_factor": 1, "seed": 0, "num_workers": 0}.items():
            value = getattr(self, name)
            require(value == "auto" or value >= minimum, f"data.{name}", value, f">= {minimum}")
        for name in ("mosaic", "mixup", "max_bad_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}", value, "in [0, 1]")
        seconds, fraction, folds = self.worker_timeout_seconds, self.val_fraction, self.num_folds
        require(seconds > 0, "data.worker_timeout_seconds", seconds, "> 0", "Set data.worker_timeout_seconds: 300.")
        if fraction is not None and folds is not None:
            raise ConfigError("data.val_fraction conflicts with data.num_folds; set only one of them.")
        is_fraction = fraction is None or 0 < fraction < 1
        require(is_fraction, "data.val_fraction", fraction, "in (0, 1)", "Set data.val_fraction: 0.2.")
        require(folds is None or folds >= 2, "data.num_folds", folds, ">= 2, or null")
        remedy = "Set data.num_folds to the number of parts, and data.fold to the one to validate on."
        require(0 <= self.fold < (folds or 1), "data.fold", self.fold, f"in [0, {folds or 1})", remedy)
        names, ids = self._class_names, self._category_ids
        has_names = names is None or 0 < len(names) == len(set(names))
        require(has_names, "data.class_names", names, "a list of at least one name without duplicates, or null")
        has_ids = ids is None or (names is not None and len(set(ids)) == len(ids) == len(names))
        remedy = "Leave both out to use those of the training annotations."
        require(has_ids, "data.category_ids", ids, f"one id for each of data.class_names ({names})", remedy)


_warn = rank_zero_only(logger.warning)
