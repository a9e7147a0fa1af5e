"""Lightning's parser with our keys, and the configuration files it reads."""

import inspect
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

import onestage.losses
from onestage.cli.messages import CONFIGS
from onestage.data.datamodule import DetectionDataModule
from onestage.data.source import Source
from onestage.errors import require

SHARED_CONFIG = Path("configs") / "trainer.yaml"
STORED_CONFIG = "of_the_checkpoint.yaml"

DATA_HELP = (
    "The data set: --data.path recognises COCO, VOC and YOLO; or a class of onestage.data: COCO, VOC, YOLO, Shapes, or "
    "your own. Keys of a class: --data.source.help onestage.data.COCO, --model.detector.help onestage.models.SSD300"
)

# Defaults of Lightning's callbacks, such as Timer's interval, which jsonargparse cannot write otherwise.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class DetectionParser(LightningArgumentParser):
    """Lightning's parser; it raises instead of printing a page of usage."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; a logger needs no save_dir, because a run has a folder."""
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        if inspect.isclass(theclass) and issubclass(theclass, Logger):
            for action in self._actions:  # private: argparse lists its actions nowhere else
                action.required = action.required and action.dest != "save_dir"
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise with jsonargparse's message."""
        raise ParsingError(message) from ex


class ParsingError(Exception):
    """A value or key that jsonargparse rejects."""


def add_run_keys(parser: LightningArgumentParser) -> None:
    """Add the keys of no class. Every command accepts all of them, so that any config.yaml fits any command."""
    for name in onestage.losses.__all__:
        getattr(onestage.losses, name)  # jsonargparse accepts the short name of an imported class only
    assert parser.groups is not None
    parser.groups["data"].title = DATA_HELP
    parser.add_argument(  # all literal: cli/keys.py reads them
        "--experiment", type=str | None, default=None,
        help="name of the run's folder; default: that of the last --config",
    )  # fmt: skip
    parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
    parser.add_argument(
        "--drawn_images", type=NonNegativeInt, default=16,
        help="number of images drawn in each evaluation; 0: no pictures",
    )  # fmt: skip
    parser.add_argument(
        "--anchor_statistics", type=bool, default=True, help="log which anchors the classification loss comes from"
    )
    parser.add_argument(
        "--auto_batch", type=bool | PositiveFloat, nargs="?", const=True, default=False,
        help="fit with the largest data.batch_size that fits into 0.9 of the free memory, or into this many GiB",
    )  # fmt: skip


def checked_seed(seed: int) -> int:
    """Return the seed for the data; raise ConfigError if NumPy or torch would not take it."""
    is_seed = not isinstance(seed, bool) and 0 <= seed < 2**32
    require(is_seed, "seed_everything", seed, "a whole number in [0, 4294967295]", "Such as seed_everything: 42.")
    return seed


def shared_config() -> list[str]:
    """Return configs/trainer.yaml of the working directory, else that of this package; empty without either."""
    return [str(path) for path in (SHARED_CONFIG, CONFIGS / SHARED_CONFIG.name) if path.is_file()][:1]


def experiment_name(given: str | None, configs: Sequence[object], checkpoint: str | None) -> str:
    """Return the name of a run's folder: the given one, else the last configuration's or the checkpoint's experiment.

    ConfigError if it is not a plain folder name.
    """
    stems = [Path(str(path)).stem for path in configs]
    names = [stem for stem in stems if stem not in (SHARED_CONFIG.stem, Path(STORED_CONFIG).stem)]
    folders = Path(str(checkpoint or "")).absolute().parents
    in_run_folder = len(folders) > 3 and folders[0].name == "checkpoints"
    name = given or (names[-1] if names else folders[2].name if in_run_folder else "onestage")
    is_plain = name.isprintable() and name == Path(name).name and name != ".."
    require(is_plain, "experiment", name, "one folder name", "Set --runs_dir to write somewhere else.")
    return name


def record_data(settings: Any, data: Source | DetectionDataModule) -> None:
    """Write what `data` is into the parsed `data` group, for config.yaml and the checkpoints; a source is only named.

    settings: changed in place.
    """
    settings.source = settings.path = None
    if isinstance(data, DetectionDataModule):
        for name in ("image_size", "batch_size", "val_fraction", "num_folds", "fold", "max_bad_fraction"):
            settings[name] = getattr(data, name)
        resize, kind = data.resize, type(data.resize)
        arguments = {name: getattr(resize, name) for name in inspect.signature(kind).parameters}
        settings.resize = Namespace(  # type: ignore[no-untyped-call]
            class_path=f"{kind.__module__}.{kind.__name__}",
            init_args=Namespace(arguments),  # type: ignore[no-untyped-call]
        )
