"""Real photographs, where a checkout of them lies beside the project: blood cells in VOC format."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import REPOSITORY, run

BCCD = REPOSITORY.parent / "shared" / "data" / "bccd"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD images are not here")]


def train(runs: Path, config: str, **options: object) -> Path:
    """Train on the first eight training images as both splits; return the run folder."""
    root = runs.with_name("bccd")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    names = (BCCD / "ImageSets" / "Main" / "train.txt").read_text().split()[:8]
    (lists / "eight.txt").write_text("\n".join(names))
    for folder in ("Annotations", "JPEGImages"):
        shutil.copytree(BCCD / folder, root / folder)
    words = [
        "--config", str(REPOSITORY / "configs" / config), "--data.source", "onestage.data.VOC",
        "--data.source.path", str(root), "--data.source.train=[eight]", "--data.source.val=[eight]",
        "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--runs_dir", str(runs), *(f"--{key}={value}" for key, value in options.items()),
    ]  # fmt: skip
    assert run("fit", *words) == 0
    (folder,) = runs.glob("*/version_0")
    return folder


def test_small_model_overfits_eight_photographs(tmp_path):
    data = {"data.train_transforms": "[]", "data.batch_size": 8}
    intervals = {"trainer.check_val_every_n_epoch": 100, "last_checkpoint.every_n_epochs": 400}
    folder = train(tmp_path / "runs", "shapes_ssd160.yaml", **data, **intervals, **{"trainer.max_epochs": 400})
    assert json.loads((folder / "results.json").read_text())["metrics"]["AP50"] > 0.9
