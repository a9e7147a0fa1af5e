"""From files to the training step: images per second that workers deliver, and that the step takes.

The loader is the one that a training gets: JPEG files are decoded, augmented by SSD's recipe, and collated, in worker
processes that stay alive between epochs. The step is SSD300's with the focal loss. Both are measured by themselves;
on a machine without a GPU they would share the cores.
"""

import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.image_files import write_images
from benchmarks.step import onestage_step
from benchmarks.training_data import NUM_CLASSES, synthetic_batch
from onestage.data.cache import CacheKind, open_images
from onestage.data.dataset import DetectionDataset
from onestage.data.loader import DetectionLoader, num_auto_workers, open_loader
from onestage.data.resize import Stretch
from onestage.data.samplers import TrainingSampler
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.losses import SigmoidFocalLoss
from onestage.models import SSD300
from onestage.training.trainer import choose_precision
from onestage.types import AnnotationSet

IMAGE_SIZE = 300


def run(rounds: int, quick: bool, images: Path | None = None) -> None:
    """Measure and compare. images: a folder of JPEG files instead of the drawn ones."""
    batch_size = 2 if quick else 32 if torch.cuda.is_available() else 4
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        annotations = write_images(Path(folder) / "images", 4 if quick else 256, images)
        rates = {
            (num_workers, kind): _loader_rate(annotations, kind, num_workers, batch_size, rounds)
            for num_workers in sorted({1, max(num_auto_workers(1), 1)})
            for kind in ("none", "disk")
        }
    print(f"\n{len(annotations)} images, batches of {batch_size}; images/s, min / median / max of {rounds} epochs")
    for (num_workers, kind), values in rates.items():
        spread = " / ".join(f"{value:.0f}" for value in (min(values), statistics.median(values), max(values)))
        print(f"{num_workers:2} workers, data.cache: {kind:<5} {spread}")
    taken = _step_rate(batch_size, 1 if quick else 5)
    print(f"a training step of SSD300 takes {taken:.1f} images per second")
    print(_verdict({key: statistics.median(values) for key, values in rates.items()}, taken))


def _loader_rate(
    annotations: AnnotationSet, kind: CacheKind, num_workers: int, batch_size: int, rounds: int
) -> list[float]:
    """Return images per second of each epoch after the first, in which workers start and caches fill."""
    dataset = DetectionDataset(
        annotations,
        SeededTransform(ssd_transforms(Stretch(IMAGE_SIZE)), Stretch(IMAGE_SIZE)),
        images=open_images(kind, annotations, IMAGE_SIZE),
    )
    loader = open_loader(
        dataset,
        TrainingSampler(dataset, batch_size=batch_size, seed=0),
        batch_size=batch_size,
        num_workers=num_workers,
        prefetch_factor=4,
        start_method=None,
        timeout_seconds=300,
    )
    _seconds_of_epoch(loader, 0)
    return [len(loader) * batch_size / _seconds_of_epoch(loader, epoch) for epoch in range(1, rounds + 1)]


def _seconds_of_epoch(loader: DetectionLoader, epoch: int) -> float:
    sampler = loader.sampler
    assert isinstance(sampler, TrainingSampler)
    sampler.set_epoch(epoch)
    start = time.perf_counter()
    num_batches = sum(1 for _ in loader)
    assert num_batches == sampler.num_batches, "the loader lost batches"
    return time.perf_counter() - start


def _step_rate(batch_size: int, rounds: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, _ = choose_precision(device.type)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    model = SSD300(NUM_CLASSES, SigmoidFocalLoss(), anchors="coco").to(device)
    step = onestage_step(model, *synthetic_batch(batch_size, device), dtype)
    step()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return rounds * batch_size / (time.perf_counter() - start)


def _verdict(rates: dict[tuple[int, str], float], taken: float) -> str:
    """Say whether the step would wait for the loader, and how many workers it takes that it does not."""
    num_workers = max(number for number, _ in rates)
    delivered = rates[num_workers, "none"]
    needed = {kind: math.ceil(taken / rates[1, kind]) for kind in ("none", "disk")}
    state = "loader-bound: the step waits for images" if delivered < taken else "not loader-bound"
    return (
        f"verdict with {num_workers} workers and no cache: {state} ({delivered / taken:.2f} times what it takes)\n"
        f"workers that the step needs: {needed['none']} without a cache, {needed['disk']} with data.cache: disk"
    )
