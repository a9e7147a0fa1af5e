import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from onestage.errors import CheckpointError, ConfigError
from onestage.evaluation import analysis
from onestage.evaluation.analysis import (
    FIGURE_GAMMAS,
    LossDistribution,
    draw_loss_curves,
    format_loss_shares,
    write_loss_curves,
)
from onestage.losses import arguments
from onestage.types import BACKGROUND, IGNORE


def test_the_curves_take_the_gammas_that_the_losses_take() -> None:
    assert analysis.LARGEST_GAMMA == arguments.LARGEST_GAMMA


def test_four_examples_share_the_loss_as_computed_by_hand() -> None:
    distribution = LossDistribution(gammas=[0, 2])
    p_t = torch.tensor([[0.5, 0.9, 0.99, 0.2, 0.3]])
    distribution.update(torch.tensor([[BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND, IGNORE]]), p_t)
    curves = distribution.curves()
    assert set(curves) == {"negatives"}
    curve = curves["negatives"]
    assert curve.num_anchors == 4
    assert_allclose(curve.fraction_of_anchors, [0.25, 0.5, 0.75, 1])
    easiest_first = [0.99, 0.9, 0.5, 0.2]
    assert_allclose(curve.p_t, easiest_first, atol=0.5 / 64)  # the lower edge of a bin, at most 1/64 of a logit away
    assert all(curve.p_t <= np.array(easiest_first) + 1e-6)
    for column, gamma in enumerate((0, 2)):
        losses = np.cumsum([-((1 - p) ** gamma) * math.log(p) for p in easiest_first])
        assert_allclose(curve.fraction_of_loss[:, column], losses / losses[-1], rtol=1e-5)  # p_t is float32
    # The hardest quarter is the one of p_t 0.2: 1.609 of 2.418 without gamma.
    assert_allclose(curve.loss_of_hardest(0.25)[0], 1.60944 / (0.01005 + 0.10536 + 0.69315 + 1.60944), rtol=1e-4)


def test_curves_are_those_of_sorting_every_example() -> None:
    generator = torch.Generator().manual_seed(0)
    p_t = torch.sigmoid(3 + 3 * torch.randn(4, 5000, generator=generator))
    labels = torch.where(torch.rand(4, 5000, generator=generator) < 0.1, 2, BACKGROUND)
    distribution = LossDistribution()
    for row in range(4):  # in batches
        distribution.update(labels[row : row + 1], p_t[row : row + 1])
    for name, members in (("positives", labels >= 0), ("negatives", labels == BACKGROUND)):
        curve = distribution.curves()[name]
        sorted_p = np.sort(p_t[members].double().numpy())[::-1]
        assert curve.num_anchors == len(sorted_p)
        counts = np.rint(curve.fraction_of_anchors * len(sorted_p)).astype(int)
        for column, gamma in enumerate(FIGURE_GAMMAS):
            losses = np.cumsum(-((1 - sorted_p) ** gamma) * np.log(sorted_p))
            assert_allclose(curve.fraction_of_loss[:, column], (losses / losses[-1])[counts - 1], atol=1e-9)


def test_a_larger_gamma_leaves_more_of_the_loss_to_the_hardest() -> None:
    distribution = LossDistribution()
    distribution.update(torch.full((1, 1000), BACKGROUND), torch.linspace(0.2, 0.999, 1000)[None])
    shares = distribution.curves()["negatives"].loss_of_hardest(0.1)
    assert list(shares) == sorted(shares)
    assert 0.1 < shares[0] < shares[-1] < 1


def test_certain_anchors_stay_finite() -> None:
    distribution = LossDistribution()
    distribution.update(torch.tensor([[0, 0, BACKGROUND]]), torch.tensor([[0.0, 1.0, 1.0]]))
    for curve in distribution.curves().values():
        assert np.isfinite(curve.fraction_of_loss).all()
        assert curve.fraction_of_anchors[-1] == 1
    assert LossDistribution().curves() == {}


@pytest.mark.parametrize("labels", [[0, BACKGROUND, BACKGROUND], [BACKGROUND] * 3])
def test_file_and_figure_hold_the_curves(tmp_path: Path, labels: list[int]) -> None:
    distribution = LossDistribution(gammas=[0.0, 0.5])
    distribution.update(torch.tensor([labels]), torch.tensor([[0.3, 0.5, 0.9]]))
    curves = distribution.curves()
    write_loss_curves(tmp_path / "losses.csv", curves, distribution.gammas)
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert list(rows[0]) == [
        "group", "p_t", "fraction_of_anchors", "fraction_of_loss_gamma_0", "fraction_of_loss_gamma_0.5",
    ]  # fmt: skip
    assert len(rows) == 3
    assert float(rows[-1]["fraction_of_loss_gamma_0.5"]) == 1
    draw_loss_curves(tmp_path / "losses.png", curves, distribution.gammas, "a title")
    with Image.open(tmp_path / "losses.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=100_000)) > 10  # more than an empty frame
    table = format_loss_shares(curves, distribution.gammas).splitlines()
    assert len(table) == 5
    assert ("10.0% of positives" in table[2]) == (0 in labels)


@pytest.mark.parametrize("gamma", [math.inf, math.nan, -1.0, 101.0])
def test_a_gamma_that_cannot_be_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match=rf"gammas is \[0.0, {gamma}\]; each must be a number in 0..100"):
        LossDistribution([0.0, gamma])


def test_a_nan_is_refused_unless_its_anchor_is_ignored() -> None:
    distribution = LossDistribution()
    distribution.update(torch.tensor([[0, IGNORE]]), torch.tensor([[0.5, torch.nan]]))
    assert distribution.counts.sum() == 1
    with pytest.raises(CheckpointError, match=r"p_t of 1 of a batch's 2 anchors is NaN.*\n.*precision 32-true"):
        distribution.update(torch.tensor([[0, BACKGROUND]]), torch.tensor([[0.5, torch.nan]]))
