"""Training from Python: `onestage.train` is `onestage fit` as a function."""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from onestage.cli.commands import run_trainer_command
from onestage.data.datamodule import DetectionDataModule
from onestage.data.source import Source
from onestage.errors import ConfigError
from onestage.training.module import DetectionModule
from onestage.types import Metrics

# A name without dots belongs to the first group whose constructor takes it.
GROUPS = {"trainer": Trainer, "data": DetectionDataModule, "model": DetectionModule}


class Run(NamedTuple):
    """A finished training."""

    folder: Path  # runs/<experiment>/version_<n>
    metrics: Metrics  # COCO's twelve numbers of the best checkpoint on the validation split, in [0, 1]
    checkpoint: Path | None  # the best one, for `onestage.load`; None: none was written


def train(
    config: str | Path, *, data: DetectionDataModule | Source | str | Path | None = None, **overrides: Any
) -> Run:
    """Train, evaluate the best checkpoint, write the run folder: `onestage fit --config CONFIG`.

    Args:
        config: a YAML file, such as configs/voc_ssd300.yaml.
        data: a source or the path of a data set, read with the settings of the config; or a data module, whose own
            settings replace the config's `data`; None: the data of the config.
        overrides: keys of the configuration, such as max_epochs=50 or batch_size=8; with dots as
            `**{"model.optimizer.lr": 1e-3}`.

    Raises:
        OnestageError: what `onestage fit` reports; see onestage/errors.py.
    """
    words = ["fit", "--config", str(config)]
    if isinstance(data, str | Path):
        words += ["--data.path", str(data)]
    for name, value in overrides.items():
        groups = [group for group, owner in GROUPS.items() if name in inspect.signature(owner).parameters]
        key = f"{groups[0]}.{name}" if groups else name
        if isinstance(data, DetectionDataModule) and key.startswith("data."):
            raise ConfigError(f"train: {name} conflicts with a data module.\nPass {name} where that is constructed.")
        words.append(f"--{key}={value if isinstance(value, str | Path) else json.dumps(value, default=str)}")
    command = run_trainer_command(words, None if isinstance(data, str | Path) else data)
    best = command.run_folder / "checkpoints" / "best.ckpt"
    return Run(command.run_folder, dict(command.model.metrics), best if best.is_file() else None)
