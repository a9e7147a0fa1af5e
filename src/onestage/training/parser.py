"""Lightning's parser with our messages and keys, and the rule of what a configuration may import."""

import sys
from typing import NoReturn

from jsonargparse import set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser

# A configuration may name the classes of any package: that is how a user's own detector or data set comes in. What
# Python itself brings along is never one of those, and holds every ready-made way to run a command or a pickle.
NEVER_NAMED = sorted(
    {name for name in sys.stdlib_module_names if name.isidentifier()}
    | {"builtins", "torch.hub", "torch.load", "torch.package", "torch.utils.cpp_extension", "pip", "setuptools"}
)
NAMED_ALL_THE_SAME = ["datetime.timedelta"]  # the type of trainer.max_time and others


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
        "--auto_batch",
        type=bool | PositiveFloat,
        nargs="?",
        const=True,
        default=False,
        help="fit with the largest data.batch_size that goes into 0.9 of the free memory, or of so many GiB",
    )
    parser.add_argument(
        "--resume",
        type=str,
        default="none",
        help="fit auto: go on with the newest run of this experiment and configuration, in its folder; "
        "PATH: from that checkpoint, in a new folder; none: begin a new run",
    )
    parser.add_argument(
        "--allow_data_change", type=bool, default=False, help="resume although the annotations are not the same"
    )
