"""Analysis of the classification loss: statistics of one batch, and the loss curves of RetinaNet figure 4."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onestage.errors import CheckpointError, require
from onestage.evaluation.figures import new_figure, save_figure
from onestage.files import atomic_write
from onestage.types import BACKGROUND, IGNORE, AnchorLosses

EASY = 0.9  # p_t of a negative above which it is easy: gamma 2 removes 99% of its loss
LOWEST_BACKGROUND = 0.8  # mean p_t of negatives before training: >= 0.96 with a prior of 0.01, <= 0.54 without
COUNTS = ("positives", "negatives", "ignored")
SHARES = ("loss_of_positives", "loss_of_easy_negatives", "loss_of_hard_negatives")
QUANTITIES = (*COUNTS, *SHARES, "p_t_of_positives")
FIGURE_GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)  # the four of the figure, and the largest that the paper trains with
LARGEST_GAMMA = 100.0  # as of the losses
GROUPS = ("positives", "negatives")
HARDEST = (("positives", 0.1), ("negatives", 0.01), ("negatives", 0.001))  # examples whose share of the loss is printed
LARGEST_LOGIT = 17.0  # of p_t: float32 has no probability between 1 - 6e-8 and 1
BINS_PER_LOGIT = 64
NUM_BINS = int(2 * LARGEST_LOGIT * BINS_PER_LOGIT)

FloatArray = npt.NDArray[np.float64]


@torch.no_grad()
def anchor_statistics(anchor_losses: AnchorLosses, strides: Tensor) -> dict[str, float]:
    """Return counts and loss shares of the anchors of a batch, in total and per level. Synchronises once.

    `anchors/<quantity>` and `anchors/stride_<px>/<quantity>`: counts of anchors, `loss_of_*` as fractions of the whole
    classification loss, and the mean `p_t_of_positives`. Undefined values are missing. strides: [A], px, of the levels.
    """
    labels, losses, p_t = anchor_losses
    is_positive, is_negative = labels >= 0, labels == BACKGROUND
    is_easy = is_negative & (p_t > EASY)
    parts = (is_positive, is_easy, is_negative & ~is_easy)
    counts = [mask.float() for mask in (is_positive, is_negative, labels == IGNORE)]
    sums = [torch.where(mask, losses.float(), 0.0) for mask in parts] + [torch.where(is_positive, p_t.float(), 0.0)]
    per_anchor = torch.stack([values.sum(dim=0) for values in counts + sums])  # [7, A]

    levels = torch.unique(strides)
    groups = torch.cat([torch.ones_like(strides, dtype=torch.bool)[None], strides == levels[:, None]])  # [1 + L, A]
    values = torch.where(groups[:, None], per_anchor, 0.0).sum(dim=-1)  # [1 + L, 7]
    loss, num_positives = values[:1, 3:6].sum(), values[:, :1]
    values = torch.cat([values[:, :3], values[:, 3:6] / loss, values[:, 6:] / num_positives], dim=1)
    places = ["anchors", *(f"anchors/stride_{stride:g}" for stride in levels.tolist())]
    return {
        f"{place}/{quantity}": value
        for place, row in zip(places, values.tolist(), strict=True)
        for quantity, value in zip(QUANTITIES, row, strict=True)
        if math.isfinite(value)
    }


@torch.no_grad()
def missing_prior(anchor_losses: AnchorLosses) -> str | None:
    """Return a warning if the first batch of an untrained detector shows a head without prior bias, else None.

    RetinaNet section 4.1 (arXiv:1708.02002). The criterion is the background's mean p_t, because alpha, gamma and the
    number of anchors change the size of the loss by powers of ten. A loss that mines few negatives needs no prior.
    """
    labels, losses, p_t = anchor_losses
    is_negative, total = labels == BACKGROUND, float(losses.sum())
    num_counted = int((is_negative & (losses > 0)).sum())
    background = float(p_t[is_negative].mean())  # NaN without negatives
    if num_counted <= is_negative.sum() / 2 or background >= LOWEST_BACKGROUND:
        return None
    return (
        f"The first classification loss is {total / max(1, int((labels >= 0).sum())):,.4g} per positive anchor, "
        f"{float(losses[is_negative].sum()) / total:.1%} of it from {num_counted:,} background anchors: the untrained "
        f"detector gives the background a mean probability of {background:.2f}; with a prior of 0.01 it is >= 0.96.\n"
        "Set the detector's prior to 0.01 (model.detector.init_args.prior); a head of your own starts its biases at "
        "classification_loss.prior_bias(num_classes, prior)."
    )


class LossCurve(NamedTuple):
    """The examples of one group, easiest first. n rows: the first n examples have a p_t >= `p_t`."""

    p_t: FloatArray  # [n]
    fraction_of_anchors: FloatArray  # [n] in [0, 1], ascending, the last is 1
    fraction_of_loss: FloatArray  # [n, G] the same, for each gamma
    num_anchors: int

    def points(self) -> tuple[FloatArray, list[FloatArray]]:
        """Return the fractions of the anchors, [n + 1] from 0 on, and for each gamma those of the loss."""
        return np.append(0.0, self.fraction_of_anchors), [np.append(0.0, column) for column in self.fraction_of_loss.T]

    def loss_of_hardest(self, fraction: float) -> FloatArray:
        """Return the share of the loss that the hardest `fraction` of the examples has, [G], in [0, 1]."""
        anchors, losses = self.points()
        return np.array([1 - np.interp(1 - fraction, anchors, column) for column in losses])


class LossDistribution:
    """Collect the p_t of any number of anchors in constant memory, and compute their loss shares per gamma.

    One p_t per anchor: of K sigmoids that of the object's class, or for background the one most wrong; RetinaNet's
    figure counts the other K - 1 as examples of their own. The loss is FL = -(1 - p_t)^gamma log(p_t), RetinaNet eq. 4;
    alpha cancels within each group. It falls with p_t for every gamma, so anchors are counted in bins of p_t's logit,
    1/64 wide; the curves are exact at their edges. gammas: G of them, each in [0, 100].
    """

    def __init__(self, gammas: Sequence[float] = FIGURE_GAMMAS) -> None:
        is_valid = all(0 <= gamma <= LARGEST_GAMMA for gamma in gammas)
        remedy = "The paper's figure has --gammas [0, 0.5, 1, 2]"
        require(is_valid, "gammas", list(gammas), f"numbers in [0, {LARGEST_GAMMA:g}]", remedy)
        self.gammas = tuple(gammas)
        self.counts = torch.zeros(len(GROUPS), NUM_BINS, dtype=torch.float64)
        self.losses = torch.zeros(len(GROUPS), len(self.gammas), NUM_BINS, dtype=torch.float64)

    def update(self, labels: Tensor, true_probabilities: Tensor) -> None:
        """Add labels and p_t of the anchors of a batch, both [B, A]; CheckpointError if the p_t of one is NaN."""
        labels, p_t = labels.cpu(), true_probabilities.detach().cpu().double()
        num_nan = int((p_t.isnan() & (labels != IGNORE)).sum())
        if num_nan:
            remedy = "Try --trainer.precision 32-true, where nothing overflows, or an earlier checkpoint."
            raise CheckpointError(f"p_t is NaN for {num_nan:,} of {p_t.numel():,} anchors of a batch.\n{remedy}")
        for group, members in enumerate((labels >= 0, labels == BACKGROUND)):
            p = p_t[members].clamp(min=torch.finfo(torch.float32).tiny)
            logits = torch.logit(p, eps=1e-15).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
            bins = ((LARGEST_LOGIT - logits) * BINS_PER_LOGIT).long().clamp(max=NUM_BINS - 1)  # easiest first
            self.counts[group] += torch.bincount(bins, minlength=NUM_BINS)
            for row, gamma in enumerate(self.gammas):
                loss = -p.log() * (1 - p).pow(gamma)
                self.losses[group, row] += torch.bincount(bins, weights=loss, minlength=NUM_BINS)

    def curves(self) -> dict[str, LossCurve]:
        """Return the curve of each group that has anchors."""
        logits = LARGEST_LOGIT - np.arange(1, NUM_BINS + 1) / BINS_PER_LOGIT  # the lower edge of each bin
        curves = {}
        for name, counts, losses in zip(GROUPS, self.counts.numpy(), self.losses.numpy(), strict=True):
            filled = counts > 0
            if filled.any():
                cumulative = losses[:, filled].cumsum(axis=1)
                curves[name] = LossCurve(
                    p_t=1 / (1 + np.exp(-logits[filled])),
                    fraction_of_anchors=counts[filled].cumsum() / counts.sum(),
                    fraction_of_loss=(cumulative / np.maximum(cumulative[:, -1:], np.finfo(float).tiny)).T,
                    num_anchors=int(counts.sum()),
                )
        return curves


def write_loss_curves(path: Path, curves: dict[str, LossCurve], gammas: Sequence[float]) -> None:
    """Write one row per filled bin: group, p_t, fraction of the anchors, fraction of the loss for each gamma."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "p_t", "fraction_of_anchors", *(f"fraction_of_loss_gamma_{g:g}" for g in gammas)])
        for name, curve in curves.items():
            for p_t, anchors, losses in zip(curve.p_t, curve.fraction_of_anchors, curve.fraction_of_loss, strict=True):
                writer.writerow([name, *(f"{value:.8g}" for value in (p_t, anchors, *losses))])


def draw_loss_curves(path: Path, curves: dict[str, LossCurve], gammas: Sequence[float], title: str) -> None:
    """Draw positives and negatives side by side, as in the paper's figure."""
    figure = new_figure(9, 4.2)
    figure.suptitle(title)
    for axes, (name, curve) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        anchors, columns = curve.points()
        for gamma, losses in zip(gammas, columns, strict=True):
            axes.plot(anchors, losses, label=f"γ = {gamma:g}")
        xlabel, ylabel = f"fraction of {name}, easiest first", "cumulative normalised loss"
        axes.set(title=f"{curve.num_anchors:,} {name}", xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    save_figure(path, figure)


def format_loss_shares(curves: dict[str, LossCurve], gammas: Sequence[float]) -> str:
    """Return a table of the loss share of the hardest examples."""
    columns = [(name, fraction) for name, fraction in HARDEST if name in curves]
    header = "gamma" + "".join(f"{f'{fraction:.1%} of {name}':>20}" for name, fraction in columns)
    shares = np.array([curves[name].loss_of_hardest(fraction) for name, fraction in columns]).T  # [G, columns]
    rows = [f"{g:<5g}" + "".join(f"{share:>20.1%}" for share in row) for g, row in zip(gammas, shares, strict=True)]
    return "\n".join(["share of the loss that the hardest ... carry", "", header, *rows])
