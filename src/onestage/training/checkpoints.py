"""Which checkpoints a run keeps, and what is in them beside Lightning's own."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from onestage.training.module import CHECKPOINT_KEY
from onestage.types import JSONDict


class BestCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/best.ckpt`, the weights with the best metric so far.

    Args:
        monitor: a logged metric, such as `val/mAP` or `val/AP50`.
        mode: `max` where more is better.
        dirpath: the folder; null: `checkpoints/` of the run.
    """

    def __init__(self, monitor: str = "val/mAP", mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best checkpoint of the run that is resumed, as a copy in this run's folder.

        Lightning forgets the best score when the folder changes: the first validation after a resume would win.
        """
        best = Path(state_dict["best_model_path"])
        if self.dirpath is None or not best.is_file():
            return  # its file is gone, so its score is nothing to go by
        copy = Path(self.dirpath) / best.name
        if rank_zero_only.rank == 0 and copy.resolve() != best.resolve():  # type: ignore[attr-defined]
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(best, copy)
        score = state_dict["best_model_score"]
        ours = {
            "dirpath": str(self.dirpath),
            "best_model_path": str(copy),
            "best_k_models": {str(copy): score},
            "kth_best_model_path": str(copy),
            "kth_value": score,
            "last_model_path": "",
        }
        super().load_state_dict({**state_dict, **ours})


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, the state to resume from.

    Args:
        every_n_epochs: how often it is written; 0 for never.
        dirpath: the folder; null: `checkpoints/` of the run.
    """

    def __init__(self, every_n_epochs: int = 1, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            monitor=None,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: this run writes a file of its own and leaves that of the run it resumes alone."""


class ConfigInCheckpoint(Callback):
    """Stores the run's `model` and `data` configuration in every checkpoint, so that one file is enough to predict."""

    def __init__(self, config: JSONDict) -> None:
        self.config = config

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration beside the class names."""
        checkpoint.setdefault(CHECKPOINT_KEY, {})["config"] = self.config
