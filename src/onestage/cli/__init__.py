"""The command line."""

from onestage.cli.main import main

__all__ = ["main"]
