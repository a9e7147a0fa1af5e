"""How long a training step of the small SSD takes with each loss, all in one process and in turn."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser

from comparison.plan import LOSSES
from onestage.losses import ClassificationLoss
from onestage.models import SSD160
from onestage.types import PADDING, Targets

NUM_CLASSES = 6


def measure(losses: tuple[str, ...], file: Path, rounds: int = 15) -> None:
    """Write the median ratio of each loss's step to that of `mining` in the same round, as JSON."""
    torch.set_num_threads(1)
    steps = {loss: _step(_make_loss(loss)) for loss in losses}
    seconds: dict[str, list[float]] = {loss: [] for loss in losses}
    for number in range(rounds + 1):
        for loss in list(losses) if number % 2 else reversed(losses):
            start = time.perf_counter()
            steps[loss]()
            seconds[loss].append(time.perf_counter() - start)
    reference = seconds["mining"] if "mining" in seconds else next(iter(seconds.values()))
    ratios = {
        loss: statistics.median(ours / theirs for ours, theirs in zip(found[1:], reference[1:], strict=True))
        for loss, found in seconds.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ratios, indent=1), encoding="utf-8")
    for loss, ratio in ratios.items():
        print(f"{loss:<24}x{ratio:.2f} of a step with mining")


def _make_loss(loss: str) -> ClassificationLoss:
    content = yaml.safe_load((LOSSES / f"{loss}.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassificationLoss, "loss")
    parsed = parser.parse_object({"loss": content["model"]["detector"]["init_args"]["classification_loss"]})
    made: ClassificationLoss = parser.instantiate_classes(parsed).loss
    return made


def _step(loss: ClassificationLoss) -> Callable[[], None]:
    torch.manual_seed(0)
    detector = SSD160(NUM_CLASSES, loss).to(memory_format=torch.channels_last).train()
    detector.use_class_counts(torch.arange(1, NUM_CLASSES + 1))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-5)
    images = torch.randint(0, 256, (8, 3, 160, 160), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    low = torch.rand(8, 16, 2) * 100
    labels = torch.where(torch.arange(16) < 4, torch.arange(16) % NUM_CLASSES, PADDING).expand(8, -1)
    targets = Targets(torch.cat([low, low + 40], dim=-1) * (labels >= 0)[..., None], labels)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            losses = detector.loss(detector(images), targets)
        optimizer.zero_grad()
        (losses["classification"] + 0.2 * losses["box"]).backward()
        optimizer.step()

    return step
