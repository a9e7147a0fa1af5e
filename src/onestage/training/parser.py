"""Lightning's parser with our messages, and the rule of what a configuration may import."""

import sys
from typing import NoReturn

from jsonargparse import set_parsing_settings
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
