"""The commands fit, validate, test and predict: Lightning's command line over our module, with our run folder."""

import tempfile
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from onestage.errors import ConfigError
from onestage.training.checkpoints import (
    TRUSTED_CLASS_PATHS,
    BestCheckpoint,
    ConfigInCheckpoint,
    LastCheckpoint,
    config_of,
    load_weights,
    read_checkpoint,
)
from onestage.training.messages import check_config_file, config_files, explain, files_first, option_values
from onestage.training.module import DetectionModule
from onestage.training.monitors import DetectionImages, PredictionWriter, ResultsWriter, print_report
from onestage.training.runs import new_run_folder
from onestage.training.trainer import DetectionTrainer, resolve_precision

SHARED_CONFIG = Path("configs") / "trainer.yaml"


def run_trainer_command(words: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict` with the options that follow it."""
    command, *options = words
    options = files_first(options)
    for file in config_files(options):
        check_config_file(file)
    try:
        _run(command, options)
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise ConfigError(str(error)) from error


def _run(command: str, options: list[str]) -> None:
    checkpoints = option_values(options, "--ckpt_path")
    if command == "fit" or not checkpoints:
        DetectionCLI(command, options)
        return
    with tempfile.TemporaryDirectory(prefix="onestage-") as folder:
        stored = Path(folder) / "checkpoint.yaml"
        stored.write_text(yaml.safe_dump(config_of(checkpoints[-1])), encoding="utf-8")
        if not config_files(options):
            trusted = [prefix.rstrip(".") for prefix in TRUSTED_CLASS_PATHS]
            set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=trusted)
        DetectionCLI(command, ["--config", str(stored), *options])  # first, so that everything else overrides it


class LossBar(TQDMProgressBar):
    """A progress bar of the losses and the mAP; the version of the run stands in its folder's name."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class DetectionParser(LightningArgumentParser):
    """Lightning's parser, which raises instead of printing a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with jsonargparse's message."""
        raise ParsingError(message) from ex


class ParsingError(Exception):
    """What jsonargparse says of a value or key."""


class DetectionCLI(LightningCLI):
    """LightningCLI with one run folder, exact evaluation and messages for people."""

    def __init__(self, command: str, options: list[str]) -> None:
        self.command = command
        defaults = [str(path) for path in _shared_configs()[:1]]
        super().__init__(
            model_class=DetectionModule,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            trainer_class=DetectionTrainer,
            parser_class=DetectionParser,
            parser_kwargs={
                "allow_abbrev": False,
                command: {"allow_abbrev": False, "default_config_files": defaults},
            },
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
            args=[command, *options],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # an instance knows which one it needs
        """Only the one command that was typed: building all four parsers takes four times as long."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run folder and link what the data knows into the model."""
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="name of the run's folder; default: that of the last --config",
        )
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--drawn_images", type=int, default=16, help="how many images of an evaluation are drawn")
        parser.add_argument("--drawn_score", type=float, default=0.3, help="lowest score of a drawn detection, 0..1")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.link_arguments("data.num_classes", "model.detector.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed")

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
        if self.command == "fit" and settings.ckpt_path is not None:
            read_checkpoint(settings.ckpt_path)
        settings.trainer.precision = resolve_precision(settings.trainer.precision, settings.trainer.accelerator)
        settings.experiment = settings.experiment or self._experiment_name()
        self.run_folder = Path(settings.runs_dir) / settings.experiment / "fast_dev_run"
        if not settings.trainer.fast_dev_run:
            self.run_folder = new_run_folder(settings.runs_dir, settings.experiment)

    def _experiment_name(self) -> str:
        names = [Path(str(path)).stem for path in self.settings.config or []]
        names = [name for name in names if name not in ("trainer", "checkpoint")]
        if names:
            return names[-1]
        folders = Path(str(self.settings.ckpt_path or "")).absolute().parents
        return folders[2].name if self.settings.ckpt_path and len(folders) > 3 else "onestage"

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a value that a constructor refuses is the user's, not a bug."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ConfigError(f"the configuration cannot be built: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        config["default_root_dir"] = str(self.run_folder)
        if config.get("logger") in (None, True):
            config["logger"] = self._loggers()
        own: list[Callback] = [ResultsWriter(self.results_path)]
        if self.settings.drawn_images > 0:
            own.append(
                DetectionImages(self.run_folder / "predictions", self.settings.drawn_images, self.settings.drawn_score)
            )
        if self.command == "predict":
            own.append(PredictionWriter(self.run_folder, self.settings.drawn_score))
        if self.command == "fit":
            self._dump_config()
            own.append(ConfigInCheckpoint({key: self.config_dump[key] for key in ("model", "data")}))
        if self.command == "fit" and config["logger"] is not False:
            own.append(LearningRateMonitor("step"))
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
            # Refreshing reads the loss from the device, so not at every step.
            own.append(LossBar(refresh_rate=10))
        for callback in callbacks:
            if isinstance(callback, BestCheckpoint | LastCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder / "checkpoints")
        return super()._instantiate_trainer(config, [*own, *callbacks])

    def _loggers(self) -> list[Logger]:
        place = {
            "save_dir": str(self.run_folder.parent.parent),
            "name": self.run_folder.parent.name,
            "version": self.run_folder.name,
        }
        return [TensorBoardLogger(**place), CSVLogger(**place)]

    @property
    def results_path(self) -> Path:
        """Of the file that the last printed line names."""
        name = "predictions.json" if self.command == "predict" else "results.json"
        return Path(self.run_folder) / name

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load weights ourselves: checked, never running code, with messages for people."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs.pop("weights_only", None)
        if subcommand == "fit":
            return kwargs
        checkpoint = kwargs.pop("ckpt_path", None)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # they are written batch by batch; a list would only fill memory
        return kwargs

    def after_fit(self) -> None:
        """Evaluate the best checkpoint and say where everything is."""
        if self.settings.trainer.fast_dev_run:
            return
        best = next(callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
        if best.best_model_path:
            load_weights(self.model, best.best_model_path)
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

    @rank_zero_only
    def _say_results(self) -> None:
        if self.command != "predict" and self.model.metrics:
            print_report(self.model)
        if self.results_path.is_file():
            print(f"results: {self.results_path}", flush=True)


def _shared_configs() -> list[Path]:
    """configs/trainer.yaml of the working directory, or of the source tree this package was installed from."""
    source_tree = Path(__file__).resolve().parents[3]
    return [path for path in (SHARED_CONFIG, source_tree / SHARED_CONFIG) if path.is_file()]
