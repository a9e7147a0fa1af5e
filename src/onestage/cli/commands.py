"""The trainer commands: Lightning's command line over our module and data; `onestage.train` is `fit` as a function."""

import inspect
import json
import logging
import tempfile
from copy import deepcopy
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

import onestage.training.callbacks as reporting
from onestage.cli.messages import check_config_file, explain, files_first, refusal, split_option
from onestage.cli.parser import (
    STORED_CONFIG,
    DetectionParser,
    ParsingError,
    add_run_keys,
    checked_seed,
    experiment_name,
    record_data,
    shared_config,
)
from onestage.data.annotations import IMAGE_UNREADABLE, malformed
from onestage.data.datamodule import DetectionDataModule
from onestage.data.source import Source
from onestage.errors import ConfigError, DataError, require
from onestage.evaluation.results import format_table
from onestage.files import atomic_write, printable
from onestage.training.ema import ExponentialMovingAverage
from onestage.training.loggers import ResultsLogger, ended_with_the_command, log_run, run_loggers, start_loggers
from onestage.training.measurement import GIB, AutoBatch, resolve_memory_format
from onestage.training.module import DetectionModule
from onestage.training.optimization import shards_parameters
from onestage.training.run import RunAddOn, is_first_process, link_data_to_model
from onestage.training.trainer import CURVES_FILE, DetectionTrainer, evaluate_at_least_once, resolve_precision
from onestage.types import JSONDict, Metrics

# The add-on that makes runs crash-safe. Without its line, Lightning saves its own checkpoints and nothing is resumed.
RUN_ADD_ONS = (
    "onestage.reliability.add_on:Reliability",
)  # fmt: skip

# Called when `fit`, `validate` or `test` has ended, on the first process.
AFTER_RUN = (
    "onestage.report.collection:write_after_run",
)  # fmt: skip

# `train` gives a name without dots to the first group whose constructor takes it.
GROUPS = {"trainer": Trainer, "data": DetectionDataModule, "model": DetectionModule}

logger = logging.getLogger(__name__)


def run_trainer_command(words: list[str], data: Source | DetectionDataModule | None = None) -> "DetectionCLI":
    """Run `fit`, `validate`, `test`, `predict` or `losses` with its options; `data` replaces the configured source."""
    command = words[0]
    files, options = files_first(words[1:])
    for file in [*shared_config(), *files]:
        check_config_file(file)
    given = [f"--config={file}" for file in files] + options
    checkpoints = [path for path in split_option(options, "--ckpt_path")[0] if path != "null"]
    add_on: RunAddOn = resolve_name(next(iter(RUN_ADD_ONS), "onestage.training.run:RunAddOn"))()
    with add_on.command():
        stored = None
        if command != "fit" and checkpoints:
            stored = add_on.stored_config(checkpoints[-1], is_optional=bool(files))
        if stored is None:
            return DetectionCLI(command, given, add_on, data)
        with tempfile.TemporaryDirectory(prefix="onestage-") as folder:
            first = Path(folder) / STORED_CONFIG
            first.write_text(yaml.safe_dump(stored), encoding="utf-8")
            return DetectionCLI(command, [f"--config={first}", *given], add_on, data)  # the user's files override


class RunConfig(SaveConfigCallback):
    """Write config.yaml into the run folder, not into that of the first logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write all settings, for `--config` and `--resume auto`."""
        with atomic_write(Path(trainer.default_root_dir) / "config.yaml") as temporary:  # a kill must not damage it
            self.parser.save(self.config, temporary, skip_unset=False, overwrite=True, multifile=False)


class DetectionCLI(LightningCLI):
    """LightningCLI with one run folder, exact evaluation and one-line messages."""

    run_folder: Path

    def __init__(
        self, command: str, options: list[str], add_on: RunAddOn, data: Source | DetectionDataModule | None
    ) -> None:
        self.command, self.add_on, self._given_data = command, add_on, data
        self._stored: JSONDict = {}  # `fit`: the configuration in its checkpoints
        super().__init__(
            model_class=DetectionModule,
            datamodule_class=DetectionDataModule,
            trainer_class=DetectionTrainer,
            parser_class=DetectionParser,
            parser_kwargs={
                "allow_abbrev": False,
                command: {"allow_abbrev": False, "default_config_files": shared_config()},
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
            args=[command, *options],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # an instance knows which one it needs
        """Return the typed command only: the parsers of all take four times as long."""
        decided_here = {"weights_only", "return_predictions", "verbose"}
        positional = {"losses": {"model", "datamodule"}, **LightningCLI.subcommands()}
        return {self.command: positional[self.command] | decided_here}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run; pass classes, size and seed to where they are used."""
        add_run_keys(parser)
        parser.add_lightning_class_args(ExponentialMovingAverage, "ema")
        self.add_on.add_arguments(parser)
        link_data_to_model(parser)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=checked_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; explain an error in one line."""
        try:
            self.config = parser.parse_args(args)
        except ParsingError as error:
            keys = [action.dest for action in self._subcommand_parsers[self.command]._actions]
            raise ConfigError(explain(str(error), self.command, args[1:], keys)) from error

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint override the command line."""

    @property
    def settings(self) -> Any:
        """Return the parsed arguments of the command."""
        return self.config[self.command]

    def before_instantiate_classes(self) -> None:
        """Resolve the `auto` of precision and names, so that config.yaml repeats the run."""
        settings = self.settings
        settings.trainer.precision = resolve_precision(settings.trainer.precision, settings.trainer.accelerator)
        settings.experiment = experiment_name(settings.experiment, settings.config or [], settings.ckpt_path)
        num_classes = (settings.model.detector.get("init_args") or {}).get("num_classes")
        rule, remedy = "the number of classes of the data", "Leave it out; for other classes set data.class_names."
        require(num_classes is None, "model.detector.num_classes", num_classes, rule, remedy)
        folder, is_bare = settings.trainer.default_root_dir, settings.trainer.barebones
        require(folder is None, "trainer.default_root_dir", folder, "null", "Set runs_dir and experiment.")
        remedy = "A run always has its own loggers; limit_train_batches and fast_dev_run make it short."
        require(not is_bare, "trainer.barebones", is_bare, "false", remedy)
        if self._given_data is not None:
            record_data(settings.data, self._given_data)
        if self.command == "fit":
            evaluate_at_least_once(settings.trainer)
            config = yaml.safe_load(self._parser(self.command).dump(settings, skip_unset=False))
            self.add_on.before_instantiate(settings, config)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; report a refused value with its key."""
        given = self._given_data
        # Built when the folder of the run is known.
        self._logger_specs, self.settings.trainer.logger = self.settings.trainer.logger, None
        try:
            if given is not None:
                self.settings.data.source = given.source if isinstance(given, DetectionDataModule) else given
            super().instantiate_classes()
        except (ConfigError, ValueError, TypeError, ImportError, FileNotFoundError) as error:
            raise ConfigError(refusal(error)) from error
        if isinstance(given, DetectionDataModule):
            self.datamodule = given
        if self.command == "fit" and self.model.channels_last == "auto":
            decided = resolve_memory_format(self.model.detector, self.datamodule, self.trainer)
            self.model.channels_last = self.settings.model.channels_last = decided
            self._stored["model"]["channels_last"] = decided

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if self._given_data is not None:
            self.settings.data.source = None  # config.yaml and checkpoints hold no objects
        self.settings.trainer.logger = self._logger_specs
        self._dump_config()
        # Only now, when data and model are known to be valid.
        dry_folder = Path(str(self.settings.runs_dir)) / str(self.settings.experiment) / "fast_dev_run"
        is_dry = self.settings.trainer.fast_dev_run
        self.run_folder = dry_folder if is_dry else self.add_on.run_folder(self.settings)
        config["default_root_dir"] = str(self.run_folder)
        config["logger"] = [*run_loggers(self.run_folder, self.add_on.resumed_step), *self._user_loggers()]
        own = self._reporting_callbacks(config)
        if self.command == "fit":
            self._stored = {key: self.config_dump[key] for key in ("model", "data")}
            if (limit := self.settings.auto_batch) is not False:
                limit = None if limit is True else int(limit * GIB)
                own.append(AutoBatch(limit, self.settings.ema.decay is not None, self._record_batch_size))
        callbacks = self.add_on.callbacks(self.settings, config, callbacks, self._stored)
        return super()._instantiate_trainer(config, [*own, *callbacks])

    def _user_loggers(self) -> list[Logger]:
        """Return the loggers of `trainer.logger`, which come beside the run's own."""
        if not is_first_process(self.settings) or self.settings.trainer.fast_dev_run:
            return []
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--logger", type=Logger)
        specs = self._logger_specs if isinstance(self._logger_specs, list) else [self._logger_specs]
        chosen = [deepcopy(spec) for spec in specs if isinstance(spec, Namespace)]  # not true, false, null

        def instantiate(spec: Any) -> Logger:
            return parser.instantiate(Namespace(logger=spec)).logger  # type: ignore[no-any-return, no-untyped-call]

        return start_loggers(chosen, self.run_folder, instantiate)

    @property
    def _logged_config(self) -> JSONDict:
        """Return the configuration for loggers, without their own keys, which may be secret."""
        trainer = {key: value for key, value in self.config_dump["trainer"].items() if key != "logger"}
        return {**self.config_dump, "trainer": trainer}

    def _reporting_callbacks(self, config: dict[str, Any]) -> list[Callback]:
        """Return the callbacks that write results, log curves and draw the progress bar."""
        settings = self.settings
        own: list[Callback] = [reporting.ResultsWriter(self.results_path)] if self.command != "losses" else []
        if self.command == "predict" or (settings.drawn_images > 0 and self.command != "losses"):
            own.append(reporting.DetectionImages(self.run_folder / "predictions", settings.drawn_images))
        if self.command in ("fit", "validate", "test"):
            own.append(ResultsLogger(self._logged_config, self.run_folder / "predictions"))
        if self.command == "fit":
            own += [reporting.EpochTable(self.run_folder / reporting.EPOCHS_FILE), LearningRateMonitor("step")]
            own += [reporting.TrainingPictures(self.run_folder)] if settings.drawn_images > 0 else []
            own += [reporting.AnchorMonitor()] if settings.anchor_statistics else []
        given = config.get("callbacks") or []
        has_bar = any(isinstance(callback, ProgressBar) for callback in (given if isinstance(given, list) else [given]))
        if config.get("enable_progress_bar") is not False and not has_bar:
            # Refreshing reads the loss from the device, so not at every step.
            own.append(reporting.LossBar(refresh_rate=10))
        return own

    def _record_batch_size(self, batch_size: int) -> None:  # config.yaml and the checkpoints must repeat the run
        self.settings.data.batch_size = self._stored["data"]["batch_size"] = batch_size
        self.settings.auto_batch = False

    @property
    def results_path(self) -> Path:
        """Return the results file, which the last printed line names."""
        files = {"predict": "predictions.json", "losses": CURVES_FILE}
        return self.run_folder / files.get(self.command, "results.json")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load the weights through the add-on, which checks the file first."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            resumed = self.add_on.checkpoint_to_resume(self.settings, self.model, self.datamodule, self.trainer)
            return {**kwargs, "ckpt_path": resumed}
        checkpoint = kwargs.pop("ckpt_path", None)
        if checkpoint is not None:
            self.add_on.load_weights(self.model, checkpoint, self.datamodule.class_names)
        elif not self.settings.model.detector.init_args.get("pretrained"):
            raise ConfigError(
                f"no weights to {subcommand} with: random ones would only look like a bad model.\n"
                "Give --ckpt_path runs/.../checkpoints/best.ckpt, or --model.detector.pretrained."
            )
        decided = {"predict": {"return_predictions": False}, "losses": {"ckpt_path": checkpoint}}  # written by batch
        return {**kwargs, **decided.get(subcommand, {"verbose": False})}

    def before_fit(self) -> None:
        """Copy the detector if the strategy splits it: the evaluation needs it whole."""
        self._whole = deepcopy(self.model.detector) if shards_parameters(self.trainer.strategy) else self.model.detector

    def after_fit(self) -> None:
        """Evaluate the best checkpoint, or the last weights if there is none."""
        if self.settings.trainer.fast_dev_run:
            return
        for file in self.run_folder.glob("hpc_ckpt_*.ckpt"):  # SLURM's, which Lightning would evaluate instead
            file.unlink(missing_ok=True)
        best = getattr(self._get(self.config_init, "best_checkpoint"), "best_model_path", "")
        loggers = self.trainer.loggers
        if best:
            self.model.detector = self._whole
            self.add_on.load_weights(self.model, best, self.datamodule.class_names)
            self.trainer.loggers = []  # the validation that chose it was logged; its metrics are not those of the end
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.trainer.loggers = loggers

    def _run_subcommand(self, subcommand: str) -> None:
        trainer = self.trainer
        with ended_with_the_command(trainer.loggers):
            super()._run_subcommand(subcommand)
            if subcommand != "fit" or not self.settings.trainer.fast_dev_run:
                self._print_results()
            if subcommand in ("fit", "validate", "test") and not self.settings.trainer.fast_dev_run:
                metrics, step = self.model.metrics, trainer.global_step
                log_run(trainer.loggers, self.run_folder, self._logged_config, metrics, step)
        if subcommand in ("validate", "test", "predict"):
            self._require_all_read(subcommand)

    def _require_all_read(self, subcommand: str) -> None:
        """Raise DataError, after everything was written, if images could not be read."""
        evaluator = self.model.evaluator
        listed = [finding for finding in evaluator.annotations.findings if finding.rule == IMAGE_UNREADABLE.name]
        problems = [*(finding.line for finding in listed), *evaluator.unreadable.values()]
        if problems:
            total = len(evaluator.annotations) + len(listed)
            lines = [problem.partition("\n")[0] for problem in problems]
            place, problem = printable(evaluator.annotations.source), f"{len(lines)} of {total} images cannot be read"
            remedy = f"All others were evaluated. Replace or remove these files, then {subcommand} again."
            # The other processes end with the same code and without the message.
            raise malformed(place, problem, remedy, lines) if self.trainer.is_global_zero else DataError()

    @rank_zero_only
    def _print_results(self) -> None:
        if self.command != "predict" and self.model.metrics:
            evaluation = self.model.evaluator.evaluation()
            print(format_table(self.model.metrics, evaluation.per_class, evaluation.analysis))
            draw = self.settings.drawn_images > 0
            for place in AFTER_RUN:
                try:
                    write = resolve_name(place)
                    write(self.run_folder, self.command, self.model, self.datamodule, draw=draw)
                except Exception as error:  # the run is complete
                    logger.warning("%s: %s: %s", place, type(error).__name__, str(error).partition("\n")[0])
        if self.results_path.is_file():
            print(f"results: {self.results_path}", flush=True)
        else:
            last = self.run_folder / "checkpoints" / "last.ckpt"
            kept = f"; the weights: {last}" if last.is_file() else ""
            print(f"nothing was evaluated (trainer.limit_*_batches?){kept}; the run: {self.run_folder}", flush=True)


class Run(NamedTuple):
    """A finished training."""

    folder: Path  # runs/<experiment>/version_<n>
    metrics: Metrics  # COCO's twelve numbers of the best checkpoint on the validation split, in [0, 1]
    checkpoint: Path | None  # the best one, for `onestage.load`; None: none was written


def train(
    config: str | Path, *, data: DetectionDataModule | Source | str | Path | None = None, **overrides: Any
) -> Run:
    """Train, evaluate the best checkpoint, write the run folder: `onestage fit --config CONFIG`.

    Raises the OnestageError that `onestage fit` reports; see onestage/errors.py.

    Args:
        config: a YAML file, such as configs/voc_ssd300.yaml.
        data: a source or the path of a data set, read with the settings of the config; or a data module, whose own
            settings replace the config's `data`; None: the data of the config.
        overrides: keys of the configuration: max_epochs=50, or with dots `**{"model.optimizer.init_args.lr": 1e-3}`.
    """
    words = ["fit", "--config", str(config)]
    if isinstance(data, str | Path):
        words += ["--data.path", str(data)]
    for name, value in overrides.items():
        groups = [group for group, owner in GROUPS.items() if name in inspect.signature(owner).parameters]
        key = f"{groups[0]}.{name}" if groups else name
        if isinstance(data, DetectionDataModule) and key.startswith("data."):
            raise ConfigError(f"train: {name} conflicts with a data module.\nPass {name} where that is constructed.")
        value = _plain(value) if inspect.isclass(value) else value
        words.append(f"--{key}={value if isinstance(value, str | Path) else json.dumps(value, default=_plain)}")
    command = run_trainer_command(words, None if isinstance(data, str | Path) else data)
    best = command.run_folder / "checkpoints" / "best.ckpt"
    return Run(command.run_folder, dict(command.model.metrics), best if best.is_file() else None)


def _plain(value: Any) -> Any:
    """Return a class, a path or a number of NumPy as it is written in YAML; ConfigError for another object."""
    if inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Path | np.generic):
        return str(value) if isinstance(value, Path) else value.item()
    problem = f"train: {type(value).__name__} is an object, which no configuration can hold"
    raise ConfigError(f'{problem}.\nGive {{"class_path": "...", "init_args": {{...}}}}, as in YAML.')
