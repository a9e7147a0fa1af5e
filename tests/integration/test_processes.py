"""The commands over two processes on the CPU: one run folder, and the numbers of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def start(words: list[str], launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *(launcher or []), "-m", "onestage.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def results_of(runs: Path) -> dict[str, object]:
    (path,) = runs.glob("*/*/results.json")
    assert [folder.name for folder in path.parent.parent.iterdir()] == ["version_0"]
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_evaluate_an_odd_number_of_images_as_one_does(
    trained: Path, tmp_path: Path, launcher: str
) -> None:
    words = ["validate", "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"), "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=2", "--trainer.strategy=ddp", "--runs_dir", str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = start(words, torchrun if launcher == "torchrun" else None)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = json.loads((trained / "results.json").read_text())
    together = results_of(tmp_path)
    assert together["metrics"] == alone["metrics"]
    assert together["per_class"] == alone["per_class"]
    assert done.stdout.strip().splitlines()[-1].startswith("results: ")


def test_two_processes_train_into_one_run_folder(fast_options: list[str], tmp_path: Path) -> None:
    words = ["fit", *fast_options, "--trainer.devices=2", "--trainer.strategy=ddp", "--runs_dir", str(tmp_path)]
    done = start(words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(tmp_path)["stage"] == "validate"
    (folder,) = tmp_path.glob("*/version_0")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
