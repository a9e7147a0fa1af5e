"""Lightning's own callbacks, set up as its manual shows and wrongly: each works or ends in one message."""

import pytest
from command_line import run

CALLBACKS = "lightning.pytorch.callbacks."
RIGHT: dict[str, tuple[str, ...]] = {
    "EarlyStopping": ("monitor=val/mAP", "mode=max"),
    "LearningRateFinder": ("num_training_steps=3",),
    "BackboneFinetuning": (),
    "Timer": ("duration=00:12:00:00",),
    "StochasticWeightAveraging": ("swa_lrs=0.01",),
    "GradientAccumulationScheduler": ("scheduling={0: 2}",),
    "BatchSizeFinder": ("max_trials=1",),
    "ModelPruning": ("pruning_fn=l1_unstructured", "amount=0.2"),
    "EMAWeightAveraging": (),
    "WeightAveraging": (),
    "DeviceStatsMonitor": ("cpu_stats=false",),
    "LearningRateMonitor": ("logging_interval=step",),
    "ModelCheckpoint": ("monitor=val/mAP", "mode=max"),
    "ModelSummary": ("max_depth=2",),
    "OnExceptionCheckpoint": ("dirpath=none",),
    "SpikeDetection": (),
    "LambdaCallback": (),
}
WRONG: list[tuple[str, tuple[str, ...], str]] = [
    ("EarlyStopping", ("monitor=val/nothing",), "trainer.callbacks: EarlyStopping cannot work in this run: "),
    ("LearningRateFinder", ("mode=what",), "cannot be built: `mode` should be either of"),
    ("StochasticWeightAveraging", ("swa_lrs=-1",), "cannot be built: The `swa_lrs` should"),
    ("GradientAccumulationScheduler", ("scheduling={-1: 2}",), "cannot be built: Epoch should be"),
    ("TQDMProgressBar", (), "`enable_progress_bar=False` but found `TQDMProgressBar`"),
    ("ModelCheckpoint", ("monitor=x",), "`ModelCheckpoint(monitor='x')` could not find the monitored key"),
]


def fit(fast_options: list[str], tmp_path, kind: str, options: tuple[str, ...]) -> int:
    short = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--drawn_images", "0"]
    words = [f"--trainer.callbacks+={CALLBACKS}{kind}", *(f"--trainer.callbacks.{option}" for option in options)]
    return run("fit", *fast_options, *short, *words, "--runs_dir", str(tmp_path / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_callback_set_up_as_in_the_manual_works(kind, fast_options, tmp_path):
    assert fit(fast_options, tmp_path, kind, RIGHT[kind]) == 0


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [case if "cannot be built" in case[2] else pytest.param(*case, marks=pytest.mark.slow) for case in WRONG],
)
def test_callback_set_up_wrongly_ends_in_one_message(kind, options, reason, fast_options, tmp_path, capsys):
    assert fit(fast_options, tmp_path, kind, options) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert reason in message
    assert len(message.splitlines()) <= 3


def test_validation_interval_longer_than_the_epoch_is_one_message(fast_options, tmp_path, capsys):
    assert run("fit", *fast_options, "--trainer.val_check_interval", "1000", "--runs_dir", str(tmp_path)) == 2
    assert "error: trainer.val_check_interval: `val_check_interval` (1000) must be less" in capsys.readouterr().err
