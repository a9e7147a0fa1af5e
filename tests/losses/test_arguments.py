"""Numbers that are none, for every numeric argument of every loss."""

import inspect
import math

import pytest

import onestage.losses
from onestage.errors import ConfigError
from onestage.losses import (
    BoxLoss,
    ClassificationLoss,
    ClassWeights,
    EffectiveNumberWeights,
    MinedCrossEntropy,
    OHEMCrossEntropy,
    PositiveNormaliser,
    QualityFocalLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
    VarifocalLoss,
)

CLASSES = [one for name in onestage.losses.__all__ if not inspect.isabstract(one := getattr(onestage.losses, name))]
ARGUMENTS = [
    (one, name)
    for one in CLASSES
    if issubclass(one, BoxLoss | ClassificationLoss | EffectiveNumberWeights | PositiveNormaliser)
    for name in inspect.signature(one).parameters
    if name not in ("class_weights", "args", "kwargs")
]


def test_every_kind_of_argument_is_among_them() -> None:
    names = {name for _, name in ARGUMENTS}
    assert {"alpha", "beta", "gamma", "label_smoothing", "momentum", "anchors_per_image", "min_negatives"} <= names
    assert len(ARGUMENTS) >= 22


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize(("loss", "argument"), ARGUMENTS)
def test_what_is_no_number_or_negative_is_refused(loss, argument: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{argument} is {value}; "):
        loss(**{argument: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_class_weights_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=f"class_weights is .*{value}"):
        ClassWeights([1.0, value])


@pytest.mark.parametrize("loss", [SigmoidFocalLoss, SoftmaxFocalLoss, VarifocalLoss, QualityFocalLoss])
def test_a_focus_at_which_nothing_counts_is_refused(loss) -> None:
    argument = "beta" if loss is QualityFocalLoss else "gamma"
    loss(**{argument: 100.0})
    with pytest.raises(ConfigError, match=r"is 1e\+38; .* at most 100, where hardly anything counts"):
        loss(**{argument: 1e38})


@pytest.mark.parametrize(
    ("loss", "argument"),
    [
        (MinedCrossEntropy, "negatives_per_positive"),
        (MinedCrossEntropy, "min_negatives"),
        (OHEMCrossEntropy, "anchors_per_image"),
    ],
)
def test_a_number_of_anchors_is_whole(loss, argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument} is 1.5; it must be a whole number"):
        loss(**{argument: 1.5})
