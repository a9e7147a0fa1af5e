"""The run folder, and the hooks through which an add-on makes runs crash-safe."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from onestage.training.module import DetectionModule
from onestage.types import JSONDict


class RunAddOn:
    """Hooks around a trainer command; the defaults are Lightning's own behaviour."""

    resumed_step: int | None = None  # optimizer step up to which the files of a continued run folder are kept

    def command(self) -> AbstractContextManager[None]:
        """Wrap a whole command, for example to map exceptions to exit codes."""
        return nullcontext()

    def stored_config(self, checkpoint: str, is_optional: bool) -> JSONDict | None:
        """Return the configuration in a checkpoint; None: use the user's."""
        return None

    def add_arguments(self, parser: LightningArgumentParser) -> None:
        """Add configurable callbacks and keys."""
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.set_defaults({"best_checkpoint.filename": "best", "best_checkpoint.save_last": True})

    def before_instantiate(self, settings: Any, config: JSONDict) -> None:
        """Prepare `fit`; may change `settings`, the parsed arguments."""

    def run_folder(self, settings: Any) -> Path:
        """Create and return the folder of the run."""
        return new_run_folder(settings.runs_dir, settings.experiment, is_writer=is_first_process(settings))

    def callbacks(self, settings: Any, config: JSONDict, callbacks: list[Callback], stored: JSONDict) -> list[Callback]:
        """Return the callbacks of a command: those of `add_arguments`, the average of the weights, and more.

        config: the trainer's arguments; may be changed. stored: `model` and `data` of `fit`'s configuration, or empty.
        """
        for callback in callbacks:
            if getattr(callback, "dirpath", "") is None:  # of checkpoints
                vars(callback)["dirpath"] = str(Path(config["default_root_dir"]) / "checkpoints")
        is_off = config.get("enable_checkpointing") is False
        return [callback for callback in callbacks if not (is_off and isinstance(callback, Checkpoint))]

    def checkpoint_to_resume(
        self, settings: Any, module: DetectionModule, data: LightningDataModule, trainer: Trainer
    ) -> str | None:
        """Return the checkpoint that `fit` continues from; None: start anew."""
        return settings.ckpt_path  # type: ignore[no-any-return]

    def load_weights(self, module: DetectionModule, checkpoint: str, class_names: Sequence[str]) -> None:
        """Load the weights of a checkpoint for evaluation."""
        module.load_state_dict(TorchCheckpointIO().load_checkpoint(checkpoint, weights_only=True)["state_dict"])


def link_data_to_model(parser: ArgumentParser) -> None:
    """Pass the number of classes and the image size of the group `data` to the detector of the group `model`."""
    parser.link_arguments("data.num_classes", "model.detector.init_args.num_classes", apply_on="instantiate")
    parser.link_arguments("data.image_size", "model.detector.init_args.image_size", apply_on="instantiate")


def new_run_folder(runs_dir: str, experiment: str, *, is_writer: bool = True) -> Path:
    """Create the next free folder runs_dir/experiment/version_<n>; OSError if that is not possible."""
    parent = Path(runs_dir) / experiment
    if not is_writer:
        return parent / "folder_of_the_first_process"
    parent.mkdir(parents=True, exist_ok=True)
    version = 1 + max((version_of(path) for path in parent.iterdir()), default=-1)
    while True:
        folder = parent / f"version_{version}"
        try:
            folder.mkdir()  # atomic: two runs that start together get different numbers
            return folder
        except FileExistsError:
            version += 1


def version_of(path: Path) -> int:
    """Return n of a folder called version_<n>, or -1."""
    name, _, number = path.name.partition("_")
    return int(number) if name == "version" and number.isdecimal() else -1


def is_first_process(settings: Any) -> bool:
    """Return whether this process writes the files of the run."""
    # The rank is the local one where Lightning starts the processes; NODE_RANK distinguishes the machines.
    is_first_node = settings.trainer.num_nodes == 1 or os.environ.get("NODE_RANK", "0") == "0"
    return is_first_node and rank_zero_only.rank == 0  # type: ignore[attr-defined] # Lightning sets it when imported
