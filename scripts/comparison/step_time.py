"""Time a training step of the small SSD with each loss, alternating in one process."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser

from comparison.plan import LOSSES
from onestage.evaluation.results import to_json
from onestage.files import atomic_write
from onestage.losses import ClassificationLoss
from onestage.models import SSD160
from onestage.types import PADDING, Targets

NUM_CLASSES = 6
BATCH_SIZE = 8


@dataclass(frozen=True)
class StepTimes:
    """Medians over rounds; every round times every loss."""

    reference: str  # the loss that ratios are relative to
    ratios: dict[str, float]
    seconds: dict[str, float]
    rounds: int

    @property
    def explanation(self) -> str:
        """What was timed."""
        return (
            "The step time, independent of precision and device of the runs, covers forward, loss, backward and AdamW "
            f"of SSD160 with {NUM_CLASSES} classes, {BATCH_SIZE} images of 160 x 160 pixels, in bfloat16 autocast on "
            f"one CPU thread: the median of {self.rounds} rounds, as a multiple of a step with {self.reference} in the "
            "same round, and in seconds."
        )

    def cell(self, loss: str) -> str:
        """Return a loss's cell of a table, empty if it was not timed."""
        return f"x{self.ratios[loss]:.2f} ({self.seconds[loss]:.3f} s)" if loss in self.ratios else ""


def read_step_times(file: Path) -> StepTimes | None:
    """Return what `measure` wrote; None without a file."""
    if not file.is_file():
        return None
    return StepTimes(**json.loads(file.read_text(encoding="utf-8")))


def measure(losses: tuple[str, ...], file: Path, rounds: int = 15) -> None:
    """Write the median seconds of each loss's step, and their median ratio to those of `mining`, as JSON.

    Without `mining` among the losses, the ratio is to the first loss. The first round is not counted.
    """
    torch.set_num_threads(1)
    steps = {loss: _step(_make_loss(loss)) for loss in losses}
    seconds: dict[str, list[float]] = {loss: [] for loss in losses}
    for number in range(rounds + 1):
        for loss in list(losses) if number % 2 else reversed(losses):
            start = time.perf_counter()
            steps[loss]()
            seconds[loss].append(time.perf_counter() - start)
    reference = "mining" if "mining" in losses else losses[0]
    ratios = {
        loss: statistics.median(ours / theirs for ours, theirs in zip(found[1:], seconds[reference][1:], strict=True))
        for loss, found in seconds.items()
    }
    medians = {loss: statistics.median(found[1:]) for loss, found in seconds.items()}
    times = StepTimes(reference, ratios, medians, rounds)
    with atomic_write(file) as temporary:
        temporary.write_text(to_json(asdict(times), indent=1), encoding="utf-8")
    for loss in losses:
        print(f"{loss:<24}{times.cell(loss)}, of a step with {reference}")


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
    detector.set_class_counts(torch.arange(1, NUM_CLASSES + 1))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-5)
    images = torch.randint(0, 256, (BATCH_SIZE, 3, 160, 160), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    low = torch.rand(BATCH_SIZE, 16, 2) * 100
    labels = torch.where(torch.arange(16) < 4, torch.arange(16) % NUM_CLASSES, PADDING).expand(BATCH_SIZE, -1)
    targets = Targets(torch.cat([low, low + 40], dim=-1) * (labels >= 0)[..., None], labels)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            terms = detector.loss(detector(images), targets).terms
        optimizer.zero_grad()
        (terms["classification"] + 0.2 * terms["box"]).backward()
        optimizer.step()

    return step
