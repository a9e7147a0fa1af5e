"""An interrupted run, and the uninterrupted ones to compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from onestage.reliability.checkpoints import stored_step


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


@pytest.fixture(scope="session")
def stopped(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 16 steps that was stopped after step 12, with a best checkpoint of step 8; to be copied."""
    runs = tmp_path_factory.mktemp("stopped")
    assert tiny_run.end_of_signalled(tiny_run.words(drawn, runs), 12) == 143
    folder = tiny_run.folder_of(runs)
    assert [stored_step(folder / "checkpoints" / name) for name in ("best.ckpt", "last.ckpt")] == [8, 12]
    return folder
