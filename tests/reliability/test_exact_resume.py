"""A run that was stopped anywhere and goes on ends with the same bits as one that was not."""

import csv
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run

from onestage.reliability.callbacks import SeededSteps
from onestage.training.module import DetectionModule

STEP, VALIDATION = "training_step", "validation_step"
# 32 images in batches of 4 are 8 steps an epoch; 7 images are 2 batches a validation.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "workers": ("--data.num_workers", "2"),
    "accumulation": ("--trainer.accumulate_grad_batches", "3"),
    "average": ("--ema.decay", "0.9"),
    "fp16": ("--trainer.precision", "16-mixed"),
    "validation inside epochs": ("--trainer.val_check_interval", "0.5"),
    "validation between accumulated batches": (
        "--trainer.accumulate_grad_batches=3",
        "--trainer.val_check_interval=0.5",
    ),
    "sgd": (
        "--model.optimizer",
        "torch.optim.SGD",
        "--model.optimizer.lr=0.01",
        "--model.optimizer.momentum=0.9",
    ),
}
STOPS = [
    *[("plain", STEP, count) for count in (1, 5, 8, 16)],
    *[("plain", VALIDATION, count) for count in (2, 4)],
    ("workers", STEP, 8),
    *[("accumulation", STEP, count) for count in (1, 8)],
    ("average", STEP, 6),
    ("average", VALIDATION, 1),
    ("fp16", STEP, 5),
    *[("validation inside epochs", STEP, count) for count in (4, 8)],
    ("validation inside epochs", VALIDATION, 1),
    ("validation between accumulated batches", STEP, 4),  # whose validation the signal is first seen in
    ("validation between accumulated batches", VALIDATION, 1),
    ("sgd", STEP, 10),
]
MORE_STOPS = [  # the same moments of a later epoch, or beside them
    *[("plain", STEP, count) for count in (9, 15)],
    ("plain", VALIDATION, 1),
    ("workers", STEP, 3),
    ("accumulation", STEP, 12),
    ("average", VALIDATION, 2),
    *[("validation inside epochs", STEP, count) for count in (3, 12)],
    ("validation inside epochs", VALIDATION, 5),
]


def stop_and_go_on(
    drawn: Path, runs: Path, options: tuple[str, ...], method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    command = tiny_run.words(drawn, runs, *options, "--resume", "auto")
    with monkeypatch.context() as patch:
        stop = tiny_run.at_call(count, lambda: tiny_run.send(signal.SIGTERM), getattr(DetectionModule, method))
        patch.setattr(DetectionModule, method, stop)
        assert tiny_run.onestage(*command) == 143
    assert tiny_run.onestage(*command) == 0
    (folder,) = runs.glob("tiny/version_*")
    return folder


@pytest.mark.parametrize(
    ("variant", "method", "count"), [*STOPS, *(pytest.param(*stop, marks=pytest.mark.slow) for stop in MORE_STOPS)]
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    variant: str,
    method: str,
    count: int,
    drawn: Path,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = uninterrupted(*VARIANTS[variant])
    resumed = stop_and_go_on(drawn, tmp_path, VARIANTS[variant], method, count, monkeypatch)
    assert tiny_run.differences(tiny_run.final_state(whole), tiny_run.final_state(resumed)) == []
    assert rows(resumed) == [row for row in rows(whole) if row in rows(resumed)]
    assert len(rows(resumed)) >= len(rows(whole)) - 1  # the row of the step it stopped after is written by neither


def bad_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    step = DetectionModule.training_step

    def broken(self: DetectionModule, *arguments: object) -> dict[str, object]:
        outputs = step(self, *arguments)
        return {**outputs, "loss": outputs["loss"] * float("nan")} if self.global_step in steps else outputs

    monkeypatch.setattr(DetectionModule, "training_step", broken)


@pytest.mark.parametrize(("steps", "stop", "code"), [((3, 4, 5, 6, 7), 6, 6), ((3, 4, 9, 10), 5, 0)])
def test_skipped_steps_are_counted_on_as_without_the_stop(
    steps: tuple[int, ...], stop: int, code: int, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    bad_at(monkeypatch, *steps)
    assert tiny_run.onestage(*tiny_run.words(drawn, whole)) == code
    command = tiny_run.words(drawn, broken, "--resume", "auto")
    with monkeypatch.context() as patch:
        interrupt = tiny_run.at_call(stop, lambda: tiny_run.send(signal.SIGTERM), DetectionModule.training_step)
        patch.setattr(DetectionModule, "training_step", interrupt)
        assert tiny_run.onestage(*command) == 143
    assert tiny_run.onestage(*command) == code
    folders = whole / "tiny" / "version_0", broken / "tiny" / "version_0"
    texts = [(folder / "skipped_steps.json").read_text() for folder in folders]
    assert texts[0] == texts[1]
    counts = [
        {row["step"]: row["train/skipped_steps"] for row in rows(folder) if row["train/skipped_steps"]}
        for folder in folders
    ]
    assert counts[1].items() <= counts[0].items()
    assert len(counts[1]) >= len(counts[0]) - 1  # as above
    if code == 0:
        assert tiny_run.differences(*map(tiny_run.final_state, folders)) == []


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def test_without_the_seeding_of_the_steps_the_bits_differ(
    drawn: Path, uninterrupted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: dropout draws from a state that no checkpoint holds."""
    whole = uninterrupted()
    monkeypatch.setattr(SeededSteps, "on_train_batch_start", lambda *_: None)
    resumed = stop_and_go_on(drawn, tmp_path, (), STEP, 5, monkeypatch)
    assert tiny_run.differences(tiny_run.final_state(whole), tiny_run.final_state(resumed)) != []
