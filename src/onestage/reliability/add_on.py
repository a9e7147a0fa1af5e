"""The hooks of crash safety in the command line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from onestage.errors import CheckpointError, ConfigError
from onestage.reliability.callbacks import BestCheckpoint, ConfigInCheckpoint, LastCheckpoint, SeededSteps
from onestage.reliability.checkpoints import AtomicCheckpointIO, load_fitting_weights, load_weights, read_checkpoint
from onestage.reliability.non_finite import NonFiniteGuard
from onestage.reliability.resume import Resumed, decisive_settings, find_checkpoint, require_resumable
from onestage.reliability.runs import new_locked_folder, take_run_folder
from onestage.reliability.stopping import StopOnSignal, mapped_errors
from onestage.reliability.stored_config import config_of
from onestage.reliability.watchdog import Watchdog, processes_watched
from onestage.training.module import DetectionModule
from onestage.training.run import RunAddOn, is_first_process
from onestage.types import JSONDict


class Reliability(RunAddOn):
    """Crash safety for `fit`, checked checkpoints for every command."""

    _resumed: Resumed | None = None
    _decisive: JSONDict

    @contextmanager
    def command(self) -> Iterator[None]:
        """Map exceptions to onestage errors; end with the process that started this one."""
        with processes_watched(), mapped_errors():  # a lost connection waits for the watchdog
            yield

    def stored_config(self, checkpoint: str, is_optional: bool) -> JSONDict | None:
        """Return the checked configuration in a checkpoint; None: use the user's."""
        try:
            return config_of(checkpoint)
        except CheckpointError:
            read_checkpoint(checkpoint)  # an unreadable file is an error in any case
            if not is_optional:
                raise
            return None

    def add_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks and the keys of a resume."""
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_argument(  # all literal: cli/keys.py reads them
            "--resume", type=str, default="none",
            help="auto: continue the newest run of this experiment and configuration, in its folder; "
            "PATH: continue from that checkpoint, in a new folder; none: start a new run",
        )  # fmt: skip
        parser.add_argument(
            "--init_from", type=str | None, default=None,
            help="start a new run from the weights of a checkpoint (.ckpt, .safetensors) or of torchvision "
            "(torchvision_coco, or the path of a state dict), of the same classes or others; the rest starts fresh",
        )  # fmt: skip
        parser.add_argument(
            "--allow_data_change", type=bool, default=False, help="resume although annotations or images have changed"
        )

    def before_instantiate(self, settings: Any, config: JSONDict) -> None:
        """Find the checkpoint to resume from; adopt what its run has decided for `auto`."""
        init_from, resume, ckpt_path = settings.init_from, settings.resume, settings.ckpt_path
        if init_from is not None and (ckpt_path is not None or resume not in ("none", "auto")):
            other = f"--ckpt_path {ckpt_path}" if ckpt_path is not None else f"--resume {resume}"
            raise ConfigError(f"--init_from {init_from} and {other} conflict; pass only one.")
        self._decisive = decisive_settings(config)
        self._resumed = find_checkpoint(resume, ckpt_path, config)
        if self._resumed is not None:
            self._resumed.adopt(settings)
            self.resumed_step = self._resumed.global_step if self._resumed.folder is not None else None

    def run_folder(self, settings: Any) -> Path:
        """Return the locked folder of the run: a new one, or that of the resumed run."""
        is_writer, folder = is_first_process(settings), self._resumed.folder if self._resumed else None
        if folder is None:
            return new_locked_folder(settings.runs_dir, settings.experiment, is_writer=is_writer)
        take_run_folder(folder, is_writer=is_writer)
        return folder

    def callbacks(self, settings: Any, config: JSONDict, callbacks: list[Callback], stored: JSONDict) -> list[Callback]:
        """Add the callbacks that make a run resumable, and the atomic writer."""
        callbacks = super().callbacks(settings, config, callbacks, stored)
        if not stored:
            return [Watchdog(), *callbacks]  # first: the others exchange values already when they are set up
        config["enable_checkpointing"] = True  # for StopOnSignal, a Checkpoint that writes none
        strategy = config.get("strategy")
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        in_parts = getattr(strategy, "_state_dict_type", "full") == "sharded"  # private: FSDPStrategy has no getter
        if not in_parts and not any(word in name.lower() for word in ("deepspeed", "modelparallel")):
            plugins = config.get("plugins") or []
            config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        last = next((callback for callback in callbacks if isinstance(callback, LastCheckpoint)), None)
        seeded = SeededSteps(int(settings.seed_everything))
        return [Watchdog(), ConfigInCheckpoint(stored, self._decisive), seeded, *callbacks, StopOnSignal(last)]

    def checkpoint_to_resume(
        self, settings: Any, module: DetectionModule, data: LightningDataModule, trainer: Trainer
    ) -> str | None:
        """Return the checkpoint to continue from, or raise CheckpointError."""
        if self._resumed is None:
            if settings.init_from is not None:
                load_fitting_weights(module, settings.init_from, data.class_names)  # type: ignore[attr-defined] # ours
            return None
        checkpoint = self._resumed.checkpoint
        require_resumable(checkpoint, module, data, trainer.strategy, settings.allow_data_change)
        return str(checkpoint)

    def load_weights(self, module: DetectionModule, checkpoint: str, class_names: Sequence[str]) -> None:
        """Load the weights of a checked checkpoint."""
        load_weights(module, checkpoint, class_names)
