import errno
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from faulty_training import FaultyDetector, train
from lightning.pytorch.plugins.precision import MixedPrecision

from onestage.errors import ConfigError, NonFiniteError
from onestage.reliability import non_finite as guards
from onestage.reliability.non_finite import NonFiniteGuard

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


class Recorder(pl.Callback):
    """Copies of all state before and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.states.append(self.state_of(trainer, pl_module))

    def on_train_end(self, trainer, pl_module) -> None:
        self.states.append(self.state_of(trainer, pl_module))

    @staticmethod
    def state_of(trainer, pl_module) -> dict[str, torch.Tensor]:
        momenta = trainer.optimizers[0].state_dict()["state"]
        copies = {f"momentum {key}": one["momentum_buffer"].clone() for key, one in momenta.items()}
        return copies | {name: one.clone() for name, one in pl_module.state_dict().items()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


def diagnosis_in(folder: Path) -> dict:
    return json.loads((folder / "skipped_steps.json").read_text(), parse_constant=pytest.fail)  # no bare NaN


@pytest.mark.parametrize("fault", ["nan loss", "inf gradient"])
def test_a_bad_step_changes_nothing_and_the_next_one_goes_on(tmp_path: Path, fault: str) -> None:
    recorder, guard = Recorder(), NonFiniteGuard()
    with pytest.warns(UserWarning, match=r"step 2 of epoch 0 is skipped \(1 in a row.* 1 in all\)"):
        train(tmp_path, {2: fault}, num_steps=4, guard=guard, callbacks=(recorder,))
    states = recorder.states
    assert [is_same(before, after) for before, after in pairwise(states)] == [
        False, False, True, False,
    ]  # fmt: skip
    assert all(is_finite(state) for state in states)
    assert guard.num_skipped == 1
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [image["image_id"] for image in step["processes"][0]["images"]] == [104, 105]  # the third batch of two
    assert step["processes"][0]["images"][0]["file"] == "4.jpg"


def test_without_the_guard_the_same_fault_would_reach_the_weights(tmp_path: Path) -> None:
    class NoGuard(NonFiniteGuard):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None: ...

    recorder = Recorder()
    train(tmp_path, {1: "nan loss"}, num_steps=3, guard=NoGuard(), callbacks=(recorder,))
    assert not is_finite(recorder.states[-1])


def test_a_run_without_faults_is_the_same_with_and_without_the_guard(tmp_path: Path) -> None:
    class NoGuard(NonFiniteGuard):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None: ...

    guarded, free = Recorder(), Recorder()
    train(tmp_path, callbacks=(guarded,))
    train(tmp_path, callbacks=(free,), guard=NoGuard())
    assert all(is_same(one, other) for one, other in zip(guarded.states, free.states, strict=True))
    assert not (tmp_path / "skipped_steps.json").exists()


def test_three_in_a_row_are_survived_and_counted_anew_afterwards(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    faults = dict.fromkeys([1, 2, 3, 5, 6, 7], "nan loss")
    train(tmp_path, faults, num_steps=9, guard=guard)
    assert guard.num_skipped == 6
    assert diagnosis_in(tmp_path)["ended_training"] is False


def test_the_fourth_in_a_row_ends_the_run_and_says_all(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(NonFiniteError) as stopped:
        train(tmp_path, dict.fromkeys(range(1, 9), "nan loss"), num_steps=9, callbacks=(recorder,))
    assert NonFiniteError.exit_code == 6
    text = str(stopped.value)
    assert "training ends at step 4 of epoch 0: loss or gradient was not finite 4 times in a row" in text
    assert "classification_loss is not finite although all predictions are" in text
    assert "learning rate 0.1; precision 32-true" in text
    assert "Images: 108 (8.jpg), 109 (9.jpg)." in text
    assert "Boxes: 2, sides 2.8..3.0 px, 0 empty, 0 not finite." in text  # 2 + 8 / 10 and 3 px
    assert str(tmp_path / "skipped_steps.json") in text
    diagnosis = diagnosis_in(tmp_path)
    assert diagnosis["ended_training"] is True
    assert [step["step"] for step in diagnosis["latest"]] == [1, 2, 3, 4]
    facts = diagnosis["latest"][0]["processes"][0]
    assert facts["loss"] == "nan"
    assert facts["learning_rates"] == [0.1, 0.1]
    assert [numbers["step"] for numbers in facts["steps_before"]] == [0]


def test_a_gradient_alone_names_the_parameters_it_shows_in(tmp_path: Path) -> None:
    train(tmp_path, {1: "inf gradient"}, num_steps=2)
    (step,) = diagnosis_in(tmp_path)["latest"]
    facts = step["processes"][0]
    assert float(facts["loss"]) > 0
    assert "detector.class_head.weight" in facts["bad_gradients"]
    assert "detector.box_head.weight" not in facts["bad_gradients"]
    assert facts["likely_cause"] == (
        "the loss is finite and its gradient is not, in 6 parameters from detector.conv.weight to "
        "detector.class_head.bias"
    )


def test_a_full_disk_for_the_diagnosis_is_said_once_and_costs_no_training(tmp_path: Path, monkeypatch) -> None:
    replace, guard = os.replace, NonFiniteGuard()

    def refuse(source, target) -> None:
        if Path(target).name == "skipped_steps.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="is skipped") as warned:
        train(tmp_path, {1: "nan loss", 2: "nan loss"}, num_steps=4, guard=guard)
    said = [str(one.message) for one in warned if "Training goes on without" in str(one.message)]
    assert len(said) == 1
    assert "the disk or the quota is full" in said[0]
    assert guard.num_skipped == 2
    assert list(tmp_path.glob("*skipped*")) == []
    with pytest.raises(NonFiniteError, match=r"skipped_steps\.json, which could not be written"):
        train(tmp_path, {1: "nan loss"}, guard=NonFiniteGuard(max_skipped_steps=0))


def test_the_state_in_a_checkpoint_goes_on_counting_with_all_records(tmp_path: Path) -> None:
    guard, resumed = NonFiniteGuard(), NonFiniteGuard()
    train(tmp_path / "first", {1: "nan loss", 2: "nan loss"}, num_steps=3, guard=guard)
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.raises(NonFiniteError, match="4 times in a row"):
        train(tmp_path / "second", dict.fromkeys(range(4), "nan loss"), num_steps=4, guard=resumed)
    diagnosis = diagnosis_in(tmp_path / "second")
    assert diagnosis["num_skipped"] == 4
    assert [step["step"] for step in diagnosis["latest"]] == [1, 2, 0, 1]
    assert [one["step"] for one in diagnosis["latest"][-1]["processes"][0]["steps_before"]] == [0]


def test_no_step_may_be_skipped_if_so_configured(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 0.* 1 times in a row"):
        train(tmp_path, {1: "nan loss"}, guard=NonFiniteGuard(max_skipped_steps=0))
    with pytest.raises(ConfigError, match="must be 0 or more"):
        NonFiniteGuard(max_skipped_steps=-1)


def test_an_accumulated_step_is_skipped_as_a_whole_and_names_the_images_of_all_its_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    train(tmp_path, {2: "nan loss"}, num_steps=3, callbacks=(recorder,), accumulate_grad_batches=2)
    assert is_same(recorder.states[2], recorder.states[4])  # batches 2 and 3 are the second step
    assert not is_same(recorder.states[4], recorder.states[6])
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [image["image_id"] for image in step["processes"][0]["images"]] == [104, 105, 106, 107]


def test_weights_that_are_not_finite_are_refused_at_the_start(tmp_path: Path) -> None:
    detector = FaultyDetector()
    detector.box_head.bias.data[1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"cannot start: 1 tensors, the first of them state_dict.detector.box_head.bias, hold NaN"
    ):
        train(tmp_path, detector=detector)


def test_an_optimizer_state_that_is_not_finite_is_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    module = train(tmp_path, num_steps=2)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(NonFiniteError, match=r"optimizer.0.state.0.momentum_buffer"):
        again = FaultyDetector()
        train_on(tmp_path, again, tmp_path / "last.ckpt")


def train_on(folder: Path, detector: FaultyDetector, checkpoint: Path) -> None:
    class Restored(pl.Callback):  # as `fit --ckpt_path` does, after the optimizer is built
        def on_fit_start(self, trainer, pl_module) -> None:
            state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
            trainer.optimizers[0].load_state_dict(state)

    train(folder, detector=detector, callbacks=(Restored(),))


def test_weights_that_turn_bad_during_training_end_it_without_a_checkpoint(tmp_path: Path) -> None:
    class Saver(pl.Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            with pytest.raises(NonFiniteError, match=r"was not written.* state_dict.detector.box_head.bias.*0.1"):
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(NonFiniteError, match=r"the weights are not finite \(detector.box_head.bias\)"):
        train(tmp_path, {1: "nan weights"}, num_steps=9, callbacks=(Saver(),))
    assert not (tmp_path / "last.ckpt").exists()


def test_a_checkpoint_after_skipped_steps_is_finite_and_loads(tmp_path: Path) -> None:
    module = train(tmp_path, {1: "nan loss", 2: "inf gradient"}, num_steps=3)
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert is_finite(checkpoint["state_dict"])
    assert is_finite(
        {str(key): one["momentum_buffer"] for key, one in checkpoint["optimizer_states"][0]["state"].items()}
    )


def scaled(fault_steps: range, num_steps: int, folder: Path) -> tuple[NonFiniteGuard, torch.amp.GradScaler, Recorder]:
    guard, scaler, recorder = NonFiniteGuard(), torch.amp.GradScaler("cpu"), Recorder()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    faults = dict.fromkeys(fault_steps, "inf gradient")
    try:
        train(folder, faults, num_steps, guard, (recorder,), precision=None, plugins=[plugin])
    finally:
        recorder.scale = scaler.get_scale()
    return guard, scaler, recorder


def test_steps_that_the_loss_scaler_skips_are_its_own_affair(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("onestage.training.trainer.resolve_precision", lambda precision, accelerator: precision)
    guard, scaler, recorder = scaled(range(6), 8, tmp_path)  # more than three in a row
    assert guard.num_skipped == 0
    assert scaler.get_scale() == 65536 / 2**6
    assert is_same(recorder.states[0], recorder.states[6])
    assert not is_same(recorder.states[6], recorder.states[8])
    assert not (tmp_path / "skipped_steps.json").exists()


def test_a_loss_scaler_that_finds_no_scale_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("onestage.training.trainer.resolve_precision", lambda precision, accelerator: precision)
    monkeypatch.setattr(guards, "MAX_SCALER_SKIPS", 5)
    with pytest.raises(NonFiniteError, match="not finite 6 times in a row"):
        scaled(range(12), 12, tmp_path)


@pytest.mark.parametrize("is_fused", [False, True])
def test_under_fp16_a_bad_loss_with_finite_gradients_changes_nothing_either(tmp_path: Path, is_fused: bool) -> None:
    recorder, guard, scaler = Recorder(), NonFiniteGuard(), torch.amp.GradScaler("cpu", init_scale=128.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    faults = {1: "inf loss, finite gradient"}
    train(tmp_path, faults, 3, guard, (recorder,), is_fused=is_fused, precision=None, plugins=plugins)
    states = recorder.states
    assert [is_same(before, after) for before, after in pairwise(states)] == [False, True, False]
    assert guard.num_skipped == 1
    assert scaler.get_scale() == 128  # it has seen no gradient that overflowed


@pytest.mark.parametrize("is_fused", [False, True])
def test_under_fp16_a_bad_loss_with_bad_gradients_is_counted_and_lowers_the_scale(
    tmp_path: Path, is_fused: bool
) -> None:
    recorder, guard, scaler = Recorder(), NonFiniteGuard(), torch.amp.GradScaler("cpu", init_scale=128.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    train(tmp_path, {1: "nan loss"}, 3, guard, (recorder,), is_fused=is_fused, precision=None, plugins=plugins)
    assert is_same(*recorder.states[1:3])
    assert guard.num_skipped == 1
    assert scaler.get_scale() == 64


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_fault_of_one_process_is_skipped_by_both(tmp_path: Path, precision: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).with_name("faulty_training.py")), str(tmp_path), precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"process_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    trained = [{k: v for k, v in one["weights"].items() if "running" not in k} for one in (first, second)]
    assert is_same(*trained)
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [process["loss"] == "nan" for process in step["processes"]] == [False, True]
    assert [process["images"][0]["image_id"] for process in step["processes"]] == [104, 106]
