"""How unequally the examples share the loss: the cumulative distribution of RetinaNet figure 4 (arXiv:1708.02002)."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onestage.errors import CheckpointError, ConfigError
from onestage.types import BACKGROUND, IGNORE

FIGURE_GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # the four of the figure, and the largest that the paper trains with
LARGEST_GAMMA = 100.0  # as of the losses
GROUPS = ("positives", "negatives")
LARGEST_LOGIT = 17.0  # of p_t: float32 knows no probability between 1 - 6e-8 and 1
BINS_PER_LOGIT = 64
NUM_BINS = int(2 * LARGEST_LOGIT * BINS_PER_LOGIT)

FloatArray = npt.NDArray[np.float64]


class LossCurve(NamedTuple):
    """The examples of one group, easiest first. n rows: the first n examples have p_t of `p_t` or more."""

    p_t: FloatArray  # [n]
    fraction_of_anchors: FloatArray  # [n] 0..1, ascending, the last is 1
    fraction_of_loss: FloatArray  # [n, G] likewise, for each gamma
    num_anchors: int

    def loss_of_hardest(self, fraction: float) -> FloatArray:
        """Return the share of the loss that the hardest `fraction` of the examples carries, [G], 0..1."""
        anchors = np.concatenate(([0.0], self.fraction_of_anchors))
        shares = [
            1 - np.interp(1 - fraction, anchors, np.concatenate(([0.0], column))) for column in self.fraction_of_loss.T
        ]
        return np.array(shares)


class LossDistribution:
    """Collects p_t of any number of anchors in constant memory, and tells how each gamma shares the loss among them.

    One p_t stands for an anchor. Of K sigmoids that is the one of the object's class, or of a background the one most
    wrongly believed in; the other K - 1, which RetinaNet's figure counts as examples of their own, are left out.

    The loss is FL = -(1 - p_t)^gamma log(p_t), RetinaNet eq. 4; alpha is a factor within each group and shares nothing.
    It falls with p_t whatever gamma is, so that one order of the anchors serves all: they are counted in bins of p_t's
    logit, 1/64 wide, and the curves are exact at the edges of the bins.

    Args:
        gammas: G of them, each 0..100.

    Raises:
        ConfigError: a gamma is out of its range.
    """

    def __init__(self, gammas: Sequence[float] = FIGURE_GAMMAS) -> None:
        if not all(0 <= gamma <= LARGEST_GAMMA for gamma in gammas):
            raise ConfigError(
                f"gammas is {list(gammas)}; each must be a number in 0..{LARGEST_GAMMA:g}, above which hardly anything "
                "counts any more.\nThe paper's figure has --gammas [0, 0.5, 1, 2]"
            )
        self.gammas = tuple(gammas)
        self.counts = torch.zeros(len(GROUPS), NUM_BINS, dtype=torch.float64)
        self.losses = torch.zeros(len(GROUPS), len(self.gammas), NUM_BINS, dtype=torch.float64)

    def update(self, labels: Tensor, true_probabilities: Tensor) -> None:
        """Add the anchors of a batch.

        Args:
            labels: [B, A] int64: 0..K-1, BACKGROUND, or IGNORE, which is not counted.
            true_probabilities: [B, A] p_t, 0..1.

        Raises:
            CheckpointError: a p_t that counts is NaN.
        """
        labels, p_t = labels.cpu(), true_probabilities.detach().cpu().double()
        num_nan = int((p_t.isnan() & (labels != IGNORE)).sum())
        if num_nan:
            raise CheckpointError(
                f"the detector's p_t of {num_nan:,} of a batch's {p_t.numel():,} anchors is NaN, which has no place on "
                "a curve.\nWith --trainer.precision 32-true nothing overflows; if it stays, the weights are not to be "
                "used: take an earlier checkpoint."
            )
        for group, members in enumerate((labels >= 0, labels == BACKGROUND)):
            p = p_t[members].clamp(min=torch.finfo(torch.float32).tiny)
            logits = torch.logit(p, eps=1e-15).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            bins = ((LARGEST_LOGIT - logits) * BINS_PER_LOGIT).long().clamp(max=NUM_BINS - 1)  # easiest first
            self.counts[group] += torch.bincount(bins, minlength=NUM_BINS)
            for row, gamma in enumerate(self.gammas):
                loss = -p.log() * (1 - p).pow(gamma)
                self.losses[group, row] += torch.bincount(bins, weights=loss, minlength=NUM_BINS)

    def curve(self, group: int) -> LossCurve | None:
        """Return the curve of GROUPS[group], or None if it has no anchors."""
        counts, losses = self.counts[group].numpy(), self.losses[group].numpy()
        filled = counts > 0
        if not filled.any():
            return None
        logits = LARGEST_LOGIT - np.arange(1, NUM_BINS + 1) / BINS_PER_LOGIT  # the lower edge of each bin
        cumulative = losses[:, filled].cumsum(axis=1)
        totals = np.maximum(cumulative[:, -1:], np.finfo(float).tiny)
        return LossCurve(
            p_t=1 / (1 + np.exp(-logits[filled])),
            fraction_of_anchors=counts[filled].cumsum() / counts.sum(),
            fraction_of_loss=(cumulative / totals).T,
            num_anchors=int(counts.sum()),
        )

    def curves(self) -> dict[str, LossCurve]:
        """Return the curve of each group that has anchors."""
        found = {name: self.curve(group) for group, name in enumerate(GROUPS)}
        return {name: curve for name, curve in found.items() if curve is not None}


def write_loss_curves(path: Path, curves: dict[str, LossCurve], gammas: Sequence[float]) -> None:
    """Write one row for each filled bin: group, p_t, share of the anchors, share of the loss for each gamma."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "p_t", "fraction_of_anchors", *(f"fraction_of_loss_gamma_{g:g}" for g in gammas)])
        for name, curve in curves.items():
            for p_t, anchors, losses in zip(curve.p_t, curve.fraction_of_anchors, curve.fraction_of_loss, strict=True):
                writer.writerow([name, *(f"{value:.8g}" for value in (p_t, anchors, *losses))])


def draw_loss_curves(path: Path, curves: dict[str, LossCurve], gammas: Sequence[float], title: str) -> None:
    """Draw positives and negatives side by side, as the paper's figure."""
    from matplotlib.figure import Figure  # half a second of import; without pyplot, which would look for a screen

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, curve) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        anchors = np.concatenate(([0.0], curve.fraction_of_anchors))
        for gamma, losses in zip(gammas, curve.fraction_of_loss.T, strict=True):
            axes.plot(anchors, np.concatenate(([0.0], losses)), label=f"γ = {gamma:g}")
        axes.set(
            title=f"{curve.num_anchors:,} {name[:-1]} anchors, by one p_t each",
            xlabel=f"fraction of {name}, easiest first",
            ylabel="cumulative normalised loss",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def format_loss_shares(curves: dict[str, LossCurve], gammas: Sequence[float]) -> str:
    """Return a table: how much of the loss the hardest examples carry."""
    columns = [(name, fraction) for name, fraction in (("positives", 0.1), ("negatives", 0.01), ("negatives", 0.001))]
    columns = [(name, fraction) for name, fraction in columns if name in curves]
    lines = ["share of the loss that the hardest ... carry", ""]
    lines.append("gamma" + "".join(f"{f'{fraction:.1%} of {name}':>20}" for name, fraction in columns))
    shares = [curves[name].loss_of_hardest(fraction) for name, fraction in columns]
    for row, gamma in enumerate(gammas):
        lines.append(f"{gamma:<5g}" + "".join(f"{share[row]:>20.1%}" for share in shares))
    return "\n".join(lines)
