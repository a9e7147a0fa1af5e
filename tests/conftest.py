"""A short run on a small drawn set, shared by the tests of commands."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import REPOSITORY, run
from filelock import FileLock

# Before torch is imported, here and in the processes of tests: `make test` has a process on each core, whose threads
# would wait for each other; and a forked child would wait for the threads of its parent for ever.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep to an empty cache: a memory format that this machine remembers must decide no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a drawn set of 32 training and 7 validation images."""
    from onestage.data.shapes import draw_shapes

    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    draw_shapes(folder, num_train=32, num_val=7, seed=0)
    return folder


@pytest.fixture(scope="session")
def fast_options(drawn: Path) -> list[str]:
    """Options that make the embedded experiment a matter of seconds."""
    return [
        "--config", str(REPOSITORY / "configs" / "shapes_ssd.yaml"),
        "--data.source.path", str(drawn), "--data.source.num_train", "32",
        "--data.source.num_val", "7", "--data.source.draw_seed", "0", "--data.source.max_objects", "6",
        "--model.detector", "SSD128", "--data.image_size", "128",
        "--data.num_workers", "0", "--data.batch_size", "8", "--model.channels_last", "false",
        "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
        "--drawn_images", "3",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, fast_options: list[str]) -> Path:
    """Run folder of `onestage fit`, which one of the processes of `pytest -n` trains for all."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "runs" / "shapes_ssd" / "version_0"
    with FileLock(shared / "trained.lock"):
        if not (shared / "trained").exists():
            assert run("fit", *fast_options, "--runs_dir", str(shared / "runs")) == 0
            (shared / "trained").touch()
    return folder


@pytest.fixture(scope="session")
def best(trained: Path) -> Path:
    """The best checkpoint of that run."""
    return trained / "checkpoints" / "best.ckpt"
