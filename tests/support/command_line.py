"""Running `onestage` in this process, as the tests of the commands do."""

import logging
import sys
from pathlib import Path

from onestage.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*words: str) -> int:
    """Run a command as its own process would, without a second import of torch."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not one of pytest's own
                handler.stream = sys.stderr  # pytest gives each test a stream of its own and closes it; no flush
    return main(list(words))
