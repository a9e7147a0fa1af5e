"""Refusals of arguments outside their range, for every numeric argument of every loss."""

import inspect
import math
import re

import pytest

import onestage.losses
from onestage.errors import ConfigError
from onestage.losses import BoxLoss, ClassificationLoss, ClassWeights, EffectiveNumberWeights, PositiveNormaliser

CLASSES = [getattr(onestage.losses, name) for name in onestage.losses.__all__]
ARGUMENTS = [
    (loss, name)
    for loss in CLASSES
    if issubclass(loss, BoxLoss | ClassificationLoss | EffectiveNumberWeights | PositiveNormaliser)
    and not inspect.isabstract(loss)
    for name in inspect.signature(loss).parameters
    if name not in ("class_weights", "args", "kwargs")
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize(("loss", "argument"), ARGUMENTS)
def test_non_finite_or_negative_argument_is_refused(loss, argument, value) -> None:
    with pytest.raises(ConfigError, match=f"{argument} must be .*, got {value}"):
        loss(**{argument: value})


@pytest.mark.parametrize(
    ("loss", "argument", "value", "rule"),
    [
        ("SigmoidFocalLoss", "alpha", 1.5, "in [0, 1] or null"),
        ("SigmoidFocalLoss", "gamma", 1e38, "in [0, 100]"),
        ("QualityFocalLoss", "beta", 1e38, "in [1, 100]"),
        ("QualityFocalLoss", "beta", 0.5, "in [1, 100]"),
        ("SigmoidFocalLoss", "label_smoothing", 1.0, "in [0, 1)"),
        ("EffectiveNumberWeights", "beta", 1.0, "in [0, 1)"),
        ("PositiveNormaliser", "momentum", 1.0, "in [0, 1)"),
        ("MinedCrossEntropy", "negatives_per_positive", 0, "an integer >= 1"),
        ("MinedCrossEntropy", "min_negatives", 1.5, "an integer >= 0"),
        ("OHEMCrossEntropy", "anchors_per_image", 0, "an integer >= 1"),
    ],
)
def test_value_outside_the_range_is_refused_with_rule_and_value(loss, argument, value, rule) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{argument} must be {rule}, got {value}.")):
        getattr(onestage.losses, loss)(**{argument: value})


@pytest.mark.parametrize("weights", [[1.0, -2.0], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_invalid_class_weights_are_refused(weights) -> None:
    with pytest.raises(ConfigError, match=r"class_weights must be finite numbers >= 0, .* got \["):
        ClassWeights(weights)
