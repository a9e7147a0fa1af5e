"""The guard against non-finite values: no step, checkpoint or resume lets one pass; each is explained."""

import errno
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import faulty_training
import lightning.pytorch as pl
import pytest
import torch
from faulty_training import FaultyDetector, train
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import finish, start

from onestage.errors import ConfigError, NonFiniteError
from onestage.reliability import non_finite
from onestage.reliability.non_finite import NonFiniteGuard, likely_cause

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


def diagnosis_in(folder: Path) -> dict:
    return json.loads((folder / "skipped_steps.json").read_text(), parse_constant=pytest.fail)  # no bare NaN


@pytest.mark.parametrize("fault", ["nan loss", "inf gradient"])
def test_bad_step_changes_nothing_and_the_next_one_trains(tmp_path, fault):
    recorder, guard = Recorder(), NonFiniteGuard()
    with pytest.warns(UserWarning, match=r"step 2 of epoch 0 is skipped \(1 in a row.* 1 in all\)"):
        train(tmp_path, {2: fault}, num_steps=4, guard=guard, callbacks=(recorder,))
    states = recorder.states
    assert [is_same(before, after) for before, after in pairwise(states)] == [False, False, True, False]
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())
    assert guard.num_skipped == 1
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [image["image_id"] for image in step["processes"][0]["images"]] == [104, 105]  # the third batch of two
    assert step["processes"][0]["images"][0]["file"] == "4.jpg"


def test_fourth_skipped_step_in_a_row_ends_the_run_with_all_facts(tmp_path):
    recorder = Recorder()
    with pytest.raises(NonFiniteError) as stopped:
        train(tmp_path, dict.fromkeys(range(1, 9), "nan loss"), num_steps=9, callbacks=(recorder,))
    assert NonFiniteError.exit_code == 6
    text = str(stopped.value)
    assert "training ends at step 4 of epoch 0: loss or gradient was not finite 4 times in a row" in text
    assert "classification_loss is not finite although all predictions are" in text
    assert str(tmp_path / "skipped_steps.json") in text
    diagnosis = diagnosis_in(tmp_path)
    assert diagnosis["ended_training"] is True
    assert [step["step"] for step in diagnosis["latest"]] == [1, 2, 3, 4]
    facts = diagnosis["latest"][0]["processes"][0]
    assert (facts["loss"], facts["learning_rates"], facts["precision"]) == ("nan", [0.1, 0.1], "32-true")
    assert facts["boxes"] == boxes_of(2, 0, 0)


def test_full_disk_for_the_diagnosis_is_reported_and_training_continues(tmp_path, monkeypatch):
    replace, guard = os.replace, NonFiniteGuard()

    def refuse(source, target) -> None:
        if Path(target).name == "skipped_steps.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match=r"is skipped .* See .*skipped_steps\.json: cannot be written: the disk"):
        train(tmp_path, {1: "nan loss", 2: "nan loss"}, num_steps=4, guard=guard)
    assert guard.num_skipped == 2
    assert list(tmp_path.glob("*skipped*")) == []
    with pytest.raises(NonFiniteError, match=r"All details: .*skipped_steps\.json: cannot be written"):
        train(tmp_path, {1: "nan loss"}, guard=NonFiniteGuard(max_skipped_steps=0))


def test_max_skipped_steps_zero_ends_at_the_first(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 1 of epoch 0.* 1 times in a row"):
        train(tmp_path, {1: "nan loss"}, guard=NonFiniteGuard(max_skipped_steps=0))
    with pytest.raises(ConfigError, match=r"must be >= 0, got -1"):
        NonFiniteGuard(max_skipped_steps=-1)


def test_accumulated_step_is_skipped_as_a_whole_with_all_its_images(tmp_path):
    recorder = Recorder()
    train(tmp_path, {2: "nan loss"}, num_steps=3, callbacks=(recorder,), accumulate_grad_batches=2)
    assert is_same(recorder.states[2], recorder.states[4])  # batches 2 and 3 are the second step
    assert not is_same(recorder.states[4], recorder.states[6])
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [image["image_id"] for image in step["processes"][0]["images"]] == [104, 105, 106, 107]


def test_non_finite_weights_are_refused_at_the_start(tmp_path):
    detector = FaultyDetector()
    detector.box_head.bias.data[1] = torch.inf
    message = "cannot start: 1 tensors, the first of them state_dict.detector.box_head.bias, hold NaN"
    with pytest.raises(NonFiniteError, match=message):
        train(tmp_path, detector=detector)


def test_weights_that_overflow_in_training_end_it_without_a_checkpoint(tmp_path):
    class Saver(pl.Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            with pytest.raises(NonFiniteError, match=r"was not written.* state_dict.detector.box_head.bias.*0.1"):
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    with pytest.raises(NonFiniteError, match=r"the weights are not finite \(detector.box_head.bias\)"):
        train(tmp_path, {1: "nan weights"}, num_steps=9, callbacks=(Saver(),))
    assert not (tmp_path / "last.ckpt").exists()


def scaled(fault_steps: range, num_steps: int, folder: Path) -> tuple[NonFiniteGuard, torch.amp.GradScaler, Recorder]:
    guard, scaler, recorder = NonFiniteGuard(), torch.amp.GradScaler("cpu"), Recorder()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    faults = dict.fromkeys(fault_steps, "inf gradient")
    train(folder, faults, num_steps, guard, (recorder,), precision=None, plugins=[plugin])
    return guard, scaler, recorder


def test_steps_that_the_loss_scaler_skips_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("onestage.training.trainer.resolve_precision", lambda precision, accelerator: precision)
    guard, scaler, recorder = scaled(range(6), 8, tmp_path)  # more than three in a row
    assert guard.num_skipped == 0
    assert scaler.get_scale() == 65536 / 2**6
    assert is_same(recorder.states[0], recorder.states[6])
    assert not is_same(recorder.states[6], recorder.states[8])
    assert not (tmp_path / "skipped_steps.json").exists()


def test_loss_scaler_that_finds_no_scale_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("onestage.training.trainer.resolve_precision", lambda precision, accelerator: precision)
    monkeypatch.setattr(non_finite, "MAX_SCALER_SKIPS", 5)
    with pytest.raises(NonFiniteError, match="not finite 6 times in a row"):
        scaled(range(12), 12, tmp_path)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("fault", "scale"), [("inf loss, finite gradient", 128), ("nan loss", 64)])
def test_bad_loss_in_fp16_changes_nothing_and_bad_gradients_lower_the_scale(tmp_path, fault, scale, is_fused):
    recorder, guard, scaler = Recorder(), NonFiniteGuard(), torch.amp.GradScaler("cpu", init_scale=128.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    train(tmp_path, {1: fault}, 3, guard, (recorder,), is_fused=is_fused, precision=None, plugins=plugins)
    assert is_same(*recorder.states[1:3])
    assert not is_same(*recorder.states[:2])
    assert guard.num_skipped == 1
    assert scaler.get_scale() == scale


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_fault_of_one_process_is_skipped_by_both(tmp_path, precision):
    finish(start(faulty_training.__file__, tmp_path, precision, environment={"MASTER_ADDR": "127.0.0.1"}))
    first, second = (torch.load(tmp_path / f"process_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    trained = [{k: v for k, v in one["weights"].items() if "running" not in k} for one in (first, second)]
    assert is_same(*trained)
    (step,) = diagnosis_in(tmp_path)["latest"]
    assert [process["loss"] == "nan" for process in step["processes"]] == [False, True]
    assert [process["images"][0]["image_id"] for process in step["processes"]] == [104, 106]


FINE = {"num_non_finite": 0, "smallest": -5.0, "largest": 2.0}
BROKEN = {"num_non_finite": 7, "smallest": -5.0, "largest": 2.0}


def boxes_of(num_boxes: int, num_empty: int, num_bad: int) -> dict:
    return {"num_boxes": num_boxes, "num_empty": num_empty, "num_non_finite": num_bad}


FACTS = {
    "epoch": 0, "step": 12, "precision": "32-true", "learning_rates": [0.002, 0.002],
    "loss": math.nan, "loss_terms": {"loss": math.nan, "classification_loss": math.nan, "box_loss": 0.5},
    "images": [{"image_id": 17, "file": "a.jpg"}], "boxes": boxes_of(4, 0, 0),
    "predictions": {"class_logits": FINE, "box_outputs": FINE},
    "bad_weights": [], "bad_gradients": ["head.weight"], "gradient_norm": math.nan,
}  # fmt: skip
FINITE_LOSS = {"loss": 0.5, "loss_terms": {"box_loss": 0.5}}


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"bad_weights": ["a", "b", "c", "d"]}, "the weights are not finite (a, b, c and 1 more)", "optimizer"),
        ({"boxes": boxes_of(3, 2, 0)}, "of 3 boxes 2 have no area and 0 are not finite", "annotations"),
        ({"predictions": {"box_outputs": BROKEN}}, "box_outputs overflowed on finite weights", "lr"),
        ({}, "classification_loss is not finite although all predictions are (class_logits -5..2", "docs/add_a_loss"),
        ({"loss_terms": {"loss": 1.0, "box_loss": 0.5}}, "an earlier batch of the step", "warmup_steps"),
        (FINITE_LOSS, "its gradient is not, in 1 parameters from head", "derivative"),
        ({**FINITE_LOSS, "bad_gradients": [], "gradient_norm": math.inf}, "is not, only in its norm", "lr"),
    ],
)
def test_likely_cause_is_the_first_stage_with_a_bad_value(changes, cause, remedy):
    found, change = likely_cause({**FACTS, **changes})
    assert cause in found
    assert remedy in change
