"""The batch size finder: its search on made-up memory, and a real one that leaves no trace but the number."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import TinyData, TinyDetectorWithBatchNorm, quiet_trainer

from onestage.errors import ConfigError
from onestage.training import batch_size
from onestage.training.batch_size import GIB, AutoBatch, free_bytes, largest_batch, step_bytes
from onestage.training.module import DetectionModule
from onestage.training.optimization import WarmupSchedule
from onestage.training.trainer import DetectionTrainer


def memory(constant, per_image, fails_at=10**9):
    calls = []

    def peak_bytes(images):
        calls.append(images)
        return None if images >= fails_at else constant + per_image * images

    return peak_bytes, calls


def test_the_line_through_two_steps_leads_to_the_limit():
    peak_bytes, calls = memory(constant=100, per_image=10)
    # (1000 - 100) / 10 = 90 images fit; of eights 88
    assert largest_batch(peak_bytes, limit=1000, max_batch_size=10_000) == 88
    assert calls == [1, 2, 4, 8, 16, 32, 64, 88]  # 128 is beyond the line and is not tried


def test_memory_that_bends_is_backed_off_from():
    def peak_bytes(images):
        return 100 + 10 * images + (200 if images > 70 else 0)  # another algorithm, with a workspace, for large batches

    assert largest_batch(peak_bytes, limit=1000, max_batch_size=10_000) == 64  # 88 and 72 fail


def test_out_of_memory_far_below_the_line_ends_the_ascent():
    peak_bytes, calls = memory(constant=0, per_image=1, fails_at=21)
    assert largest_batch(peak_bytes, limit=10**6, max_batch_size=10_000) == 16
    assert calls == [1, 2, 4, 8, 16, 32, 24]


def test_never_more_than_there_are_images():
    for most in (1, 2, 3, 13):
        assert largest_batch(memory(0, 1)[0], limit=10**6, max_batch_size=most) == most


@pytest.mark.parametrize(
    ("limit", "expected"), [(110, 1), (119, 1), (120, 2), (139, 3), (140, 4), (170, 7), (109, None)]
)
def test_small_memories_hold_few_images_or_none(limit, expected):
    assert largest_batch(memory(constant=100, per_image=10)[0], limit=limit, max_batch_size=100) == expected


def test_every_answer_fits_and_the_next_eight_would_not():
    for per_image in (3, 7, 50, 111):
        found = largest_batch(memory(1000, per_image)[0], limit=20_000, max_batch_size=10_000)
        assert 1000 + per_image * found <= 20_000 < 1000 + per_image * (found + 8)


class CountedData(TinyData):
    """With annotations, of which the finder asks how many and how crowded."""

    def annotations(self, stage):
        class Annotations:
            box_offsets = np.array([0, 1, 21, *range(22, 22 + self.num_images - 2)])  # 20 objects in one image

            def __len__(_):  # noqa: N805 # self is the data module
                return self.num_images

        return Annotations()


def module_with(optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    schedule = WarmupSchedule(kind="constant", warmup_steps=0)
    return DetectionModule(
        TinyDetectorWithBatchNorm(num_classes=2), lambda groups: optimizer(groups, lr=0.01), schedule
    )


def fit(folder, data, *callbacks):
    module = module_with(torch.optim.AdamW)
    trainer = quiet_trainer(DetectionTrainer, folder, callbacks=list(callbacks), max_epochs=1)
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_the_run_is_the_one_that_the_found_number_gives(tmp_path):
    found = []
    data = CountedData(num_images=24, batch_size=1)
    torch.manual_seed(7)
    auto, trainer = fit(tmp_path, data, AutoBatch(64 * GIB, False, found.append))
    assert found == [24]  # all there are
    assert data.batch_size == 24
    assert trainer.global_step == 1
    fixed, _ = fit(tmp_path, CountedData(num_images=24, batch_size=24))
    assert all(torch.equal(auto.state_dict()[name], value) for name, value in fixed.state_dict().items())
    assert auto.training


def test_the_objects_of_the_probe_are_those_of_the_most_crowded_image(tmp_path, monkeypatch):
    shapes = []

    class Seen(TinyDetectorWithBatchNorm):
        def loss(self, predictions, targets):
            shapes.append(tuple(targets.boxes.shape))
            return super().loss(predictions, targets)

    module = DetectionModule(Seen(num_classes=2), schedule=WarmupSchedule(kind="constant", warmup_steps=0))
    trainer = quiet_trainer(DetectionTrainer, tmp_path, callbacks=[AutoBatch(64 * GIB, False, print)], max_steps=1)
    trainer.fit(module, datamodule=CountedData(num_images=4, batch_size=1))
    assert shapes[:3] == [(1, 32, 4), (2, 32, 4), (4, 32, 4)]  # 20 objects, padded as batches are


def test_too_little_memory_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"one image needs more than 0\.01 GiB on cpu"):
        fit(tmp_path, CountedData(num_images=24, batch_size=1), AutoBatch(GIB // 100, False, print))


def test_an_average_and_several_processes_leave_less_room(tmp_path):
    module = module_with()
    weights = sum(parameter.numel() * 4 for parameter in module.detector.parameters())

    class Trainer:
        world_size = 2

    assert AutoBatch(None, True, print)._extra_bytes(Trainer, module) == 2 * weights
    Trainer.world_size = 1
    assert AutoBatch(None, True, print)._extra_bytes(Trainer, module) == weights
    assert AutoBatch(None, False, print)._extra_bytes(Trainer, module) == 0


def test_the_state_of_the_optimizer_is_part_of_the_step(tmp_path):
    module, states = module_with(torch.optim.AdamW), []
    make = module.make_optimizer

    def made():
        states.append(make())
        return states[-1]

    module.make_optimizer = made
    trainer = quiet_trainer(DetectionTrainer, tmp_path, callbacks=[AutoBatch(64 * GIB, False, print)], max_steps=1)
    trainer.fit(module, datamodule=CountedData(num_images=2, batch_size=1))
    probe = states[0]
    assert len(probe.state) == len(list(module.detector.parameters()))  # both moments of every parameter were made


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_an_answer_and_another_error_is_not(tmp_path, monkeypatch, error):
    module = module_with()
    trainer = quiet_trainer(DetectionTrainer, tmp_path)
    monkeypatch.setattr(batch_size, "_crowded_batch", lambda *_: (_ for _ in ()).throw(error))
    assert step_bytes(trainer, module, 2) is None
    monkeypatch.setattr(batch_size, "_crowded_batch", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        step_bytes(trainer, module, 2)


def test_a_larger_batch_is_measured_as_more_memory(tmp_path):
    module, trainer = fit(tmp_path, CountedData(num_images=8, batch_size=8))
    # What a process has freed the C library keeps for it: 400 MB here, which must not pass for memory of a step.
    blocks = [torch.ones(15_000) for _ in range(6_700)]
    last = blocks[-1]
    del blocks
    small, large = step_bytes(trainer, module, 8), step_bytes(trainer, module, 512)
    assert last.sum() == len(last)
    # The 504 images more are, as floats alone, 504 x 3 x 64 x 64 x 4 bytes = 24.8 MB.
    assert large - small > 24e6
    assert small < free_bytes(torch.device("cpu"))


def test_processes_of_one_cpu_share_what_is_free(monkeypatch):
    kilobytes = {"MemAvailable": 12 * 2**20, "VmRSS": 2**20}  # 12 GiB free, 1 in use
    monkeypatch.setattr(batch_size, "_kilobytes", lambda _, key: kilobytes[key])
    monkeypatch.setattr(batch_size, "CGROUP", Path("/nowhere"))
    cpu = torch.device("cpu")
    assert [free_bytes(cpu, number) / GIB for number in (1, 2, 4)] == [13, 7, 4]


@pytest.mark.parametrize(("limit", "gib"), [(None, 0.9 * 3), (2 * GIB, 0.9 * 2)])
def test_the_finder_takes_its_share_of_the_machine_or_what_it_was_given(monkeypatch, limit, gib):
    limits = []
    monkeypatch.setattr(batch_size, "free_bytes", lambda _, num_processes: 6 * GIB // num_processes)
    monkeypatch.setattr(batch_size, "largest_batch", lambda _, limit, most: limits.append(limit) or 1)
    module = module_with()
    strategy = SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda _: None)
    data = CountedData(num_images=4, batch_size=1)
    module._trainer = SimpleNamespace(strategy=strategy, world_size=4, num_devices=2, datamodule=data)
    AutoBatch(limit, False, print).setup(module.trainer, module, "fit")
    weights = sum(parameter.nbytes for parameter in module.detector.parameters())
    assert limits == [int(gib * GIB) - weights]  # of DDP's buckets


def test_a_device_without_a_meter_is_refused():
    with pytest.raises(ConfigError, match=r"auto_batch: false and data\.batch_size"):
        free_bytes(torch.device("mps"))
