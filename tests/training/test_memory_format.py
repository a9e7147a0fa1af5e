"""Memory format `auto`: decided by a rule on a GPU, by timed steps on a CPU, and remembered."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny_training import CrowdedData, TinyDetector, TinyDetectorWithBatchNorm, quiet_trainer

from onestage.training import measurement
from onestage.training.measurement import CACHE_FILE, blank_batch, resolve_memory_format, time_formats
from onestage.training.module import usual_memory_format
from onestage.training.trainer import DetectionTrainer

DATA = CrowdedData(num_images=8, batch_size=4)
BATCH = blank_batch(DATA, 2, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onestage" / CACHE_FILE


@pytest.fixture
def trainer(tmp_path: Path) -> DetectionTrainer:
    return quiet_trainer(DetectionTrainer, tmp_path, precision="32-true")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], Mock]:
    """Set the seconds of a step with channels_last and without; return what is called instead of a measurement."""

    def install(with_it: float, without: float) -> Mock:
        monkeypatch.setattr(measurement, "time_formats", Mock(return_value={True: with_it, False: without}))
        return measurement.time_formats

    return install


def test_rule_follows_device_and_precision():
    cases = [("cuda", "32-true"), ("cpu", "bf16-mixed"), ("cpu", "32-true"), ("mps", "32-true")]
    assert [usual_memory_format(*case) for case in cases] == [True, True, False, False]


@pytest.mark.parametrize(("device", "world_size", "answer"), [("cuda", 1, True), ("mps", 1, False), ("cpu", 2, False)])
def test_gpu_and_several_processes_follow_the_rule_untimed(timed, device, world_size, answer):
    measured = timed(1.0, 2.0)
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer = SimpleNamespace(strategy=strategy, precision="32-true", world_size=world_size)
    assert resolve_memory_format(TinyDetector(2), DATA, trainer) is answer
    measured.assert_not_called()


@pytest.mark.parametrize(("seconds", "expected"), [(0.96, True), (0.98, False), (1.0, False), (1.2, False)])
def test_channels_last_must_gain_more_than_3_percent(timed, trainer, seconds, expected):
    timed(seconds, 1.0)
    assert resolve_memory_format(TinyDetector(2), DATA, trainer) is expected


def test_answer_is_remembered_for_its_detector_batch_and_precision(timed, trainer, cache, caplog):
    measured = timed(1.0, 2.0)
    with caplog.at_level("INFO"):
        assert resolve_memory_format(TinyDetector(2), DATA, trainer)
        timed(2.0, 1.0)
        assert resolve_memory_format(TinyDetector(2), DATA, trainer)
    assert [call.args[1][0].shape for call in measured.call_args_list] == [(4, 3, 64, 64)]
    first, second = caplog.messages
    assert first.startswith("channels_last: true (a step of 4 x 64 x 64 px takes 1 s with it, 2 s without)")
    assert second.startswith(f"channels_last: true (remembered in {cache})")
    assert not resolve_memory_format(TinyDetectorWithBatchNorm(2), DATA, trainer)
    assert not resolve_memory_format(TinyDetector(2), CrowdedData(num_images=8, batch_size=2), trainer)
    assert sorted(json.loads(cache.read_text()).values()) == [False, False, True]


@pytest.mark.parametrize("content", ["[", "[1]", None])
def test_unusable_cache_does_not_stop_a_run(timed, trainer, cache, content):
    timed(1.0, 2.0)
    if content is None:
        cache.parent.write_text("a file where the folder should be")
    else:
        cache.parent.mkdir()
        cache.write_text(content)
    assert resolve_memory_format(TinyDetector(2), DATA, trainer)


def test_timing_changes_neither_detector_nor_random_states(trainer):
    class Drawing(TinyDetectorWithBatchNorm):
        def forward(self, images: torch.Tensor) -> object:
            random.random(), np.random.rand(), torch.rand(1)
            return super().forward(images)

    def state() -> list[torch.Tensor]:
        numbers = (float(np.random.get_state()[1].sum()), float(hash(random.getstate())))
        return [torch.get_rng_state(), torch.tensor(numbers), *detector.state_dict().values()]

    detector = Drawing(2).eval()
    before = [value.clone() for value in state()]
    seconds = time_formats(detector, BATCH, trainer)
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    assert (detector.training, [p for p in detector.parameters() if p.grad is not None]) == (False, [])
    assert min(seconds.values()) > 0
