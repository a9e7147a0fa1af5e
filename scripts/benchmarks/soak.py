"""Two thousand steps of a tiny model: whether memory, open files or threads grow with the number of steps."""

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from onestage.cli import main
from onestage.models.heads import ExtraLayer
from onestage.models.ssd import SSD, ssd_levels
from onestage.models.vgg import VGG

MAX_MEGABYTES = 1.0  # per 1,000 steps
WARM_UP = 0.25  # of the samples: allocators and caches fill in the beginning


LEVELS = ssd_levels((8, 16, 32), (12, 20, 36, 56))


class SmallDetector(SSD):
    """480 anchors on 64 x 64 px: a step costs milliseconds."""

    image_size = 64
    anchor_tables = {"voc": LEVELS, "coco": LEVELS}  # noqa: RUF012 # as in SSD300
    extra_layers = (ExtraLayer(8, 16),)

    def make_backbone(self) -> VGG:
        """Five convolutions of 8 and 16 channels."""
        return VGG((1, 1, 1, 1, 1), (8, 8, 8, 16, 16), fc_width=16, fc6_dilation=1, batch_norm=False)


class Growth(pl.Callback):
    """Notes, every `interval` steps, what the process holds."""

    samples: list[tuple[int, float, int, int]] = []  # noqa: RUF012 # of the one run of this program

    def __init__(self, interval: int = 20) -> None:
        self.interval = interval

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the step, the resident memory in MB, the open files and the threads."""
        if trainer.global_step % self.interval == 0:
            gc.collect()  # what only waits to be collected does not grow
            files = len(list(Path("/proc/self/fd").iterdir()))
            self.samples.append((trainer.global_step, resident_megabytes(), files, threading.active_count()))


def run(rounds: int, quick: bool) -> None:
    """Train for 2,000 steps (60 where quick), with two workers, validations and checkpoints; print the slopes."""
    steps = 60 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        code = main(words(Path(folder), steps))
    assert code == 0, f"the run ended with {code}"
    samples = np.array(Growth.samples)
    quarters = " / ".join(f"{part[:, 1].mean():.1f}" for part in np.array_split(samples, 4))
    print(f"MB of memory, mean of each quarter: {quarters}")
    samples = samples[int(WARM_UP * len(samples)) :]
    slopes = {
        name: 1000 * float(np.polyfit(samples[:, 0], samples[:, column], 1)[0])
        for column, name in enumerate(("MB of memory", "open files", "threads"), start=1)
    }
    for name, slope in slopes.items():
        print(f"{name:<15} {slope:+9.3f} per 1,000 steps")
    if not quick:
        assert slopes["MB of memory"] < MAX_MEGABYTES, "memory grows"
        assert slopes["open files"] < 0.5, "open files grow"
        assert slopes["threads"] < 0.5, "threads grow"
        print(f"asserted: less than {MAX_MEGABYTES:g} MB per 1,000 steps, no file and no thread")


def words(folder: Path, steps: int) -> list[str]:
    """The command of the run: the embedded experiment at 64 px, 8 steps an epoch, everything switched on."""
    config = Path(__file__).resolve().parents[2] / "configs" / "shapes_ssd.yaml"
    return [
        "fit", "--config", str(config), "--data.source.path", str(folder / "data"), "--runs_dir", str(folder / "runs"),
        "--data.source.num_train", "32", "--data.source.num_val", "7", "--data.num_workers", "2",
        "--data.batch_size", "4",
        "--data.image_size", "64", "--model.detector.class_path", "benchmarks.soak.SmallDetector",
        "--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps), "--trainer.check_val_every_n_epoch", "10",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--drawn_images", "2",
        "--trainer.enable_model_summary", "false", "--last_checkpoint.every_n_steps", "50", "--ema.decay", "0.99",
        "--trainer.callbacks+=benchmarks.soak.Growth",
    ]  # fmt: skip


def resident_megabytes() -> float:
    """The memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
