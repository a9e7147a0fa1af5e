import math
from dataclasses import replace

import pytest
import torch

from onestage.reliability.diagnosis import (
    BoxFacts,
    ImageFacts,
    SkippedStep,
    StepNumbers,
    TensorFacts,
    as_json,
    box_facts,
    describe,
    likely_cause,
    non_finite_entries,
    tensor_facts,
)
from onestage.types import IGNORE, PADDING, Targets

FINE = TensorFacts(num_non_finite=0, smallest=-5.0, largest=2.0)
BROKEN = TensorFacts(num_non_finite=7, smallest=-5.0, largest=2.0)
SOUND = SkippedStep(
    epoch=0,
    step=12,
    loss=math.nan,
    gradient_norm=math.nan,
    loss_terms={"loss": math.nan, "classification_loss": math.nan, "box_loss": 0.5},
    learning_rates=[0.002, 0.002],
    precision="32-true",
    images=[ImageFacts(17, "a.jpg")],
    boxes=BoxFacts(3, 1, 0, 0, 4.0, 90.0),
    predictions={"class_logits": FINE, "box_outputs": FINE},
    largest_weight=1.5,
    bad_weights=[],
    bad_gradients=["head.weight"],
)


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"bad_weights": ["a", "b", "c", "d"]}, "the weights are not finite (a, b, c and 1 more)", "optimizer"),
        ({"boxes": BoxFacts(3, 0, 2, 0, 0.0, 9.0)}, "of 3 boxes 2 have no area and 0 are not finite", "annotations"),
        ({"boxes": BoxFacts(2, 1, 0, 1, 1.0, 9.0)}, "of 3 boxes 0 have no area and 1 are not finite", "annotations"),
        ({"predictions": {"box_outputs": BROKEN}}, "box_outputs overflowed on finite weights, the largest", "lr"),
        ({"predictions": {"box_outputs": BROKEN}, "precision": "16-mixed"}, "beyond 65,504", "bf16-mixed"),
        ({}, "classification_loss is not finite although all predictions are (class_logits -5..2", "docs/add_a_loss"),
        ({"loss_terms": {"loss": 1.0, "box_loss": 0.5}}, "an earlier batch of the step", "warmup_steps"),
        (
            {"loss": 0.5, "loss_terms": {"box_loss": 0.5}},
            "its gradient is not, in 1 parameters from head",
            "derivative",
        ),
        (
            {"loss": 0.5, "loss_terms": {"box_loss": 0.5}, "bad_gradients": [], "gradient_norm": math.inf},
            "its gradient is not, only in its norm",
            "lr",
        ),
    ],
)
def test_the_likely_cause_is_the_first_thing_that_is_wrong(changes: dict, cause: str, remedy: str) -> None:
    found, change = likely_cause(replace(SOUND, **changes))
    assert cause in found
    assert remedy in change


def test_a_loss_that_rose_tenfold_before_is_said_to_have() -> None:
    rising = [StepNumbers(step, loss, 1.0) for step, loss in enumerate([2.0, 3.0, 2.5, 400.0])]
    assert "had risen from 2.5 to 400 before" in likely_cause(replace(SOUND, steps_before=rising))[0]
    steady = [StepNumbers(step, 2.0, 1.0) for step in range(4)]
    assert "risen" not in likely_cause(replace(SOUND, steps_before=steady))[0]


def test_boxes_are_measured_without_padding() -> None:
    boxes = torch.tensor([
        [0.0, 0.0, 10.0, 20.0],
        [5.0, 5.0, 5.0, 9.0],  # no width
        [0.0, 0.0, math.nan, 9.0],
        [0.0, 0.0, 40.0, 8.0],  # a region
        [0.0, 0.0, 0.0, 0.0],  # padding
    ])  # fmt: skip
    labels = torch.tensor([0, 1, 0, IGNORE, PADDING])
    assert box_facts([Targets(boxes[None], labels[None])]) == BoxFacts(3, 1, 1, 1, 0.0, 40.0)
    assert box_facts([Targets(boxes[None, 4:], labels[None, 4:])]) == BoxFacts(0, 0, 0, 0, None, None)


def test_tensors_are_measured_by_their_finite_values() -> None:
    assert tensor_facts(torch.tensor([1.0, math.nan, -3.0, math.inf])) == TensorFacts(2, -3.0, 1.0)
    assert tensor_facts(torch.tensor([math.nan])) == TensorFacts(1, None, None)


def test_a_description_is_readable_where_nothing_is_known() -> None:
    nothing = replace(
        SOUND, predictions={"class_logits": TensorFacts(9, None, None)}, boxes=BoxFacts(0, 0, 0, 0, None, None)
    )
    assert "Boxes: 0, 0 empty, 0 not finite." in describe(nothing)
    assert as_json(nothing)["loss"] == "nan"
    assert as_json(nothing)["predictions"]["class_logits"]["smallest"] is None


def test_every_tensor_of_a_checkpoint_is_looked_at_but_the_scores_of_callbacks() -> None:
    bad = torch.tensor([1.0, math.inf])
    checkpoint = {
        "epoch": 1,
        "state_dict": {"a": torch.ones(2), "b": bad, "count": torch.tensor(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": bad, "step": torch.tensor(1.0)}}}],
        "callbacks": {"BestCheckpoint{}": {"best_model_score": torch.tensor(-math.inf)}, "EMA": {"weights": [bad]}},
        "lr_schedulers": [{"last": math.nan}],
    }
    assert non_finite_entries(checkpoint) == [
        "state_dict.b", "optimizer_states.0.state.0.exp_avg", "callbacks.EMA.weights.0",
    ]  # fmt: skip
