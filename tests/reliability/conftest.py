"""Uninterrupted runs, which interrupted ones are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run


@pytest.fixture(scope="session")
def uninterrupted(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a variant to its end, once, and return its folder."""
    folders: dict[tuple[str, ...], Path] = {}

    def run_folder(*options: str) -> Path:
        if options not in folders:
            runs = tmp_path_factory.mktemp("whole")
            assert tiny_run.onestage(*tiny_run.words(drawn, runs, *options)) == 0
            folders[options] = tiny_run.folder_of(runs)
        return folders[options]

    return run_folder
