from pathlib import Path

import pytest
import torch
from faulty_training import FaultyDetector, train
from lightning.pytorch.loggers import CSVLogger

from onestage.training import callbacks
from onestage.training.callbacks import AnchorMonitor, LossBar, run_time
from onestage.types import BACKGROUND, AnchorLosses, Anchors


class RecordingLogger(CSVLogger):
    """Keep the anchor statistics in memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.recorded: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        if "anchors/positives" in metrics:
            self.recorded.append((step, metrics))


class DetectorWithAnchorLosses(FaultyDetector):
    num_calls_of_anchor_losses = 0

    def forward(self, images):
        anchors = Anchors(torch.ones(4, 4), torch.tensor([8.0, 8.0, 8.0, 16.0]), (3, 1))
        return super().forward(images)._replace(anchors=anchors)

    def anchor_losses(self, predictions, targets):
        assert not predictions.class_logits.requires_grad
        self.num_calls_of_anchor_losses += 1
        labels = torch.full((2, 4), BACKGROUND)
        labels[0, 0] = 0
        return AnchorLosses(labels, torch.ones(2, 4), torch.full((2, 4), 0.95))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_anchor_monitor_computes_at_logged_steps_only(tmp_path, accumulate):
    logger, detector = RecordingLogger(tmp_path), DetectorWithAnchorLosses()
    train(
        tmp_path, detector=detector, num_steps=6, callbacks=(AnchorMonitor(),), logger=logger, log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert [step for step, _ in logger.recorded] == [2, 5]  # the third and the sixth
    assert detector.num_calls_of_anchor_losses == 2 + 1  # and the first batch
    assert logger.recorded[0][1]["anchors/stride_8/positives"] == 1
    assert logger.recorded[0][1]["anchors/loss_of_easy_negatives"] == 7 / 8


def test_detector_without_anchor_losses_trains_with_the_monitor(tmp_path):
    logger = RecordingLogger(tmp_path)
    train(tmp_path, num_steps=2, callbacks=(AnchorMonitor(),), logger=logger, log_every_n_steps=1)
    assert logger.recorded == []


@pytest.mark.parametrize(
    ("steps", "seconds", "text"),
    [(3927, 310, "about 5 min for 3,927 steps"), (120_000, 36_000, "about 10.0 h for 120,000 steps")],
)
def test_run_time_is_in_minutes_or_hours(steps, seconds, text):
    assert run_time(steps, seconds) == text


@pytest.mark.parametrize(("max_steps", "printed"), [(30, 1), (-1, 0)])
def test_run_time_is_printed_once_unless_the_run_has_no_end(tmp_path, monkeypatch, max_steps, printed):
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))  # 100 s per reading
    monkeypatch.setattr(callbacks, "TIMED_BATCHES", (2, 4))
    lines = []

    class Bar(LossBar):
        def print(self, *values, **_):
            lines.extend(values)

    train(
        tmp_path, num_steps=max_steps, max_epochs=-1, callbacks=(Bar(),), enable_progress_bar=True,
        limit_train_batches=5 if max_steps > 0 else None, max_time=None if max_steps > 0 else {"seconds": 1},
    )  # fmt: skip
    # 100 s for 2 steps, 26 steps left: 1300 s
    assert lines == ["training: about 22 min for 26 steps"] * printed
