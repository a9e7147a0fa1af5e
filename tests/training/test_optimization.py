"""What an optimizer is given, the learning rate of a larger batch, and what accumulated batches add up to."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TinyData, TinyDetector, TinyDetectorWithBatchNorm, quiet_trainer, tiny_batch
from torch import nn
from torch.utils.data import DataLoader

from onestage.errors import ConfigError
from onestage.training.module import DetectionModule
from onestage.training.optimization import (
    WarmupSchedule,
    decayed_parameters,
    hyperparameters,
    parameter_groups,
    scale_learning_rate,
)
from onestage.training.trainer import DetectionTrainer


def test_biases_and_batch_norm_do_not_decay() -> None:
    detector = TinyDetectorWithBatchNorm(num_classes=2)
    decayed = decayed_parameters(detector)
    assert "backbone.to_conv4.conv1_1.weight" in decayed
    assert not [name for name in decayed if "bn" in name or "bias" in name or "conv4_norm" in name]
    groups = parameter_groups(detector, decayed)
    assert groups[1]["weight_decay"] == 0
    assert "weight_decay" not in groups[0]
    assert sum(len(group["params"]) for group in groups) == len(list(detector.parameters()))


def test_pieces_of_parameters_decay_as_the_whole_ones_would() -> None:
    """FSDP wraps modules and flattens what is left of each parameter: neither may change who decays."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed = decayed_parameters(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.flatten()
    net[0] = Wrapper(net[0])
    groups = parameter_groups(net, decayed)
    assert [[parameter.numel() for parameter in group["params"]] for group in groups] == [[4 * 3 * 3 * 3], [4, 4, 4]]


def test_frozen_parameters_are_left_out() -> None:
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    groups = parameter_groups(net, decayed_parameters(net))
    assert [len(group["params"]) for group in groups] == [1, 0]


def test_the_learning_rate_grows_with_the_images_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("onestage.training.optimization.rank_zero_info", said.append)
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}], lr=0.001
    )
    trainer = SimpleNamespace(world_size=4, accumulate_grad_batches=2)
    scale_learning_rate(optimizer, trainer, batch_size=16, reference=32)  # 4 x 16 x 2 = 128 images, 4 times 32
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.004, 0.4])
    assert said == [
        "learning rate: 0.001 x 128 / 32 = 0.004 "
        "(processes 4 x batch_size 16 x accumulate_grad_batches 2; model.reference_batch_size: 32)"
    ]


@pytest.mark.parametrize("reference", [0, -32])
def test_a_reference_of_no_images_is_refused(reference: int) -> None:
    with pytest.raises(ConfigError, match=r"reference_batch_size is .*; it must be 1 or more images, or null"):
        DetectionModule(TinyDetector(num_classes=2), reference_batch_size=reference)


def module_with(schedule: WarmupSchedule | None = None, **settings: object) -> DetectionModule:
    torch.manual_seed(0)
    schedule = schedule or WarmupSchedule(kind="constant", warmup_steps=0)
    return DetectionModule(
        TinyDetector(num_classes=2), lambda groups: torch.optim.SGD(groups, lr=0.01), schedule, **settings
    )


def test_the_schedule_starts_from_the_scaled_learning_rate(tmp_path) -> None:
    module = module_with(WarmupSchedule(kind="constant", warmup_steps=2, warmup_start=0.5), reference_batch_size=1)
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_steps=1)
    trainer.fit(module, datamodule=TinyData(num_images=6, batch_size=3))
    (group, _) = trainer.optimizers[0].param_groups
    assert group["initial_lr"] == pytest.approx(0.03)
    assert group["lr"] == pytest.approx(0.03 * 0.75)  # step 1 of a warm-up from 0.5 to 1 in 2 steps


@pytest.mark.parametrize(("warmup_steps", "warned"), [(3, True), (2, False)])
def test_a_warmup_of_most_of_the_run_is_said(tmp_path, warmup_steps: int, warned: bool) -> None:
    module = module_with(WarmupSchedule(kind="step", warmup_steps=warmup_steps))
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=2)  # 2 x 4 images / 2 = 4 steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=TinyData(num_images=4, batch_size=2))
    said = [str(one.message) for one in caught if "warmup_steps is 3, but the run has 4 steps" in str(one.message)]
    assert bool(said) is warned


class OneCycle(DetectionModule):
    """A user's own, whose schedule drives the momentum too."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def groups_of(module: DetectionModule) -> list[dict[str, object]]:
    (optimizer,) = module.trainer.optimizers
    return hyperparameters(optimizer)


@pytest.mark.parametrize("kind", [DetectionModule, OneCycle])
def test_a_resumed_run_of_the_same_configuration_has_the_hyperparameters_of_the_step_it_stopped_at(
    tmp_path, kind: type[DetectionModule]
) -> None:
    def module() -> DetectionModule:
        optimizer = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.1)
        return kind(TinyDetector(num_classes=2), optimizer, WarmupSchedule(kind="constant", warmup_steps=7))

    stopped, resumed, seen = module(), module(), []
    trainer = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=1)
    trainer.fit(stopped, datamodule=TinyData(num_images=6, batch_size=2))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed.on_train_batch_start = lambda *_: seen.append(groups_of(resumed))
    other = quiet_trainer(DetectionTrainer, tmp_path, max_epochs=2)
    other.fit(resumed, datamodule=TinyData(num_images=6, batch_size=2), ckpt_path=tmp_path / "stopped.ckpt")
    assert seen[0] == groups_of(stopped)
    assert seen[0][0]["lr"] != 0.02


class Micro(TinyData):
    """Batches of images that are given one by one."""

    def __init__(self, batches: list[list[int]]) -> None:
        super().__init__(num_images=sum(map(len, batches)), batch_size=len(batches[0]))
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader([tiny_batch(indices) for indices in self.batches], batch_size=None)


def steps(folder, batches: list[list[int]], accumulated: int) -> dict[str, torch.Tensor]:
    module = module_with()
    settings = {"max_epochs": 1, "precision": "32-true", "accumulate_grad_batches": accumulated}
    trainer = quiet_trainer(DetectionTrainer, folder, **settings)
    trainer.fit(module, datamodule=Micro(batches))
    assert trainer.global_step == len(batches) // accumulated
    return module.state_dict()


def num_positives(indices: list[int]) -> int:
    detector = TinyDetector(num_classes=2)
    predictions = detector(tiny_batch(indices).images)
    return int((detector.matcher(tiny_batch(indices).targets, predictions.anchors) >= 0).sum())


def test_accumulated_batches_with_equally_many_positives_are_one_large_batch(tmp_path) -> None:
    # Images 0, 2 and 4 show the same square at places a multiple of the stride of 8 px apart.
    assert num_positives([0]) == num_positives([2]) == num_positives([4]) > 0
    one = steps(tmp_path, [[0, 2, 4, 2], [2, 0, 4, 4]], accumulated=1)
    parts = steps(tmp_path, [[0, 2], [4, 2], [2, 0], [4, 4]], accumulated=2)
    torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_each_divided_by_their_own_positives(tmp_path) -> None:
    """What differs from one large batch, and by how much: the gradient is a mean of means."""
    few, many = 0, 24
    counts = num_positives([few]), num_positives([many])
    assert counts[0] != counts[1]
    module = module_with()

    def gradient(indices: list[int]) -> torch.Tensor:
        module.zero_grad()
        batch = tiny_batch(indices)
        module.detector.loss(module.detector(batch.images), batch.targets).terms["box"].backward()
        return module.detector.box_head.get_parameter("levels.0.bias").grad.clone()

    together = gradient([few, many])
    mean_of_means = (gradient([few]) + gradient([many])) / 2
    weighted = (counts[0] * gradient([few]) + counts[1] * gradient([many])) / sum(counts)
    torch.testing.assert_close(weighted, together)
    assert not torch.allclose(mean_of_means, together, rtol=1e-2)
