"""Pictures of an evaluation: precision-recall curves and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onestage.evaluation.analysis import Analysis
from onestage.evaluation.precision_recall import RECALLS
from onestage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PR_FILE, CONFUSION_FILE = "pr_curves.png", "confusion.png"
MAX_CLASSES = 20  # drawn by name; of more classes those with the most objects
MAX_LETTERS = 20  # of a class name


def write_figures(folder: Path, analysis: Analysis, class_names: Sequence[str]) -> None:
    """Write pr_curves.png and, if there is a matrix, confusion.png, atomically. class_names: [K]."""
    figures = {PR_FILE: draw_precision_recall(analysis, class_names)}
    if analysis.confusion:
        figures[CONFUSION_FILE] = draw_confusion(analysis, class_names)
    for name, figure in figures.items():
        with atomic_write(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def draw_precision_recall(analysis: Analysis, class_names: Sequence[str]) -> "Figure":
    """Draw the interpolated curve of each class at IoU 0.5, worst class last in the legend, and their mean."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # half a second of import; without pyplot, which would look for a screen

    shown = [label for label in _largest(analysis) if analysis.classes[label].num_objects]
    shown.sort(key=lambda label: -analysis.classes[label].ap50)
    palette = colormaps["tab10" if len(shown) <= 10 else "tab20"]  # every second of tab20 is pale
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for rank, label in enumerate(shown):
        one = analysis.classes[label]
        text, colour = f"{_name(class_names[label])}  {100 * one.ap50:.1f}", palette(rank)
        axes.plot(RECALLS["COCO"], one.precision, label=text, color=colour, linewidth=1.2)
    if shown:
        mean = f"all {sum(one.num_objects > 0 for one in analysis.classes)} classes  {100 * analysis.overall.ap50:.1f}"
        axes.plot(RECALLS["COCO"], analysis.overall.precision, label=mean, color="black", linewidth=2.5)
        figure.legend(loc="outside right upper", title="class  AP50", frameon=False)
    title = "Precision over recall at IoU 0.5"
    axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return figure


def draw_confusion(analysis: Analysis, class_names: Sequence[str]) -> "Figure":
    """Draw counts on shares of each object class; the last column is missed, the last row false alarms."""
    from matplotlib.figure import Figure

    num_classes = len(class_names)
    rows = [*sorted(_largest(analysis)), num_classes]
    counts = np.array(analysis.confusion)[np.ix_(rows, rows)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(5.0, 2.2 + 0.5 * len(rows))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the row", shrink=0.7)
    names = [_name(class_names[row]) for row in rows[:-1]]
    axes.set_xticks(range(len(rows)), [*names, "missed"], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [*names, "background"])
    for row, column in np.argwhere(counts > 0).tolist():
        ink = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=ink, fontsize=8)
    threshold = analysis.score_threshold
    at = "" if threshold is None else f", score >= {threshold:.2f}"
    axes.set(title=f"Objects (rows) and what was detected\nIoU >= 0.5{at}", xlabel="detected as", ylabel="object")
    return figure


def _largest(analysis: Analysis) -> list[int]:
    """Return the labels of the MAX_CLASSES classes with the most objects."""
    by_objects = sorted(range(len(analysis.classes)), key=lambda label: -analysis.classes[label].num_objects)
    return by_objects[:MAX_CLASSES]


def _name(name: str) -> str:
    """Return a class name as plain text of matplotlib, which reads $ as mathematics."""
    printable = "".join(letter if letter.isprintable() else " " for letter in name)
    short = printable if len(printable) <= MAX_LETTERS else printable[: MAX_LETTERS - 1] + "…"
    return short.replace("$", r"\$")
