from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tiny_training import CONSTANT, CrowdedData, TinyDetectorWithBatchNorm, quiet_trainer

from onestage.errors import ConfigError
from onestage.training import measurement
from onestage.training.measurement import GIB, AutoBatch, free_bytes, largest_batch, step_bytes
from onestage.training.module import DetectionModule
from onestage.training.trainer import DetectionTrainer


def memory(constant, per_image):
    calls = []

    def peak_bytes(images):
        calls.append(images)
        return constant + per_image * images

    return peak_bytes, calls


def test_search_doubles_up_to_the_limit():
    peak_bytes, calls = memory(constant=100, per_image=10)
    # (1000 - 100) / 10 = 90 images fit; as a multiple of eight 88. 128 is beyond the line and is not tried.
    assert largest_batch(peak_bytes, limit=1000, max_batch_size=10_000) == 88
    assert calls == [1, 2, 4, 8, 16, 32, 64, 88]


@pytest.mark.parametrize(
    ("peak_bytes", "expected"),
    [
        (lambda images: images if images < 21 else None, 16),  # out of memory far below the line ends the ascent
        (lambda images: 100 + 10 * images + 200 * (images > 70), 64),  # a workspace for large batches: 88 and 72 fail
    ],
)
def test_search_steps_back_from_failures_and_nonlinear_memory(peak_bytes, expected):
    assert largest_batch(peak_bytes, limit=1000, max_batch_size=10_000) == expected


@pytest.mark.parametrize(
    ("limit", "most", "expected"),
    [
        *[(10**6, most, most) for most in (1, 2, 3, 13)],
        *[(limit, 100, n) for limit, n in ((109, 0), (110, 1), (119, 1), (120, 2), (139, 3), (140, 4), (170, 7))],
    ],
)
def test_result_exceeds_neither_images_nor_memory(limit, most, expected):
    assert largest_batch(memory(constant=100, per_image=10)[0], limit, most) == expected


class RecordingDetector(TinyDetectorWithBatchNorm):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shapes = []

    def loss(self, predictions, targets):
        self.shapes.append(tuple(targets.boxes.shape))
        return super().loss(predictions, targets)


def module_with(optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    return DetectionModule(RecordingDetector(num_classes=2), lambda groups: optimizer(groups, lr=0.01), CONSTANT)


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    monkeypatch.setattr(measurement.gc, "collect", lambda: 0)  # seconds among the objects of other tests


def fit(folder, data, *callbacks, **settings):
    module = module_with(torch.optim.AdamW)
    trainer = quiet_trainer(DetectionTrainer, folder, callbacks=list(callbacks), **settings)
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_measured_step_has_crowded_images_and_optimizer_state(tmp_path, monkeypatch):
    states, make = [], DetectionModule.make_optimizer
    monkeypatch.setattr(DetectionModule, "make_optimizer", lambda module: states.append(make(module)) or states[-1])
    data = CrowdedData(num_images=2, batch_size=1)
    module, _ = fit(tmp_path, data, AutoBatch(64 * GIB, False, print), max_steps=1)
    assert module.detector.shapes[:2] == [(1, 32, 4), (2, 32, 4)]  # 20 objects, padded like batches
    assert len(states[0].state) == len(list(module.detector.parameters()))  # both moments of every parameter


def test_too_little_memory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"one image needs more than 0\.01 GiB on cpu"):
        fit(tmp_path, CrowdedData(num_images=24, batch_size=1), AutoBatch(GIB // 100, False, print), max_epochs=1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_a_result_and_other_errors_are_not(tmp_path, monkeypatch, error):
    module = module_with()
    trainer = quiet_trainer(DetectionTrainer, tmp_path)
    module.trainer = SimpleNamespace(datamodule=CrowdedData(num_images=2, batch_size=1))
    monkeypatch.setattr(measurement, "blank_batch", Mock(side_effect=error))
    assert step_bytes(trainer, module, 2) is None
    monkeypatch.setattr(measurement, "blank_batch", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        step_bytes(trainer, module, 2)


@pytest.mark.slow
def test_larger_batch_needs_more_measured_memory(tmp_path):
    module, trainer = fit(tmp_path, CrowdedData(num_images=8, batch_size=8), max_epochs=1)
    # The C library keeps freed memory of a process: 400 MB here, which must not hide the memory of a step.
    blocks = [torch.ones(15_000) for _ in range(6_700)]
    last = blocks[-1]
    del blocks
    small, large = step_bytes(trainer, module, 8), step_bytes(trainer, module, 512)
    assert last.sum() == len(last)
    assert large - small > 24e6  # 504 images as floats: 504 x 3 x 64 x 64 x 4 bytes = 24.8 MB
    assert small < free_bytes(torch.device("cpu"))


def test_processes_of_one_cpu_share_the_free_memory(monkeypatch):
    gib = {"MemAvailable": 12 * GIB, "VmRSS": GIB}
    monkeypatch.setattr(measurement, "_status_bytes", lambda _, key: gib[key])
    monkeypatch.setattr(measurement, "CGROUP", Path("/nowhere"))
    cpu = torch.device("cpu")
    assert [free_bytes(cpu, number) / GIB for number in (1, 2, 4)] == [13, 7, 4]
    with pytest.raises(ConfigError, match=r"auto_batch: false and data\.batch_size"):
        free_bytes(torch.device("mps"))
