"""The run's own loggers, which continue across resumes and survive a full disk, and those of the user."""

import csv
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from onestage.errors import ConfigError, OnestageError, missing_package
from onestage.evaluation.analysis import RECALLS, Analysis
from onestage.evaluation.drawing import BATCH_FILE
from onestage.evaluation.figures import CONFUSION_FILE, CURVES_FILE, LABELS_FILE, PR_FILE
from onestage.files import atomic_write, read_rows
from onestage.training.module import stage_of
from onestage.types import JSONDict, Metrics

METRICS_FILE = "metrics.csv"
PROJECT = "onestage"  # of all runs, so that they can be compared
VERSIONS_FILE = "loggers.json"  # the ids under which trackers know this run, for a resume
PICTURES = (PR_FILE, CONFUSION_FILE, CURVES_FILE, LABELS_FILE, BATCH_FILE)
ARTIFACTS = ("report.html", "results.json", "checkpoints/best.ckpt")
MAX_CLASSES = 100  # with an AP of their own; results.json has all
MAX_IMAGES, MAX_SIDE = 8, 512  # drawn images per evaluation; TensorBoard stores them as PNG, so smaller
PACKAGES = {"WandbLogger": "onestage[wandb]", "MLFlowLogger": "onestage[mlflow]", "CometLogger": "comet-ml"}
REMEDIES = {
    "WandbLogger": "Run `wandb login` once, or set WANDB_MODE=offline.",
    "MLFlowLogger": "Check trainer.logger.init_args.tracking_uri and MLFLOW_TRACKING_URI.",
    "CometLogger": "Set COMET_API_KEY, or trainer.logger.init_args.online: false.",
}

logger = logging.getLogger(__name__)


def run_loggers(folder: Path, resumed_step: int | None = None) -> list[Logger]:
    """Return the loggers of the run in `folder`; it continues at optimizer step `resumed_step`, or is new (None)."""
    place: dict[str, Any] = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    return [EventLogger(**place, purge_step=resumed_step), TableLogger(**place, resumed_step=resumed_step)]


class EventLogger(TensorBoardLogger):
    """TensorBoard's event files. A full disk ends them and not the run."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write metrics, if there is room."""
        with failures_tolerated("TensorBoard's event files", OSError):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flush, if there is room; Lightning would also write hparams.yaml, empty because config.yaml has it all."""
        with failures_tolerated("TensorBoard's event files", OSError):
            self.experiment.flush()


class TableLogger(CSVLogger):
    """metrics.csv. Lightning's logger would delete the rows of a resumed run; a full disk ends it and not the run."""

    def __init__(self, save_dir: str, *, name: str, version: str, resumed_step: int | None) -> None:
        super().__init__(save_dir, name=name, version=version)
        self._resumed_step = resumed_step
        self._restored: set[tuple[int, frozenset[str]]] = set()  # step and keys of each restored row

    @property
    def experiment(self) -> Any:
        """Lightning's writer; at its first use the rows before the resumed step are restored."""
        if self._resumed_step is None:
            return super().experiment
        file, before, self._resumed_step = Path(self.log_dir) / METRICS_FILE, self._resumed_step, None
        header, rows = read_rows(file)  # before the writer deletes the file
        writer = super().experiment
        if header and isinstance(writer, ExperimentWriter):
            writer.metrics_keys = header
            kept = [row for row in rows if int(row["step"]) < before]
            self._restored = {(int(row["step"]), frozenset(key for key in row if row[key])) for row in kept}
            write_rows(file, header, kept)
        return writer

    def save(self) -> None:
        """Write the rows, if there is room; not those of a validation that a kill after it made the run repeat."""
        writer = self.experiment
        if self._restored and isinstance(writer, ExperimentWriter):
            writer.metrics = [row for row in writer.metrics if (row["step"], frozenset(row)) not in self._restored]
        with failures_tolerated(METRICS_FILE, OSError):
            super().save()
        self.experiment.metrics = []  # Lightning clears them only once they are written


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a table of CSV, atomically."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


_warned: set[str] = set()


@contextmanager
def failures_tolerated(name: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Warn once for each name instead of raising: no run should die because a disk is full or a server is away."""
    try:
        yield
    except OnestageError:  # a signal that ends the run
        raise
    except kind as error:
        if name not in _warned:
            _warned.add(name)
            logger.warning("%s cannot be written (%s); the run continues without.", name, first_line(error))


def first_line(error: BaseException | None) -> str:
    """Return the first line of a message; the class of an error without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def start_loggers(specs: Sequence[Any], folder: Path, instantiate: Callable[[Any], Logger]) -> list[Logger]:
    """Return the user's loggers, started and under the name of the run.

    ConfigError if a package is missing, a service refuses, or the files would be those of the run itself.

    specs: parsed `trainer.logger` entries with `class_path` and `init_args`, of which `instantiate` makes loggers.
    folder: runs/<experiment>/version_<n>, where they write unless told otherwise.
    """
    # Without these, W&B prints a page of numbers at the end, and MLflow each migration of its database.
    os.environ.setdefault("WANDB_QUIET", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    file, loggers = folder / VERSIONS_FILE, []
    versions: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for position, spec in enumerate(specs):
        (module, _, name), key = spec.class_path.rpartition("."), f"{position} {spec.class_path}"
        kind = getattr(import_module(module), name)
        for argument, value in _missing_arguments(kind, folder, spec.init_args, versions.get(key)).items():
            spec.init_args[argument] = value
        try:
            started = instantiate(spec)
            _ = getattr(started, "experiment", None)  # connects
            version = started.version
        except Exception as error:  # of any kind: each service has its own
            wraps_another = isinstance(error.__cause__, ImportError | AttributeError | AssertionError)  # jsonargparse
            cause = error.__cause__ if wraps_another else error
            if isinstance(cause, ModuleNotFoundError):
                raise missing_package(f"trainer.logger: {name}", PACKAGES.get(name, str(cause.name))) from error
            remedy = REMEDIES.get(name, "Correct its init_args, or leave trainer.logger out.")
            raise ConfigError(f"trainer.logger: {name} cannot start: {first_line(cause)}\n{remedy}") from error
        if started.log_dir is not None and Path(started.log_dir).resolve() == folder.resolve():
            problem = f"trainer.logger: {name} would overwrite the run's own files in {folder}"
            raise ConfigError(f"{problem}.\nLeave out its save_dir, name and version, or choose another save_dir.")
        if isinstance(started, WandbLogger | MLFlowLogger | CometLogger):
            versions[key] = str(version)
        for method in ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint"):
            setattr(started, method, failures_tolerated(name)(getattr(started, method)))
        loggers.append(started)
    if versions:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(versions, indent=1), encoding="utf-8")
    return loggers


def _missing_arguments(kind: type[Logger], folder: Path, given: Any, version: str | None) -> dict[str, Any]:
    """Return folder, names and id (`version`) of the run for arguments that the user has left at their defaults."""
    name, place = f"{folder.parent.name}/{folder.name}", str(folder)
    values: dict[str, Any] = {"save_dir": place}
    if issubclass(kind, WandbLogger):
        values |= {"name": name, "project": os.environ.get("WANDB_PROJECT", PROJECT), "version": version}
    elif issubclass(kind, CometLogger):  # it takes the first two as keywords of any name
        values = {"name": name, "offline_directory": place, "experiment_key": version}
        values |= {} if "COMET_PROJECT_NAME" in os.environ else {"project": PROJECT}
    elif issubclass(kind, MLFlowLogger):
        values |= {"run_name": name, "run_id": version}
        values |= {"experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)}
        if not given.get("tracking_uri"):  # MLFLOW_TRACKING_URI is its default
            files = folder.absolute()
            values["tracking_uri"] = f"sqlite:///{files / 'mlflow.db'}"
            values["artifact_location"] = (files / "mlartifacts").as_uri()
    defaults = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    if not issubclass(kind, CometLogger):
        values = {key: value for key, value in values.items() if key in defaults}
    return {key: value for key, value in values.items() if given.get(key) in (None, defaults.get(key))}


class ResultsLogger(Callback):
    """Log what is no metric: the resolved `config` once; after every evaluation AP of each class and drawn `images`."""

    def __init__(self, config: JSONDict, images: Path) -> None:
        self.config, self.images = config, images
        self._has_logged_config = False

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the configuration as hyper-parameters; TensorBoard's come with the final metrics."""
        self._has_logged_config = True
        for each in trainer.loggers:
            with failures_tolerated(type(each).__name__):
                # MLflow refuses a second value, as after a resume with more epochs.
                is_set = isinstance(each, MLFlowLogger) and each.experiment.get_run(str(each.run_id)).data.params
                if not (is_set or isinstance(each, TensorBoardLogger | TableLogger)):
                    each.log_hyperparams(self.config)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the evaluation."""
        if trainer.sanity_checking or pl_module.evaluator is None:
            return
        if not self._has_logged_config:
            self.on_train_start(trainer, pl_module)
        stage, names = stage_of(trainer), list(pl_module.data.class_names)
        step = trainer.global_step - (trainer.state.fn == "fit")  # that of val/mAP
        per_class = list(pl_module.evaluator.evaluation().per_class.items())[:MAX_CLASSES]
        rows = [(label, name, ap) for label, (name, ap) in enumerate(per_class) if not math.isnan(ap)]
        drawn = sorted(self.images.glob("*.jpg"))[:MAX_IMAGES]
        for each in trainer.loggers:
            if isinstance(each, TableLogger):
                continue
            with failures_tolerated(type(each).__name__):
                each.log_metrics({f"{stage}/AP/{_key(label, name, each)}": ap for label, name, ap in rows}, step)
                if isinstance(each, TensorBoardLogger):
                    _add_curves(each.experiment, pl_module.evaluator.evaluation().analysis, names, stage, step)
                for file in drawn:
                    log_image(each, f"{stage}/{file.stem}", file, step)

    on_test_end = on_validation_end


def _key(label: int, name: str, each: Logger) -> str:
    is_fine = name.isprintable() and "/" not in name and (name.isascii() or not isinstance(each, MLFlowLogger))
    return name if is_fine else f"class_{label}"  # MLflow takes ASCII only


def _add_curves(writer: Any, analysis: Analysis, names: Sequence[str], stage: str, step: int) -> None:
    """Add the precision-recall curves at IoU 0.5 of all classes together and of each to TensorBoard."""
    curves = {"all": analysis.overall, **dict(zip(names[:MAX_CLASSES], analysis.classes, strict=False))}
    for name, one in curves.items():
        if one.num_objects:
            # The plugin draws from rising thresholds, so falling recall. Precision is interpolated: see results.json.
            recall, precision = RECALLS["COCO"][::-1], np.asarray(one.precision)[::-1]
            true = recall * one.num_objects
            false = np.where(precision > 0, true / np.maximum(precision, 1e-9) - true, 0)
            counts = (true, false, np.zeros_like(true), one.num_objects - true)
            writer.add_pr_curve_raw(f"{stage}/{name}", *counts, precision, recall, step, num_thresholds=len(recall))


def log_image(each: Logger, name: str, file: Path, step: int) -> None:
    """Log a picture where the logger has a place for it."""
    if isinstance(each, WandbLogger):
        each.log_image(name, [str(file)], step)
    elif isinstance(each, CometLogger):
        each.experiment.log_image(str(file), name=name, step=step)
    elif isinstance(each, MLFlowLogger):
        each.experiment.log_artifact(str(each.run_id), str(file), "images")
    elif isinstance(each, TensorBoardLogger):
        with Image.open(file) as image:
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            each.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def log_file(each: Logger, file: Path) -> None:
    """Log a file as an artifact where the logger has them."""
    if isinstance(each, WandbLogger):
        from wandb import Artifact

        # Immutable: not copied before it is uploaded.
        artifact = Artifact(f"{file.stem}-{each.experiment.id}", type="model" if file.suffix == ".ckpt" else "report")
        artifact.add_file(str(file), policy="immutable")
        each.experiment.log_artifact(artifact)
    elif isinstance(each, CometLogger):
        each.experiment.log_asset(str(file), file.name)
    elif isinstance(each, MLFlowLogger):
        each.experiment.log_artifact(str(each.run_id), str(file))


@rank_zero_only
def log_run(loggers: Sequence[Logger], folder: Path, config: JSONDict, metrics: Metrics, step: int) -> None:
    """Log pictures and files of a finished run; to TensorBoard its hyper-parameters beside the final metrics."""
    for each in loggers:
        with failures_tolerated(type(each).__name__):
            for file in filter(Path.is_file, (folder / name for name in PICTURES)):
                log_image(each, file.stem, file, step)
            for file in filter(Path.is_file, (folder / name for name in ARTIFACTS)):
                log_file(each, file)
            if isinstance(each, TensorBoardLogger):
                final = {f"final/{name}": metrics[name] for name in ("mAP", "AP50") if name in metrics}
                each.log_hyperparams(config, final)
                each.save()


@contextmanager
def ended_with_the_command(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close the runs of the trackers, failed if an exception ends the command; a second run starts its own."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        for each in loggers if rank_zero_only.rank == 0 else ():  # type: ignore[attr-defined] # Lightning sets it
            with failures_tolerated(type(each).__name__):
                if isinstance(each, WandbLogger):
                    each.experiment.finish(exit_code=exit_code)
                elif isinstance(each, CometLogger):
                    each.experiment.end()
