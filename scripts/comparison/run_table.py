"""A table of all runs of a comparison, so that what a page says can be worked out again when the runs are gone."""

import csv
from pathlib import Path

from comparison import outcomes
from comparison.rows import read_runs

HEADER = ("data", "precision", "budget", "loss", "learning_rate", "box_weight", "seed")
METRICS = ("mAP", "AP50", "AP75")


def write(folder: Path, file: Path) -> None:
    """Write a line for every run below `folder` that was made: settings, metrics in percent, whether all was finite.

    A run that did not come to its end has no metrics.
    """
    with file.open("w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow([*HEADER, *METRICS, "finite", "commit"])
        for study in sorted(folder.glob("*/*/*")):
            for loss in sorted(path for path in study.iterdir() if path.is_dir()) if study.is_dir() else ():
                for (rate, box_weight), seed, outcome in read_runs(loss):
                    lines.writerow(
                        [*loss.relative_to(folder).parts, f"{rate:g}", f"{box_weight:g}", seed, *_results(outcome)]
                    )


def _results(outcome: outcomes.Outcome) -> list[str]:
    metrics = [outcome["metrics"].get(name) for name in METRICS]
    numbers = ["" if value is None else f"{100 * value:.3f}" for value in metrics]
    return [*numbers, "yes" if outcome["is_finite"] else "no", outcome.get("commit") or ""]
