"""Figures of a run: precision-recall curves, the confusion matrix, training curves, the labels of a split."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onestage.evaluation.analysis import RECALLS, Analysis
from onestage.files import atomic_write
from onestage.types import AnnotationSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PR_FILE, CONFUSION_FILE, CURVES_FILE, LABELS_FILE = "pr_curves.png", "confusion.png", "curves.png", "labels.png"
MAX_CLASSES = 20  # drawn by name; of more classes those with the most objects
MAX_LETTERS = 20  # of a class name


def write_figures(folder: Path, analysis: Analysis, class_names: Sequence[str]) -> None:
    """Write pr_curves.png and, if there is a matrix, confusion.png, atomically. class_names: [K]."""
    save_figure(folder / PR_FILE, draw_precision_recall(analysis, class_names))
    if analysis.confusion:
        save_figure(folder / CONFUSION_FILE, draw_confusion(analysis, class_names))


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, inches."""
    from matplotlib.figure import Figure  # half a second of import; without pyplot, which would look for a screen

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_precision_recall(analysis: Analysis, class_names: Sequence[str]) -> "Figure":
    """Draw the interpolated curve of each class at IoU 0.5, worst class last in the legend, and their mean."""
    from matplotlib import colormaps

    shown = [label for label in _largest(analysis) if analysis.classes[label].num_objects]
    shown.sort(key=lambda label: -analysis.classes[label].ap50)
    palette = colormaps["tab10" if len(shown) <= 10 else "tab20"]  # every second of tab20 is pale
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for rank, label in enumerate(shown):
        one = analysis.classes[label]
        # The space: Matplotlib leaves out labels that start with an underscore.
        text, colour = f" {_name(class_names[label])}  {100 * one.ap50:.1f}", palette(rank)
        axes.plot(RECALLS["COCO"], one.precision, label=text, color=colour, linewidth=1.2)
    if shown:
        mean = f" all {sum(one.num_objects > 0 for one in analysis.classes)} classes  {100 * analysis.overall.ap50:.1f}"
        axes.plot(RECALLS["COCO"], analysis.overall.precision, label=mean, color="black", linewidth=2.5)
        figure.legend(loc="outside right upper", title="class  AP50", frameon=False)
    title = "Precision over recall at IoU 0.5"
    axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return figure


def draw_confusion(analysis: Analysis, class_names: Sequence[str]) -> "Figure":
    """Draw counts on shares of each object class; the last column is missed, the last row false alarms."""
    num_classes = len(class_names)
    rows = [*sorted(_largest(analysis)), num_classes]
    counts = np.array(analysis.confusion)[np.ix_(rows, rows)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(5.0, 2.2 + 0.5 * len(rows))
    figure = new_figure(side + 1, side)
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


Curves = dict[str, dict[str, list[tuple[float, float]]]]  # panel -> name -> points (step, value)


def training_curves(rows: Sequence[Mapping[str, str]], max_points: int = 300) -> Curves:
    """Return the curves of the rows of metrics.csv or epochs.csv: losses, learning rate and mAP, without empty ones.

    Of a longer curve, points next to each other are averaged.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, text in row.items():
            if text and math.isfinite(float(text)):
                columns.setdefault(name, []).append((float(row["step"]), float(text)))
    # The learning rates of the parameter groups are equal.
    rates = sorted(name for name in columns if name.startswith("lr"))[:1]
    losses = [name for name in columns if name.endswith("loss") and name.startswith(("train/", "val/"))]
    losses.sort(key=lambda name: (len(name), name))  # the sums first
    scores: list[str] = [name for name in ("val/mAP", "val/AP50", "val/AP75") if name in columns]
    panels = {"loss": losses, "learning rate": rates, "mAP": scores}
    return {panel: {name: _thinned(columns[name], max_points) for name in own} for panel, own in panels.items() if own}


def _thinned(points: list[tuple[float, float]], max_points: int) -> list[tuple[float, float]]:
    parts = np.array_split(np.array(points), min(max_points, len(points)))
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def draw_training(curves: Curves) -> "Figure":
    """Draw a panel for each group of curves."""
    figure = new_figure(5 * max(1, len(curves)), 4)
    for position, (panel, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), position)
        for name, points in lines.items():
            axes.plot(*np.array(points).T, label=name, linewidth=1.2, marker="." if len(points) < 30 else "")
        axes.set(title=panel, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_labels(annotations: AnnotationSet) -> "Figure":
    """Draw the objects of a split: how many of each class, how large, and where in the image their centres lie."""
    names, num_classes = annotations.class_names, len(annotations.class_names)
    counts = np.bincount(annotations.labels, minlength=num_classes)
    shown = np.argsort(-counts, kind="stable")[:MAX_CLASSES][::-1]
    figure = new_figure(15, 4.5)
    by_class, by_size, by_place = (figure.add_subplot(1, 3, position) for position in (1, 2, 3))
    by_class.barh([_name(names[label]) for label in shown], counts[shown])
    more = f" (of {num_classes})" if num_classes > len(shown) else ""
    by_class.set(title=f"objects of {len(shown)}{more} classes", xlabel="objects")
    sides = np.sqrt(np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1))
    by_size.hist(sides, bins=np.geomspace(sides.min(initial=8), sides.max(initial=512), 40).tolist())
    for bound in (32, 96):
        by_size.axvline(bound, color="black", linewidth=0.8, linestyle="--")
    by_size.set(title="sizes; dashed: COCO's 32 and 96 px", xlabel="square root of the area, px", xscale="log")
    sizes = annotations.sizes[:, ::-1].repeat(np.diff(annotations.box_offsets), axis=0)
    known = (sizes > 0).all(axis=1)  # not every annotation gives the size of its image
    centres = (annotations.boxes[known, :2] + annotations.boxes[known, 2:]) / 2 / sizes[known]
    by_place.hist2d(centres[:, 0], centres[:, 1], bins=40, range=[[0, 1], [0, 1]], cmap="Blues")
    by_place.set(title="centres", xlabel="x / width", ylabel="y / height", ylim=(1, 0), aspect="equal")
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
