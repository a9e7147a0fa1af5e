import math
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny_training import CONSTANT, TinyData, TinyDetector, TinyDetectorWithBatchNorm, quiet_trainer, tiny_batch
from torch import nn
from torch.utils.data import DataLoader

from onestage.errors import ConfigError
from onestage.training.module import DetectionModule
from onestage.training.optimization import (
    WarmupSchedule,
    clip_gradients,
    decayed_parameters,
    hyperparameters,
    parameter_groups,
    scale_learning_rate,
    total_steps,
)
from onestage.training.trainer import DetectionTrainer


def test_schedules_have_hand_computed_factors():
    schedule = WarmupSchedule(kind="constant", warmup_steps=10, warmup_start=0.1)
    # 0.1 + 0.9 * 5 / 10 = 0.55
    assert [schedule.factor(step, 100) for step in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    schedule = WarmupSchedule(kind="step", warmup_steps=0, milestones=(2 / 3, 5 / 6), decay=0.1)
    steps = (79_999, 80_000, 99_999, 100_000)  # the paper's 80k and 100k of 120k iterations
    assert [schedule.factor(step, 120_000) for step in steps] == pytest.approx([1, 0.1, 0.1, 0.01])
    schedule = WarmupSchedule(kind="cosine", warmup_steps=10, final=0.0)
    expected = [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0]
    assert [schedule.factor(step, 110) for step in (10, 35, 60, 110)] == pytest.approx(expected)
    assert WarmupSchedule(kind="cosine", warmup_steps=0, final=0.2).factor(200, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_steps", -1), ("warmup_start", 0.0), ("decay", 1.5), ("final", -0.1), ("milestones", (0.9, 0.3))],
)
def test_schedule_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"model\.schedule\.{name} must be .*, got "):
        WarmupSchedule(**{name: value})


@pytest.mark.parametrize(("scheduling", "steps"), [({0: 1, 2: 4}, 10), ({0: 4, 2: 1}, 10), ({0: 2}, 8)])
def test_schedule_spans_the_steps_of_a_changing_accumulation(tmp_path, scheduling, steps):
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = DetectionModule(
        TinyDetector(2), partial(torch.optim.SGD, lr=1.0), schedule=WarmupSchedule("cosine", warmup_steps=0)
    )
    callbacks = [GradientAccumulationScheduler(scheduling), Rates()]
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=4, callbacks=callbacks)
    trainer.fit(module, datamodule=TinyData(num_images=4, batch_size=1))  # 4 batches in each epoch
    assert total_steps(trainer) == trainer.global_step == steps
    endless = {"estimated_stepping_batches": -1, "num_training_batches": math.inf, "max_epochs": 4}  # no length
    assert total_steps(SimpleNamespace(**endless, callbacks=callbacks)) == math.inf
    expected = {0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)}
    assert sorted(set(rates)) == pytest.approx(sorted(expected))


def test_biases_and_batch_norm_have_no_weight_decay():
    detector = TinyDetectorWithBatchNorm(num_classes=2)
    decayed = decayed_parameters(detector)
    names = [name for name, _ in detector.named_parameters()]
    assert decayed == {name for name in names if name.endswith("weight") and "bn" not in name and "norm" not in name}
    groups = parameter_groups(detector, decayed)
    assert groups[1]["weight_decay"] == 0
    assert "weight_decay" not in groups[0]
    assert sum(len(group["params"]) for group in groups) == len(names)
    next(detector.parameters()).requires_grad_(False)  # frozen: in no group
    assert sum(len(group["params"]) for group in parameter_groups(detector, decayed)) == len(names) - 1


def test_learning_rate_scales_with_images_per_step(monkeypatch):
    messages = []
    monkeypatch.setattr("onestage.training.optimization.rank_zero_info", messages.append)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.001)
    trainer = SimpleNamespace(world_size=4, accumulate_grad_batches=2)
    scale_learning_rate(optimizer, trainer, batch_size=16, reference=32)  # 4 x 16 x 2 = 128 images, 4 times 32
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.004, 0.4])
    assert messages == [
        "learning rate: 0.001 x 128 / 32 = 0.004 "
        "(processes 4 x batch_size 16 x accumulate_grad_batches 2; model.reference_batch_size: 32)"
    ]


def test_schedule_starts_from_scaled_learning_rate(tmp_path):
    schedule = WarmupSchedule(kind="constant", warmup_steps=2, warmup_start=0.5)
    module = DetectionModule(TinyDetector(2), partial(torch.optim.SGD, lr=0.01), schedule, reference_batch_size=1)
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_steps=1)
    trainer.fit(module, datamodule=TinyData(num_images=6, batch_size=3))
    (group, _) = trainer.optimizers[0].param_groups
    assert group["initial_lr"] == pytest.approx(0.03)
    assert group["lr"] == pytest.approx(0.03 * 0.75)  # step 1 of a warm-up from 0.5 to 1 in 2 steps


class OneCycle(DetectionModule):
    """A user's module whose scheduler also drives the momentum."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize(("kind", "rate"), [(DetectionModule, 0.02), (DetectionModule, 0.05), (OneCycle, 0.02)])
def test_resumed_run_has_hyperparameters_of_its_configuration(tmp_path, monkeypatch, kind, rate):
    def module(rate):
        optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=5 * rate)
        return kind(TinyDetector(num_classes=2), optimizer, WarmupSchedule(kind="constant", warmup_steps=7))

    messages = []
    monkeypatch.setattr("onestage.training.optimization.rank_zero_info", messages.append)
    stopped, resumed, seen = module(0.02), module(rate), []
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=1)
    trainer.fit(stopped, datamodule=TinyData(num_images=6, batch_size=2))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed.on_train_batch_start = lambda *_: seen.append(hyperparameters(resumed.trainer.optimizers[0]))
    other = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=2)
    other.fit(resumed, datamodule=TinyData(num_images=6, batch_size=2), ckpt_path=tmp_path / "stopped.ckpt")
    before = hyperparameters(stopped.trainer.optimizers[0])
    if rate == 0.02:
        assert (seen[0], messages) == (before, [])
    else:  # step 3 of the same warm-up, from the new rate
        assert seen[0][0]["lr"] == pytest.approx(before[0]["lr"] * rate / 0.02)
        assert [group["weight_decay"] for group in seen[0]] == [0.25, 0.0]
        assert resumed.lr_schedulers().base_lrs == [0.05, 0.05]
        assert "takes these values of the configuration: lr 0.02 -> 0.05, lr at step 3 " in messages[0]
        assert messages[0].endswith(", weight_decay 0.1 -> 0.25")
    assert before[0]["lr"] != 0.02


@pytest.mark.parametrize(("algorithm", "norm"), [("norm", 0.5), (None, 0.5), ("value", 0.5**0.5)])
def test_clipped_gradient_has_hand_computed_norm(algorithm, norm):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])  # norm 5; clipped by value: [0.5, -0.5]
    clip_gradients(SimpleNamespace(strategy=None), torch.optim.SGD([parameter], lr=1.0), 0.5, algorithm)
    assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-5)


def test_accumulated_batches_with_equal_positives_equal_one_large_batch(tmp_path):
    # Images 0, 2 and 4 show the same square at places a multiple of the stride of 8 px apart.
    assert num_positives([0]) == num_positives([2]) == num_positives([4]) > 0
    one = trained_weights(tmp_path, [[0, 2, 4, 2], [2, 0, 4, 4]], accumulated=1)
    parts = trained_weights(tmp_path, [[0, 2], [4, 2], [2, 0], [4, 4]], accumulated=2)
    torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-6)


def trained_weights(folder, batches, accumulated):
    torch.manual_seed(0)
    module = DetectionModule(TinyDetector(2), partial(torch.optim.SGD, lr=0.01), CONSTANT)
    trainer = quiet_trainer(DetectionTrainer, folder, max_epochs=1, accumulate_grad_batches=accumulated)
    trainer.fit(module, train_dataloaders=DataLoader([tiny_batch(indices) for indices in batches], batch_size=None))
    assert trainer.global_step == len(batches) // accumulated
    return module.state_dict()


def num_positives(indices):
    detector, batch = TinyDetector(num_classes=2), tiny_batch(indices)
    return int(detector.loss(detector(batch.images), batch.targets).num_positives)
