"""A run that was stopped anywhere and resumed ends with the same bits as one that was not."""

import csv
from pathlib import Path

import pytest
import tiny_run

from onestage.training.module import DetectionModule

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
STEP, VALIDATION = "training_step", "validation_step"
# 32 images in batches of 4 are 8 steps an epoch; 7 images are 2 batches a validation.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "workers": ("--data.num_workers", "2"),
    "accumulation": ("--trainer.accumulate_grad_batches", "3"),
    "average": ("--ema.decay", "0.9"),
    "fp16": ("--trainer.precision=16-mixed", "--model.optimizer.init_args.fused=false"),
    "validation inside epochs": ("--trainer.val_check_interval", "0.5"),
    "accumulation over validations": ("--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.5"),
    "yolo of many sizes": (
        *("--model.detector", "onestage.models.YOLOv3", "--model.detector.backbone", "onestage.models.Darknet53"),
        *("--model.detector.backbone.width", "2", "--model.multi_scale.sizes=[32,64]"),
        *("--model.multi_scale.every_n_steps", "1"),
    ),
    "scheduled accumulation": (
        *("--trainer.callbacks", "lightning.pytorch.callbacks.GradientAccumulationScheduler"),
        *("--trainer.callbacks.scheduling", "{0: 2}"),
    ),
    "sgd": ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr=0.01", "--model.optimizer.momentum=0.9"),
}
STOPS = [  # number of the call at which SIGTERM comes
    *[("plain", STEP, count) for count in (5, 1, 8, 9, 15, 16)],
    *[("plain", VALIDATION, count) for count in (1, 2, 4)],
    *[("workers", STEP, count) for count in (3, 8)],
    *[("accumulation", STEP, count) for count in (1, 8, 12)],
    ("average", STEP, 6),
    ("scheduled accumulation", STEP, 5),
    *[("average", VALIDATION, count) for count in (1, 2)],
    ("fp16", STEP, 5),
    *[("validation inside epochs", STEP, count) for count in (3, 4, 8, 12)],
    *[("validation inside epochs", VALIDATION, count) for count in (1, 5)],
    ("accumulation over validations", STEP, 4),  # the signal is first seen in the validation that follows
    ("accumulation over validations", VALIDATION, 1),
    ("sgd", STEP, 10),
    ("yolo of many sizes", STEP, 5),
]


@pytest.mark.parametrize(
    ("variant", "method", "count"), [STOPS[0], *(pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS[1:])]
)
def test_stopped_and_resumed_run_ends_with_the_same_bits(variant, method, count, drawn, uninterrupted, tmp_path):
    whole = uninterrupted(*VARIANTS[variant])
    command = tiny_run.words(drawn, tmp_path, *VARIANTS[variant], "--resume", "auto")
    assert tiny_run.end_of_signalled(command, count, method) == 143
    assert tiny_run.onestage(*command) == 0
    resumed = tiny_run.folder_of(tmp_path)
    assert tiny_run.differences(tiny_run.final_state(whole), tiny_run.final_state(resumed)) == []
    assert rows(resumed) == [row for row in rows(whole) if row in rows(resumed)]
    assert len(rows(resumed)) >= len(rows(whole)) - 1  # the row of the step it stopped after is written by neither
    of_validations = [rows(folder, "epochs.csv") for folder in (whole, resumed)]
    for row in [*of_validations[0], *of_validations[1]]:
        del row["seconds"]
    assert of_validations[0] == of_validations[1]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "stop", "code"), [((3, 4, 5, 6, 7), 6, 6), ((3, 4, 9, 10), 5, 0)])
def test_skipped_steps_are_counted_as_without_the_stop(steps, stop, code, drawn, tmp_path, monkeypatch):
    step = DetectionModule.training_step

    def broken(self: DetectionModule, *arguments: object) -> dict[str, object]:
        outputs = step(self, *arguments)
        return {**outputs, "loss": outputs["loss"] * float("nan")} if self.global_step in steps else outputs

    monkeypatch.setattr(DetectionModule, "training_step", broken)
    assert tiny_run.onestage(*tiny_run.words(drawn, tmp_path / "whole")) == code
    command = tiny_run.words(drawn, tmp_path / "broken", "--resume", "auto")
    assert tiny_run.end_of_signalled(command, stop) == 143
    assert tiny_run.onestage(*command) == code
    folders = [tmp_path / name / "tiny" / "version_0" for name in ("whole", "broken")]
    texts = [(folder / "skipped_steps.json").read_text() for folder in folders]
    assert texts[0] == texts[1]
    if code == 0:
        assert tiny_run.differences(*map(tiny_run.final_state, folders)) == []


def rows(folder: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
