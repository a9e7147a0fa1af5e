"""Every pair of settings that can go together takes steps; each that cannot is refused before the first one."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_training import TinyData, TinyDetector, TinyDetectorWithBatchNorm, quiet_trainer

from onestage.errors import ConfigError
from onestage.training.ema import ExponentialMovingAverage
from onestage.training.module import DetectionModule, check_batch_norm, check_compiler
from onestage.training.optimization import WarmupSchedule, clip_gradients, scaler_of
from onestage.training.trainer import DetectionTrainer, check_processes

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "fused SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.001),
    "fused AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.001, fused=True),
}


def fit(
    folder,
    *,
    optimizer="SGD",
    precision="32-true",
    channels_last=True,
    clip=None,
    decay=None,
    batches=1,
    compiled=False,
):
    torch.manual_seed(0)
    module = DetectionModule(
        TinyDetector(num_classes=2),
        optimizer=OPTIMIZERS[optimizer],
        schedule=WarmupSchedule(kind="constant", warmup_steps=0),
        channels_last=channels_last,
        compile=compiled,
    )
    before = [parameter.detach().clone() for parameter in module.parameters()]
    settings = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip} if clip else {}
    trainer = quiet_trainer(
        DetectionTrainer,
        folder,
        callbacks=[ExponentialMovingAverage(decay)],
        precision=precision,
        accumulate_grad_batches=batches,
        max_steps=4,
        **settings,
    )
    data = TinyData(num_images=4 * batches, batch_size=1)
    scaler = scaler_of(trainer)
    if scaler is not None:  # its initial 65536 would skip the first steps, as it should
        scaler.load_state_dict({**scaler.state_dict(), "scale": 128.0})
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    assert trainer.precision_plugin.precision == precision
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    return module, trainer


# Each pair of values of two settings stands in at least one of these runs, apart from what is refused below.
RUNS = [
    # optimizer, precision, channels_last, clip, EMA decay, accumulated batches
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
REFUSED = {("fused SGD", "16-mixed"), ("fused AdamW", "16-mixed")}  # with clipping


def test_the_table_of_runs_holds_every_pair_that_is_not_refused():
    values = [tuple(OPTIMIZERS), PRECISIONS, (True, False), (None, "norm", "value"), (None, 0.9), (1, 2)]
    missing = [
        (first, second)
        for left in range(len(values))
        for right in range(left + 1, len(values))
        for first in values[left]
        for second in values[right]
        if not any(run[left] == first and run[right] == second for run in RUNS)
    ]
    assert missing == []


@pytest.mark.parametrize(("optimizer", "precision", "channels_last", "clip", "decay", "batches"), RUNS)
def test_settings_that_go_together_take_finite_steps(
    tmp_path, optimizer, precision, channels_last, clip, decay, batches
):
    fit(
        tmp_path,
        optimizer=optimizer,
        precision=precision,
        channels_last=channels_last,
        clip=clip,
        decay=decay,
        batches=batches,
    )


@pytest.mark.parametrize("optimizer", ["fused SGD", "fused AdamW"])
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_fp16_with_a_fused_optimizer_and_clipping_is_refused(tmp_path, optimizer, clip):
    with pytest.raises(ConfigError, match="fused: false, or"):
        fit(tmp_path, optimizer=optimizer, precision="16-mixed", clip=clip)


def test_fused_and_plain_optimizers_take_the_same_steps(tmp_path):
    for name in ("SGD", "AdamW"):
        plain, _ = fit(tmp_path, optimizer=name, clip="norm")
        fused, _ = fit(tmp_path, optimizer=f"fused {name}", clip="norm")
        torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_fp16_on_a_cpu_is_fp16_with_a_scaler_and_not_bf16_in_silence(tmp_path):
    _, trainer = fit(tmp_path, precision="16-mixed")
    assert trainer.precision_plugin.scaler.get_scale() == 128
    seen = []

    class Seen(TinyDetector):
        def forward(self, images):
            self.class_head.register_forward_pre_hook(lambda _, maps: seen.append(maps[0][1].dtype))
            return super().forward(images)

    module = DetectionModule(Seen(num_classes=2), schedule=WarmupSchedule(kind="constant", warmup_steps=0))
    trainer = quiet_trainer(DetectionTrainer, tmp_path, precision="16-mixed", max_steps=1)
    trainer.fit(module, datamodule=TinyData(num_images=1, batch_size=1))
    assert seen == [torch.float16]


@pytest.mark.parametrize(("algorithm", "norm"), [("norm", 0.5), (None, 0.5), ("value", 0.5**0.5)])
def test_gradients_are_clipped_to_the_hand_computed_length(algorithm, norm):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])  # of norm 5; cut at 0.5: [0.5, -0.5]
    clip_gradients(SimpleNamespace(strategy=None), torch.optim.SGD([parameter], lr=1.0), 0.5, algorithm)
    assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-5)


def trainer_of(world_size, device="cpu", sync_batchnorm=True):
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(world_size=world_size, strategy=strategy, sync_batchnorm=sync_batchnorm)


def test_sync_batch_norm_is_refused_on_several_cpu_processes_only():
    with pytest.raises(ConfigError, match="runs on GPUs only"):
        check_batch_norm(trainer_of(2), TinyDetectorWithBatchNorm(num_classes=2))
    check_batch_norm(trainer_of(2, "cuda"), TinyDetectorWithBatchNorm(num_classes=2))
    check_batch_norm(trainer_of(2, sync_batchnorm=False), TinyDetectorWithBatchNorm(num_classes=2))


@pytest.mark.parametrize(
    ("world_size", "detector", "said"),
    [(2, TinyDetector, "has no batch norm"), (1, TinyDetectorWithBatchNorm, "one process")],
)
def test_sync_batch_norm_that_does_nothing_says_so(monkeypatch, world_size, detector, said):
    messages = []
    monkeypatch.setattr("onestage.training.module.rank_zero_info", messages.append)
    check_batch_norm(trainer_of(world_size), detector(num_classes=2))
    assert said in messages[0]


def test_sync_batch_norm_reaches_the_trainer():
    assert quiet_trainer(DetectionTrainer, None, sync_batchnorm=True).sync_batchnorm
    assert not quiet_trainer(DetectionTrainer, None).sync_batchnorm


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(("environment", "launcher"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, environment, launcher):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_processes(SimpleNamespace(world_size=8, num_devices=4, num_nodes=2))
    with pytest.raises(ConfigError, match=rf"{launcher} has started 8 .*\n.*devices 4 --trainer\.num_nodes 2"):
        quiet_trainer(DetectionTrainer, None, devices=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches is 0; .* at least one batch\.\nSet it to 1"),
        ({"accumulate_grad_batches": -2}, "accumulate_grad_batches is -2"),
        ({"gradient_clip_val": -1}, r"gradient_clip_val is -1; it must be 0 or more.*\nSet it to null"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val is nan"),
    ],
)
def test_numbers_that_no_step_can_be_taken_with_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        quiet_trainer(DetectionTrainer, None, **settings)


def test_no_clipping_has_two_names():
    for value in (None, 0, 0.0):
        assert not quiet_trainer(DetectionTrainer, None, gradient_clip_val=value).gradient_clip_val


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp_spawn",
        "ddp_fork",
        "ddp_notebook",
        "ddp_spawn_find_unused_parameters_true",
        "ddp_fork_find_unused_parameters_false",
        "ddp_notebook_find_unused_parameters_true",
        DDPStrategy(start_method="spawn"),
    ],
)
def test_processes_inside_the_command_are_refused(strategy):
    with pytest.raises(ConfigError, match=r"'(spawn|fork)' inside the command.*\nSet trainer\.strategy: ddp,"):
        quiet_trainer(DetectionTrainer, None, strategy=strategy, devices=2)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_processes_of_their_own_are_not(strategy):
    assert quiet_trainer(DetectionTrainer, None, strategy=strategy, devices=2).world_size == 2


def test_a_process_alone_may_start_others(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_processes(SimpleNamespace(world_size=4, num_devices=4, num_nodes=1))


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler .*\n.*model\.compile: false"):
        check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        check_compiler()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "clip", "decay", "batches"),
    [("32-true", "value", 0.9, 2), ("bf16-mixed", "norm", None, 1), ("16-mixed", None, 0.9, 2)],
)
def test_a_compiled_detector_goes_with_everything(tmp_path, precision, clip, decay, batches):
    fit(tmp_path, precision=precision, clip=clip, decay=decay, batches=batches, compiled=True)
