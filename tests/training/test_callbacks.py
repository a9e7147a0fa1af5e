from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from faulty_training import FaultyDetector, train
from lightning.pytorch.loggers import TensorBoardLogger

from onestage.training import callbacks
from onestage.training.callbacks import AnchorMonitor, LossBar
from onestage.types import BACKGROUND, AnchorLosses, Anchors


class RecordingLogger(TensorBoardLogger):
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
        assert not torch.is_grad_enabled()
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
    ("max_steps", "seconds", "printed"),
    # 2 steps take `seconds`, 26 are left: 1300 s, 13000 s
    [(30, 100, "about 22 min for 26 steps"), (30, 1000, "about 3.6 h for 26 steps"), (-1, 100, "")],
)
def test_run_time_is_printed_once_unless_the_run_has_no_end(tmp_path, monkeypatch, max_steps, seconds, printed):
    clock = iter(range(0, 10**7, seconds))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(callbacks, "TIMED_BATCHES", (2, 4))
    lines = []

    class Bar(LossBar):
        def print(self, *values, **_):
            lines.extend(values)

    train(
        tmp_path, num_steps=max_steps, max_epochs=-1, callbacks=(Bar(),), enable_progress_bar=True,
        limit_train_batches=5 if max_steps > 0 else None, max_time=None if max_steps > 0 else {"seconds": 1},
    )  # fmt: skip
    assert lines == ([f"training: {printed}"] if printed else [])


def test_bar_has_short_names_and_fits_80_columns():
    names = ("train/loss", "train/classification_loss", "train/box_loss", "val/mAP", "val/AP50", "v_num")
    shown = SimpleNamespace(progress_bar_metrics=dict(zip(names, (10.5, 5.25, 0.126, 0.58, 1.0, 3.0), strict=True)))
    metrics = LossBar().get_metrics(shown, None)
    assert metrics == {"loss": "10.50", "cls": "5.25", "box": "0.13", "mAP": "58.0", "AP50": "100.0"}
    postfix = ", " + ", ".join(f"{name}={value}" for name, value in metrics.items())
    line = LossBar.BAR_FORMAT.format(desc="Epoch 11:", n_fmt="188", total_fmt="188", remaining="00:32", postfix=postfix)
    assert len(line) <= 80


def test_without_a_terminal_the_bar_is_off_and_each_validation_prints_one_line(capsys, monkeypatch):
    metrics = {"val/loss": torch.tensor(0.5234), "val/mAP": torch.tensor(0.5821), "val/AP50": torch.tensor(0.879)}
    moment = {"is_global_zero": True, "sanity_checking": False, "current_epoch": 4, "global_step": 940}
    trainer = SimpleNamespace(**moment, state=SimpleNamespace(fn="fit"), callback_metrics=metrics)
    bar = LossBar()
    bar.setup(trainer, None, "fit")
    assert not bar.is_enabled
    bar.on_validation_start(trainer, None)
    bar.on_validation_end(trainer, None)
    assert capsys.readouterr().out == "epoch 5, step 940: loss 0.523  mAP 58.2  AP50 87.9\n"
    monkeypatch.setattr("sys.stdout", Mock(write=Mock(side_effect=BrokenPipeError)))  # `| tee` has ended
    bar.on_validation_end(trainer, None)
