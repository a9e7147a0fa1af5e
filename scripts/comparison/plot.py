"""Plot of a comparison: the mAP of every loss and seed."""

import statistics
from pathlib import Path

from comparison.rows import Row


def draw(plots: list[tuple[str, list[Row]]], path: Path) -> None:
    """Write one picture with a part for every title and its rows, the best on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(plots))
    lines = [plots[start : start + columns] for start in range(0, len(plots), columns)]
    heights = [0.9 + 0.3 * max(len(rows) for _, rows in line) for line in lines]
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(5.4 * columns, sum(heights)), height_ratios=heights, squeeze=False
    )
    for unused in axes.flat[len(plots) :]:
        unused.axis("off")
    for axis, (title, rows) in zip(axes.flat, plots, strict=False):
        for place, row in enumerate(reversed(rows)):
            values = [100 * value for value in row.metrics.get("mAP", [])]
            axis.plot(values, [place] * len(values), "o", color="#4477aa", alpha=0.55, markersize=5, mew=0)
            if values:
                axis.plot(statistics.mean(values), place, "|", color="#cc3311", markersize=13, mew=2)
        axis.set_yticks(range(len(rows)), [row.loss.replace("_", " ") for row in reversed(rows)])
        axis.set_xlabel("mAP, % (dots: seeds, red: their mean)")
        axis.set_title(title)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
