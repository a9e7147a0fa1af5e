"""The commands of the trainer, fit to losses: Lightning's command line over our module, with our run folder."""

import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from onestage.cli.messages import check_config_file, config_files, explain, files_first, option_values, refusal
from onestage.cli.parser import (
    STORED_CONFIG,
    DetectionParser,
    ParsingError,
    add_run_keys,
    checked_seed,
    experiment_name,
    require_classes_of_the_data,
    restrict_imports,
    shared_configs,
)
from onestage.errors import CheckpointError, ConfigError
from onestage.reliability.checkpoint_files import config_of, load_weights, read_checkpoint
from onestage.reliability.checkpoint_io import WholeFileIO
from onestage.reliability.checkpoints import BestCheckpoint, ConfigInCheckpoint, LastCheckpoint
from onestage.reliability.endings import named_endings
from onestage.reliability.non_finite import NonFiniteGuard
from onestage.reliability.resume import Resumed, find_checkpoint, require_resumable, saved_batch_size
from onestage.reliability.runs import RunConfig, new_run_folder, take_run_folder
from onestage.reliability.seeding import SeededSteps
from onestage.reliability.stopping import StopOnSignal
from onestage.reliability.watchdog import Watchdog, launcher_watched
from onestage.training.anchor_monitor import AnchorMonitor
from onestage.training.batch_size import GIB, AutoBatch
from onestage.training.callbacks import DetectionImages, LossBar, PredictionWriter, ResultsWriter, print_report
from onestage.training.ema import ExponentialMovingAverage
from onestage.training.loggers import run_loggers
from onestage.training.loss_collector import CURVES_FILE
from onestage.training.module import DetectionModule
from onestage.training.strategies import shards_parameters, writes_whole_files
from onestage.training.trainer import DetectionTrainer, evaluate_at_least_once, resolve_precision

HARMLESS = (
    "Experiment logs directory .* exists and is not empty",  # ours: it was just made for this run
    ".*isinstance.treespec, LeafSpec.",  # between Lightning and torch
    "It is recommended to use .self.log.*sync_dist=True",  # every process logs the numbers of all
    "The '.*_dataloader' does not have many workers",  # num_workers: auto has counted the cores
)


def run_trainer_command(words: list[str]) -> None:
    """Run `fit`, `validate`, `test`, `predict` or `losses` with the options that follow it."""
    command, *options = words
    options = files_first(options)
    for file in config_files(options):
        check_config_file(file)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    restrict_imports()
    with named_endings(), launcher_watched():
        _run(command, options)


def _run(command: str, options: list[str]) -> None:
    checkpoint = next((path for path in reversed(option_values(options, "--ckpt_path")) if path != "null"), None)
    if command == "fit" or checkpoint is None:
        DetectionCLI(command, options)
        return
    with tempfile.TemporaryDirectory(prefix="onestage-") as folder:
        stored = Path(folder) / STORED_CONFIG
        try:
            stored.write_text(yaml.safe_dump(config_of(checkpoint)), encoding="utf-8")
        except CheckpointError:
            read_checkpoint(checkpoint)  # unreadable: nothing can help
            if not config_files(options):
                raise
            DetectionCLI(command, options)  # readable, but only the user's own configuration is to be trusted
        else:
            DetectionCLI(command, ["--config", str(stored), *options])  # first, so that everything else overrides it


class DetectionCLI(LightningCLI):
    """LightningCLI with one run folder, exact evaluation and messages for people."""

    run_folder: Path
    resumed: Resumed | None = None

    def __init__(self, command: str, options: list[str]) -> None:
        self.command = command
        super().__init__(
            model_class=DetectionModule,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            trainer_class=DetectionTrainer,
            parser_class=DetectionParser,
            parser_kwargs={
                "allow_abbrev": False,
                command: {"allow_abbrev": False, "default_config_files": [*map(str, shared_configs()[:1])]},
            },
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
            args=[command, *options],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # an instance knows which one it needs
        """Only the one command that was typed: building all four parsers takes four times as long."""
        decided_here = {"weights_only", "return_predictions", "verbose"}
        positional = {"losses": {"model", "datamodule"}, **LightningCLI.subcommands()}
        return {self.command: positional[self.command] | decided_here}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run folder and link what the data knows into the model."""
        add_run_keys(parser)
        parser.add_lightning_class_args(ExponentialMovingAverage, "ema")
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.link_arguments("data.num_classes", "model.detector.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=checked_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one line what is wrong."""
        try:
            self.config = parser.parse_args(args)
        except ParsingError as error:
            keys = [action.dest for action in self._subcommand_parsers[self.command]._actions]
            raise ConfigError(explain(str(error), self.command, args[1:], keys)) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint override the command line; ours came first, as a configuration file."""

    @property
    def settings(self) -> Any:
        """The configuration of the command."""
        return self.config[self.command]

    def before_instantiate_classes(self) -> None:
        """Decide what `auto` means, so that config.yaml says what was run."""
        settings = self.settings
        settings.trainer.precision = resolve_precision(settings.trainer.precision, settings.trainer.accelerator)
        settings.experiment = settings.experiment or experiment_name(settings.config or [], settings.ckpt_path)
        require_classes_of_the_data(settings.model.detector)
        if self.command == "fit":
            evaluate_at_least_once(settings.trainer)
            config = yaml.safe_load(self._parser(self.command).dump(settings, skip_none=False))
            self.resumed = find_checkpoint(settings.resume, settings.ckpt_path, config)
            if self.resumed is not None and self.resumed.folder is not None and settings.auto_batch is not False:
                settings.data.init_args.batch_size = saved_batch_size(self.resumed.folder)
                settings.auto_batch = False

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a value that a constructor refuses is the user's, not a bug."""
        try:
            super().instantiate_classes()
        except (ConfigError, ValueError, TypeError, ImportError, FileNotFoundError) as error:
            raise ConfigError(refusal(error, self.settings)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.run_folder = self._new_run_folder()  # only now, when data and model are known to be sound
        config["default_root_dir"] = str(self.run_folder)
        if config.get("logger") in (None, True):
            config["logger"] = run_loggers(self.run_folder, self.resumed.step_in_folder if self.resumed else None)
        own = self._showing_callbacks(config)
        if self.command == "fit":
            self._dump_config()
            stored = ConfigInCheckpoint({key: self.config_dump[key] for key in ("model", "data")})
            own += [*self._auto_batch(stored), stored]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint | LastCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder / "checkpoints")
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
            config["enable_checkpointing"] = self.command == "fit"  # StopOnSignal counts as one, and keeps none
        if self.command == "fit":
            last = next((one for one in callbacks if isinstance(one, LastCheckpoint)), None)
            callbacks = [SeededSteps(int(self.settings.seed_everything)), *callbacks, StopOnSignal(last)]
            if writes_whole_files(config.get("strategy")):
                plugins = config.get("plugins") or []
                config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeFileIO()]
        return super()._instantiate_trainer(config, [*own, *callbacks])

    def _showing_callbacks(self, config: dict[str, Any]) -> list[Callback]:
        """Return what shows a run to its user: files, curves, the progress bar."""
        settings = self.settings
        own: list[Callback] = [ResultsWriter(self.results_path)] if self.command != "losses" else []
        if settings.drawn_images > 0 and self.command != "losses":
            own.append(DetectionImages(self.run_folder / "predictions", settings.drawn_images, settings.drawn_score))
        if self.command == "predict":
            own.append(PredictionWriter(self.run_folder, settings.drawn_score))
        if self.command == "fit" and config["logger"] is not False:
            own.append(LearningRateMonitor("step"))
        if self.command == "fit" and settings.anchor_statistics:
            own.append(AnchorMonitor())
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
            # Refreshing reads the loss from the device, so not at every step.
            own.append(LossBar(refresh_rate=10))
        return own

    def _auto_batch(self, stored: ConfigInCheckpoint) -> list[Callback]:
        settings = self.settings
        if settings.auto_batch is False:
            return []

        def record(batch_size: int) -> None:  # so that config.yaml and the checkpoints repeat the run
            settings.data.init_args.batch_size = stored.config["data"]["init_args"]["batch_size"] = batch_size
            settings.auto_batch = False

        limit = None if settings.auto_batch is True else int(settings.auto_batch * GIB)
        return [AutoBatch(limit, settings.ema.decay is not None, record)]

    def _new_run_folder(self) -> Path:
        settings = self.settings
        if settings.trainer.fast_dev_run:
            return Path(str(settings.runs_dir)) / str(settings.experiment) / "fast_dev_run"
        num_nodes = settings.trainer.num_nodes
        if self.resumed is not None and self.resumed.folder is not None:
            take_run_folder(self.resumed.folder, num_nodes=num_nodes)
            return self.resumed.folder
        return new_run_folder(settings.runs_dir, settings.experiment, num_nodes=num_nodes)

    @property
    def results_path(self) -> Path:
        """Of the file that the last printed line names."""
        files = {"predict": "predictions.json", "losses": CURVES_FILE}
        return self.run_folder / files.get(self.command, "results.json")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints ourselves: checked, never running code, with messages for people."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            if self.resumed is not None:
                checkpoint = self.resumed.checkpoint
                allow_data_change = self.settings.allow_data_change
                require_resumable(checkpoint, self.model, self.datamodule, self.trainer.strategy, allow_data_change)
                kwargs["ckpt_path"] = str(checkpoint)
            return kwargs
        checkpoint = kwargs.pop("ckpt_path", None)
        if checkpoint is not None:
            load_weights(self.model, checkpoint, self.datamodule.class_names)
        elif not self.settings.model.detector.init_args.get("pretrained"):
            raise ConfigError(
                f"nothing says which weights to {subcommand} with; random ones would only look like a bad model.\n"
                "Give --ckpt_path runs/.../checkpoints/best.ckpt, or --model.detector.pretrained."
            )
        decided = {
            "predict": {"return_predictions": False},  # they are written batch by batch; a list would only fill memory
            "losses": {"ckpt_path": checkpoint},
        }
        return {**kwargs, **decided.get(subcommand, {"verbose": False})}

    def before_fit(self) -> None:
        """Keep the detector whole where training takes it apart, for the evaluation after it."""
        self._whole = deepcopy(self.model.detector) if shards_parameters(self.trainer.strategy) else self.model.detector

    def after_fit(self) -> None:
        """Evaluate the best checkpoint, or the last weights if there is none, and say where everything is."""
        if self.settings.trainer.fast_dev_run:
            return
        best = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)]
        if best and best[0].best_model_path:
            self.model.detector = self._whole
            load_weights(self.model, best[0].best_model_path, self.datamodule.class_names)
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self._say_results()

    def after_validate(self) -> None:
        """Say where the numbers are."""
        self._say_results()

    def after_test(self) -> None:
        """Say where the numbers are."""
        self._say_results()

    def after_predict(self) -> None:
        """Say where the detections are."""
        self._say_results()

    def after_losses(self) -> None:
        """Say where the curves are."""
        self._say_results()

    @rank_zero_only
    def _say_results(self) -> None:
        if self.command != "predict" and self.model.metrics:
            print_report(self.model)
        if self.results_path.is_file():
            print(f"results: {self.results_path}", flush=True)
        else:
            print(f"nothing was evaluated (trainer.limit_*_batches?); the run: {self.run_folder}", flush=True)
