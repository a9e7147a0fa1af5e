"""How long a training step of the small SSD takes with each loss, all in one process and in turn."""

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
from onestage.losses import ClassificationLoss
from onestage.models import SSD160
from onestage.types import PADDING, Targets

NUM_CLASSES = 6
BATCH_SIZE = 8


@dataclass(frozen=True)
class StepTimes:
    """Medians over rounds in each of which every loss had its turn."""

    reference: str  # the loss with whose step of the same round the others are compared
    ratios: dict[str, float]
    seconds: dict[str, float]  # empty in the files of old
    rounds: int | None

    @property
    def explanation(self) -> str:
        """What was timed."""
        rounds = f" of {self.rounds} rounds" if self.rounds else ""
        seconds = ", and in seconds" if self.seconds else ""
        return (
            f"The step time, whatever the runs' own precision and device, is that of forward, loss, backward and AdamW "
            f"of SSD160 with {NUM_CLASSES} classes, {BATCH_SIZE} images of 160 x 160 pixels, in bfloat16 autocast on "
            f"one CPU thread: the median{rounds}, as a multiple of a step with {self.reference} in the same round"
            f"{seconds}."
        )

    def cell(self, loss: str) -> str:
        """Return a loss's cell of a table, empty if it was not timed."""
        seconds = f" ({self.seconds[loss]:.3f} s)" if loss in self.seconds else ""
        return f"x{self.ratios[loss]:.2f}{seconds}" if loss in self.ratios else ""


def read_step_times(file: Path) -> StepTimes | None:
    """Return what `measure` wrote, today or when it kept the ratios alone; None without a file."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if "ratios" in content:
        return StepTimes(**content)
    return StepTimes(_reference(tuple(content)), content, {}, None)


def _reference(losses: tuple[str, ...]) -> str:
    return "mining" if "mining" in losses else losses[0]


def measure(losses: tuple[str, ...], file: Path, rounds: int = 15) -> None:
    """Write the median seconds of each loss's step, and their median ratio to those of `mining`, as JSON.

    Without `mining` among the losses, the ratio is to the first of them. The first round is not counted.
    """
    torch.set_num_threads(1)
    steps = {loss: _step(_make_loss(loss)) for loss in losses}
    seconds: dict[str, list[float]] = {loss: [] for loss in losses}
    for number in range(rounds + 1):
        for loss in list(losses) if number % 2 else reversed(losses):
            start = time.perf_counter()
            steps[loss]()
            seconds[loss].append(time.perf_counter() - start)
    reference = _reference(losses)
    ratios = {
        loss: statistics.median(ours / theirs for ours, theirs in zip(found[1:], seconds[reference][1:], strict=True))
        for loss, found in seconds.items()
    }
    medians = {loss: statistics.median(found[1:]) for loss, found in seconds.items()}
    times = StepTimes(reference, ratios, medians, rounds)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(times), indent=1), encoding="utf-8")
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
