import csv
import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from onestage.errors import CheckpointError, ConfigError
from onestage.evaluation.anchor_losses import (
    FIGURE_GAMMAS,
    LossDistribution,
    anchor_statistics,
    draw_loss_curves,
    format_loss_shares,
    missing_prior,
    write_loss_curves,
)
from onestage.types import BACKGROUND, IGNORE, AnchorLosses

# Two images of five anchors: three at stride 8, two at stride 16.
STRIDES = torch.tensor([8.0, 8.0, 8.0, 16.0, 16.0])
LABELS = torch.tensor([[0, BACKGROUND, BACKGROUND, IGNORE, 3], [*[BACKGROUND] * 2, IGNORE, *[BACKGROUND] * 2]])
P_T = torch.tensor([[0.2, 0.95, 0.5, 0.3, 0.6], [0.99, 0.9, 0.1, 0.91, 0.05]])
LOSSES = torch.tensor([[3.0, 0.5, 1.0, 0.0, 1.0], [0.25, 0.25, 0.0, 0.5, 1.5]])  # the sum is 8


def test_anchor_statistics_of_a_batch_equal_hand_computed_values():
    expected = {
        "anchors": (2, 6, 2, 4 / 8, 1.25 / 8, 2.75 / 8, 0.4),  # easy: p_t 0.95, 0.99, 0.91; 0.9 is not > 0.9
        "anchors/stride_8": (1, 4, 1, 3 / 8, 0.75 / 8, 1.25 / 8, 0.2),
        "anchors/stride_16": (1, 2, 1, 1 / 8, 0.5 / 8, 1.5 / 8, 0.6),
    }
    names = ("positives", "negatives", "ignored")
    names += ("loss_of_positives", "loss_of_easy_negatives", "loss_of_hard_negatives", "p_t_of_positives")
    flat = {f"{place}/{name}": v for place, row in expected.items() for name, v in zip(names, row, strict=True)}
    assert anchor_statistics(AnchorLosses(LABELS, LOSSES, P_T), STRIDES) == pytest.approx(flat)
    background = AnchorLosses(torch.full((1, 5), BACKGROUND), torch.zeros(1, 5), torch.ones(1, 5))
    assert not {name for name in anchor_statistics(background, STRIDES) if "loss_of" in name or "p_t" in name}


def first_batch(background, gamma=0.0, mined=None):
    """2 positives and 998 negatives of one probability; `mined`: number of negatives that count in the loss."""
    labels = torch.full((1, 1000), BACKGROUND)
    labels[0, :2] = 0
    p_t = torch.full((1, 1000), background)
    losses = -p_t.log() * (1 - p_t) ** gamma
    if mined is not None:
        losses[0, 2 + mined :] = 0
    return AnchorLosses(labels, losses, p_t)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 5.0])
def test_missing_prior_is_reported_for_every_gamma(gamma):
    warning = missing_prior(first_batch(0.5, gamma))
    # 1000 anchors of loss 0.5^gamma ln 2, divided by 2 positives
    assert f"is {1000 * 0.5**gamma * math.log(2) / 2:,.4g} per positive anchor" in warning
    assert "99.8% of it from 998 background anchors" in warning
    assert "model.detector.init_args.prior" in warning


def test_prior_or_mined_negatives_or_no_negatives_are_not_reported():
    assert missing_prior(first_batch(0.97)) is None
    assert missing_prior(first_batch(0.5, mined=6)) is None
    assert missing_prior(first_batch(0.5)._replace(labels=torch.zeros(1, 1000, dtype=torch.int64))) is None


def test_loss_curves_of_batches_equal_those_of_sorted_examples():
    generator = torch.Generator().manual_seed(0)
    p_t = torch.sigmoid(3 + 3 * torch.randn(4, 5000, generator=generator))
    labels = torch.where(torch.rand(4, 5000, generator=generator) < 0.1, 2, BACKGROUND)
    distribution = LossDistribution()
    for row in range(4):
        distribution.update(labels[row : row + 1], p_t[row : row + 1])
    for name, members in (("positives", labels >= 0), ("negatives", labels == BACKGROUND)):
        curve = distribution.curves()[name]
        sorted_p = np.sort(p_t[members].double().numpy())[::-1]
        assert curve.num_anchors == len(sorted_p)
        counts = np.rint(curve.fraction_of_anchors * len(sorted_p)).astype(int)
        for column, gamma in enumerate(FIGURE_GAMMAS):
            losses = np.cumsum(-((1 - sorted_p) ** gamma) * np.log(sorted_p))
            assert_allclose(curve.fraction_of_loss[:, column], (losses / losses[-1])[counts - 1], rtol=1e-4, atol=1e-9)
    shares = distribution.curves()["negatives"].loss_of_hardest(0.1)
    assert 0.1 < shares[0] < shares[-1] < 1  # a larger gamma leaves more of the loss to the hardest
    assert list(shares) == sorted(shares)


@pytest.mark.parametrize("labels", [[0, BACKGROUND, BACKGROUND], [BACKGROUND] * 3])
def test_loss_curves_are_written_as_table_and_figure(tmp_path, labels):
    distribution = LossDistribution(gammas=[0.0, 0.5])
    distribution.update(torch.tensor([labels]), torch.tensor([[0.3, 0.5, 0.9]]))
    curves = distribution.curves()
    write_loss_curves(tmp_path / "losses.csv", curves, distribution.gammas)
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    columns = ["fraction_of_anchors", "fraction_of_loss_gamma_0", "fraction_of_loss_gamma_0.5"]
    assert list(rows[0]) == ["group", "p_t", *columns]
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
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ConfigError, match=rf"gammas must be numbers in \[0, 100\], got \[0.0, {gamma}\]"):
        LossDistribution([0.0, gamma])


def test_certain_anchors_give_finite_curves_and_nan_is_refused_unless_its_anchor_is_ignored():
    distribution = LossDistribution()
    assert distribution.curves() == {}
    labels = torch.tensor([[0, 0, BACKGROUND, IGNORE]])
    distribution.update(labels, torch.tensor([[0.0, 1.0, 1.0, torch.nan]]))
    assert all(np.isfinite(curve.fraction_of_loss).all() for curve in distribution.curves().values())
    assert distribution.counts.sum() == 3
    with pytest.raises(CheckpointError, match=r"p_t is NaN for 1 of 2 anchors.*\n.*precision 32-true"):
        distribution.update(torch.tensor([[0, BACKGROUND]]), torch.tensor([[0.5, torch.nan]]))
