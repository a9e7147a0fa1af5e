"""What the commands on data sets share in reading their words. Nothing heavy is imported: help comes at once."""

import argparse
from typing import NoReturn

from onestage.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """A parser that raises instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Stop with what cannot be used."""
        raise ConfigError(f"{self.prog}: {message}.\nSee: {self.prog} --help")


def require_fraction(option: str, value: float) -> None:
    """Check a share.

    Raises:
        ConfigError: it is not in 0..1.
    """
    if not 0 <= value <= 1:  # also where it is not a number
        raise ConfigError(f"{option} is {value:g}; it must be in 0..1.\nTry: 0.01")
