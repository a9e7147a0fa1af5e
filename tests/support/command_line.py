"""Running `onestage` in this process, as the tests of the commands do."""

import logging
import sys
from pathlib import Path

import pytest

from onestage.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*words: str) -> int:
    """Run a command as its own process would, without a second import of torch."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not one of pytest's own
                handler.stream = sys.stderr  # pytest gives each test a stream of its own and closes it; no flush
    return main(list(words))


def run_on(checkpoint: Path, command: str, runs: Path, *options: str, code: int = 0) -> Path:
    """Run a command on a checkpoint on the CPU, which must end with `code`; return the folder of its run."""
    words = ("--ckpt_path", str(checkpoint), "--runs_dir", str(runs), "--trainer.accelerator=cpu")
    assert run(command, *words, *options) == code
    (folder,) = runs.glob("*/version_0")
    return folder


def message_of(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Run a command that must fail with `code`; return its message."""
    capsys.readouterr()
    ended = run(*words)
    text = capsys.readouterr().err
    assert ended == code, text
    assert "Traceback" not in text
    return text[text.index("error: ") :]
