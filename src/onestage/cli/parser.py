"""Lightning's parser with our messages and keys, which files it reads, and what a configuration may import."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser

from onestage.errors import ConfigError

SHARED_CONFIG = Path("configs") / "trainer.yaml"
STORED_CONFIG = "of_the_checkpoint.yaml"

# A configuration may name the classes of any package: that is how a user's own detector or data set comes in. What
# Python itself brings along is never one of those, and holds every ready-made way to run a command or a pickle.
NEVER_NAMED = sorted(
    {name for name in sys.stdlib_module_names if name.isidentifier()}
    | {"builtins", "torch.hub", "torch.load", "torch.package", "torch.utils.cpp_extension", "pip", "setuptools"}
)
NAMED_ALL_THE_SAME = ["datetime.timedelta"]  # the type of trainer.max_time and others

DATA_HELP = (
    "The data set: --data.path recognises COCO, VOC and YOLO; or a class of onestage.data: COCO, VOC, YOLO, Shapes, or "
    "your own. Keys of a class: --data.source.help onestage.data.COCO, --model.detector.help onestage.models.SSD300"
)


class DetectionParser(LightningArgumentParser):
    """Lightning's parser, which raises instead of printing a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with jsonargparse's message."""
        raise ParsingError(message) from ex


class ParsingError(Exception):
    """What jsonargparse says of a value or key."""


def restrict_imports() -> None:
    """Refuse configurations that name what only an attack would: modules of the standard library, pickles, hubs."""
    set_parsing_settings(import_path_denylist=NEVER_NAMED, import_path_allowlist=NAMED_ALL_THE_SAME)


def add_run_keys(parser: LightningArgumentParser) -> None:
    """Add the keys that belong to no class. Every command takes all, so that any config.yaml fits any command."""
    assert parser.groups is not None
    parser.groups["data"].title = DATA_HELP
    parser.add_argument(
        "--experiment",
        type=str | None,
        default=None,
        help="name of the run's folder; default: that of the last --config",
    )
    parser.add_argument("--runs_dir", type=str, default="runs", help="folder of all runs")
    parser.add_argument(
        "--drawn_images", type=NonNegativeInt, default=16, help="how many images of an evaluation are drawn"
    )
    parser.add_argument(
        "--drawn_score", type=ClosedUnitInterval, default=0.5, help="lowest score of a drawn detection, 0..1"
    )
    parser.add_argument(
        "--anchor_statistics", type=bool, default=True, help="log where the classification loss comes from"
    )
    parser.add_argument(
        "--auto_batch",
        type=bool | PositiveFloat,
        nargs="?",
        const=True,
        default=False,
        help="fit with the largest data.batch_size that goes into 0.9 of the free memory, or of so many GiB",
    )


def checked_seed(seed: int) -> int:
    """Return the seed that the data is to share, if it is one.

    Raises:
        ConfigError: it is true or false, or outside of what NumPy takes, 0..2^32 - 1.
    """
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything is {seed}; it must be a whole number from 0 to 4294967295, such as 42.")
    return seed


def shared_configs() -> list[Path]:
    """configs/trainer.yaml of the working directory, or of the source tree this package was installed from."""
    source_tree = Path(__file__).resolve().parents[3]
    return [path for path in (SHARED_CONFIG, source_tree / SHARED_CONFIG) if path.is_file()]


def experiment_name(configs: Sequence[object], checkpoint: str | None) -> str:
    """Return the name of a run's folder: that of its last configuration, else that of its checkpoint's experiment."""
    stems = [Path(str(path)).stem for path in configs]
    names = [stem for stem in stems if stem not in (SHARED_CONFIG.stem, Path(STORED_CONFIG).stem)]
    if names:
        return names[-1]
    folders = Path(str(checkpoint or "")).absolute().parents
    in_run_folder = len(folders) > 3 and folders[0].name == "checkpoints"
    return folders[2].name if in_run_folder else "onestage"


def require_classes_of_the_data(detector: Any) -> None:
    """Refuse a number of classes of the user's own. detector: the parsed `model.detector` group.

    Raises:
        ConfigError: there is one.
    """
    num_classes = (detector.get("init_args") or {}).get("num_classes")
    if num_classes is not None:
        raise ConfigError(
            f"model.detector.num_classes is {num_classes}, but that is for the data to say.\nLeave it out; for other "
            "classes set data.class_names."
        )
