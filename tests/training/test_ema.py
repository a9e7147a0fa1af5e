from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from tiny_training import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from onestage.errors import ConfigError
from onestage.training.ema import RAW_WEIGHTS, ExponentialMovingAverage

STEPS = 4


class Climber(pl.LightningModule):
    """One weight that SGD raises by 1 at every step, and a counter of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(1))
        self.register_buffer("constant", torch.ones(1), persistent=False)
        self.validated: list[float] = []
        self.fail_in_validation = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        self.running += 1
        return -self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated.append(self.weight.item())
        if self.fail_in_validation and self.steps > 0:
            raise ZeroDivisionError("in the middle of a validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(STEPS, 1))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1, 1))


def fit(module, folder, *callbacks, ckpt_path=None, **settings):
    settings = {"max_epochs": 1, "limit_val_batches": 1.0, **settings}
    trainer = quiet_trainer(pl.Trainer, folder, callbacks=list(callbacks), **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def test_average_follows_hand_computed_ramp(tmp_path):
    module = Climber()
    fit(module, tmp_path, ExponentialMovingAverage(decay=0.15))
    # d = min(0.15, 1/10, 2/11, 3/12, ...) = 0.1, 0.15, 0.15, 0.15 on the weights 1, 2, 3, 4
    # 0.1 * 0 + 0.9 * 1 = 0.9; 0.15 * 0.9 + 0.85 * 2 = 1.835; 0.15 * 1.835 + 0.85 * 3 = 2.82525; ... + 3.4 = 3.8237875
    assert module.validated == pytest.approx([3.8237875], rel=1e-6)


def test_validation_sees_average_and_training_continues_from_raw_weights(tmp_path):
    module = Climber()
    fit(module, tmp_path, ExponentialMovingAverage(decay=0.9999), max_epochs=2, num_sanity_val_steps=1)
    # With d = (1 + n) / (10 + n) and weights 1, 2, 3, ..., the average after n + 1 updates is 0.9 (n + 1).
    # Before the first update the sanity check sees the weight itself.
    assert module.validated == pytest.approx([0.0, 3.6, 7.2], rel=1e-6)
    assert module.weight.item() == pytest.approx(7.2, rel=1e-6)  # the module keeps the average
    assert module.running.item() == pytest.approx(7.2, rel=1e-6)  # running statistics are averaged
    assert (module.steps.item(), module.constant.item()) == (2 * STEPS, 1)  # counters are not: they would be truncated


def test_average_does_not_change_training(tmp_path):
    raw = []
    for decay in (None, 0.5):
        module = Climber()
        keep = ModelCheckpoint(tmp_path / str(decay), save_last=True)
        fit(module, tmp_path, ExponentialMovingAverage(decay), keep, max_epochs=2, enable_checkpointing=True)
        saved = torch.load(keep.last_model_path, weights_only=True)
        assert (RAW_WEIGHTS in saved) is (decay is not None)
        raw.append((saved.get(RAW_WEIGHTS, saved["state_dict"]), saved["optimizer_states"]))
    assert repr(raw[0]) == repr(raw[1])
    assert raw[0][0]["weight"].item() == 8


def test_every_fit_starts_its_own_ramp(tmp_path):
    ema = ExponentialMovingAverage(decay=0.9999)
    for _ in range(2):
        fit(module := Climber(), tmp_path, ema)
        assert module.validated == pytest.approx([3.6], rel=1e-6)


def test_accumulated_batches_update_once_per_optimizer_step(tmp_path):
    ema = ExponentialMovingAverage(decay=0.9999)
    fit(Climber(), tmp_path, ema, accumulate_grad_batches=2)
    assert ema.num_updates == STEPS // 2


def test_exception_in_validation_does_not_swap_saved_weights(tmp_path):
    module = Climber()
    module.fail_in_validation = True
    keep = ModelCheckpoint(tmp_path, filename="cut", save_on_exception=True, every_n_epochs=100)
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path, ExponentialMovingAverage(decay=0.9999), keep, enable_checkpointing=True)
    saved = torch.load(next(tmp_path.glob("cut*.ckpt")), weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(3.6, rel=1e-6)
    assert saved[RAW_WEIGHTS]["weight"].item() == STEPS
    assert saved[RAW_WEIGHTS]["steps"].item() == STEPS


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_end", "on_train_end"])
def test_checkpoint_is_the_same_from_every_hook(tmp_path, hook):
    hooks = {hook: lambda self, trainer, *_: trainer.save_checkpoint(tmp_path / "now.ckpt")}
    save = type("Save", (ModelCheckpoint,), hooks)(tmp_path, save_top_k=0)  # checkpoint callbacks are called last
    fit(Climber(), tmp_path, save, ExponentialMovingAverage(0.9999), enable_checkpointing=True)
    saved = torch.load(tmp_path / "now.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(3.6, rel=1e-6)
    assert saved[RAW_WEIGHTS]["weight"].item() == STEPS


def last_checkpoint(folder, decay, max_epochs, ckpt_path=None):
    keep = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    settings = {"enable_checkpointing": True, "ckpt_path": ckpt_path, "max_epochs": max_epochs}
    fit(Climber(), folder, ExponentialMovingAverage(decay), keep, **settings)
    return keep.last_model_path


def test_average_can_stop_and_start_at_a_resume_without_changing_the_raw_weights(tmp_path):
    part = last_checkpoint(tmp_path / "part", decay=0.97, max_epochs=1)
    off = last_checkpoint(tmp_path / "off", decay=None, max_epochs=2, ckpt_path=part)
    later = torch.load(last_checkpoint(tmp_path / "later", 0.97, max_epochs=3, ckpt_path=off), weights_only=True)
    assert RAW_WEIGHTS not in torch.load(off, weights_only=True)
    assert later["callbacks"]["ExponentialMovingAverage"] == {"num_updates": STEPS}
    assert later[RAW_WEIGHTS]["weight"].item() == later[RAW_WEIGHTS]["steps"].item() == 3 * STEPS


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=r"ema\.decay must be in \(0, 1\), or null, got"):
        ExponentialMovingAverage(decay)


def test_sharding_strategy_is_refused_with_average_only():
    trainer = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")
    with pytest.raises(ConfigError, match="strategy: ddp"):
        ExponentialMovingAverage(0.9).setup(trainer, Climber(), "fit")
    ExponentialMovingAverage(None).setup(trainer, Climber(), "fit")
    ExponentialMovingAverage(0.9).setup(trainer, Climber(), "validate")
    with pytest.raises(ConfigError, match=r"ema\.decay must be null with trainer\.precision bf16-true"):
        ExponentialMovingAverage(0.9).setup(SimpleNamespace(strategy=None, precision="bf16-true"), Climber(), "fit")
