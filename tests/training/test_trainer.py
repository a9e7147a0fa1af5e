"""Precision, launchers, and every pair of training settings that may be combined."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_training import CONSTANT, TinyData, TinyDetector, quiet_trainer

from onestage.errors import ConfigError
from onestage.training.ema import ExponentialMovingAverage
from onestage.training.module import DetectionModule
from onestage.training.optimization import scaler_of
from onestage.training.trainer import DetectionTrainer, check_processes, choose_precision

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "fused SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.001),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.001, fused=True),
}
# Each pair of values of two settings is in at least one of these runs, apart from the refused ones.
SETTINGS = ("optimizer", "precision", "channels_last", "clip", "decay", "batches")
RUNS = [
    ("SGD", "32-true", True, None, None, 1),
    ("SGD", "bf16-mixed", False, "norm", 0.9, 2),
    ("SGD", "16-mixed", True, "value", 0.9, 1),
    ("SGD", "16-mixed", False, None, None, 2),
    ("fused SGD", "32-true", False, "value", 0.9, 2),
    ("fused SGD", "bf16-mixed", True, "norm", None, 1),
    ("fused SGD", "16-mixed", True, None, 0.9, 2),
    ("AdamW", "32-true", True, "norm", 0.9, 2),
    ("AdamW", "bf16-mixed", False, "value", None, 1),
    ("AdamW", "16-mixed", True, "norm", None, 2),
    ("fused AdamW", "32-true", False, "norm", None, 1),
    ("fused AdamW", "bf16-mixed", True, "value", 0.9, 2),
    ("fused AdamW", "16-mixed", False, None, 0.9, 1),
    ("AdamW", "bf16-mixed", True, None, 0.9, 1),
]


def fit(folder, *, optimizer="SGD", precision="32-true", channels_last=True, clip=None, decay=None, batches=1):
    torch.manual_seed(0)
    module = DetectionModule(TinyDetector(2), OPTIMIZERS[optimizer], CONSTANT, channels_last=channels_last)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    settings = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip} if clip else {}
    settings |= {"precision": precision, "accumulate_grad_batches": batches, "max_steps": 4}
    trainer = quiet_trainer(DetectionTrainer, folder, callbacks=[ExponentialMovingAverage(decay)], **settings)
    scaler = scaler_of(trainer)
    if scaler is not None:  # the initial scale of 65536 would skip the first steps, as it should
        scaler.load_state_dict({**scaler.state_dict(), "scale": 128.0})
    trainer.fit(module, datamodule=TinyData(num_images=4 * batches, batch_size=1))
    assert trainer.global_step == 4
    assert trainer.precision_plugin.precision == precision
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_combined_settings_take_finite_steps(tmp_path, run):
    fit(tmp_path, **dict(zip(SETTINGS, run, strict=True)))


@pytest.mark.parametrize("optimizer", ["fused SGD", "fused AdamW"])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_fp16_with_fused_optimizer_and_clipping_is_refused(tmp_path, optimizer, clip):
    with pytest.raises(ConfigError, match="fused: false, or"):
        fit(tmp_path, optimizer=optimizer, precision="16-mixed", clip=clip)


def test_precision_follows_instructions_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx512_bf16": True})
    assert choose_precision("cpu") == ("bf16-mixed", "this CPU has avx512_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_precision("cpu")[0] == choose_precision("mps")[0] == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_precision("cuda")[0] == "16-mixed"


SPAWNING = ["ddp_spawn", "ddp_fork_find_unused_parameters_false", "ddp_notebook", DDPStrategy(start_method="spawn")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches must be >= 1 batch per step, got 0\.\nSet it to 1"),
        ({"gradient_clip_val": -1}, r"gradient_clip_val must be >= 0, got -1\.\nSet it to null"),
        ({"sync_batchnorm": True, "devices": 2, "strategy": "ddp"}, "must be false on CPUs, got True"),
        *[({"strategy": way, "devices": 2}, r"inside the command.*\nSet trainer\.strategy: ddp,") for way in SPAWNING],
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    quiet_trainer(DetectionTrainer, None, sync_batchnorm=True)  # of one process, it has no effect
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(DetectionTrainer, None, **settings)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(("environment", "launcher"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_other_number_of_started_processes_is_refused(monkeypatch, environment, launcher):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_processes(SimpleNamespace(world_size=8, num_devices=4, num_nodes=2))
    with pytest.raises(ConfigError, match=rf"{launcher} has started 8 .*\n.*devices 4 --trainer\.num_nodes 2"):
        quiet_trainer(DetectionTrainer, None, devices=1)


def test_one_slurm_task_may_start_processes(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_processes(SimpleNamespace(world_size=4, num_devices=4, num_nodes=1))
