"""The page about a comparison: a table and a plot for each data set, from what the finished runs left behind."""

import json
import platform
import statistics
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.plan import REPOSITORY
from onestage.evaluation.report import installed_versions

PAGE, PLOT = "loss_comparison.md", "images/loss_comparison.png"


@dataclass(frozen=True)
class Row:
    """What the counting runs of one loss say together."""

    loss: str
    rate: float
    box_weight: float
    metrics: dict[str, list[float]]  # by name, one value for each seed
    per_class: dict[str, list[float]]
    steps_to_half: list[float]
    num_runs: int
    num_non_finite: int

    @property
    def mean_average_precision(self) -> float:
        """Mean over the seeds; 0 without any."""
        return statistics.mean(self.metrics.get("mAP") or [0.0])


def write(folder: Path, target: Path) -> None:
    """Write the page and its plot below `target` from all runs below `folder`."""
    studies = sorted(folder.glob("*/*/*/study.json"))
    sections, plots = [], []
    for file in studies:
        settings = json.loads(file.read_text(encoding="utf-8"))
        rows = sorted(read_rows(file.parent, settings), key=lambda row: -row.mean_average_precision)
        if any(row.metrics for row in rows):
            sections.append(_section(settings, rows, _step_times(folder)))
            plots.append((_title(settings), rows))
    target.mkdir(parents=True, exist_ok=True)
    if not sections:
        print(f"no finished runs below {folder}")
        return
    _draw(plots, target / PLOT)
    (target / PAGE).write_text("\n\n".join([_header(), *sections]) + "\n", encoding="utf-8")
    print(f"report: {target / PAGE}")


def read_rows(folder: Path, settings: dict[str, Any]) -> list[Row]:
    """Gather the outcomes of the seeds that count, loss by loss."""
    rows = []
    for loss in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        outcomes = defaultdict(list)
        for file in sorted((folder / loss).glob("lr_*_box_*_seed_*/outcome.json")):
            _, rate, _, weight, _, seed = file.parent.name.split("_")
            if int(seed) in settings["seeds"]:
                outcomes[float(rate), float(weight)].append(json.loads(file.read_text(encoding="utf-8")))
        rows += [_row(loss, rate, weight, found) for (rate, weight), found in outcomes.items()]
    return rows


def _row(loss: str, rate: float, box_weight: float, outcomes: list[dict[str, Any]]) -> Row:
    metrics, per_class = defaultdict(list), defaultdict(list)
    for outcome in outcomes:
        for name, value in outcome["metrics"].items():
            metrics[name].append(value if value is not None else 0.0)
        for name, value in outcome["per_class"].items():
            per_class[name].append(value if value is not None else 0.0)
    return Row(
        loss,
        rate,
        box_weight,
        dict(metrics),
        dict(per_class),
        [steps_to_half(outcome["curve"]) for outcome in outcomes if outcome["metrics"]],
        len(outcomes),
        sum(not outcome["is_finite"] for outcome in outcomes),
    )


def steps_to_half(curve: list[list[float]]) -> float:
    """Return the step at which the curve [step, mAP] first reaches half of its last value, between points by a line."""
    half = curve[-1][1] / 2
    before_step, before = 0.0, 0.0
    for step, value in curve:
        if value >= half:
            share = (half - before) / (value - before) if value > before else 1.0
            return before_step + share * (step - before_step)
        before_step, before = step, value
    return before_step


def _step_times(folder: Path) -> dict[str, float]:
    file = folder / "step_times.json"
    times: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return times


def _header() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    return (
        "# The losses compared: the numbers\n\n"
        "Written by `python scripts/compare_losses.py --report docs`; what they mean stands in "
        "[focal_loss.md](focal_loss.md).\n\n"
        f"Commit {commit}; {_processor()}; {versions}.\n\n"
        "Every loss: the same images in the same order, the same weights at the start, its own best of the same box "
        "loss weights and learning rates, chosen on a seed that is not among those shown. mAP and AP50 are of the last "
        "weights, mean over seeds (lowest to highest), in percent. A non-finite run is one with a loss, gradient or "
        "weight that is NaN or infinite at any step.\n\n"
        f"![mAP of every loss and seed]({PLOT})"
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def _title(settings: dict[str, Any]) -> str:
    return f"{settings['data']}, {settings['precision']}, {settings['epochs']} epochs"


def _section(settings: dict[str, Any], rows: list[Row], step_times: dict[str, float]) -> str:
    command = f"python scripts/compare_losses.py {settings['options']}"
    seeds = ", ".join(str(seed) for seed in settings["seeds"])
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    weights = ", ".join(f"{weight:g}" for weight in settings["box_weights"])
    classes = list(next(row.per_class for row in rows if row.per_class))
    lines = [
        f"## {_title(settings)}",
        f"`{command}`: seeds {seeds}; chosen on seed {settings['selection_seed']}{_chosen_elsewhere(settings)} from "
        f"box weights {weights} and learning rates {rates}. {_noise(rows)}",
        "| loss | learning rate | box weight | mAP | AP50 | steps to half of the mAP | step time | non-finite runs |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(_cells(row, step_times) for row in rows),
        "AP by class, mean over seeds, in percent:",
        f"| loss | {' | '.join(classes)} |\n|---{'|---' * len(classes)}|\n"
        + "\n".join(
            f"| {row.loss} | "
            + " | ".join(f"{100 * statistics.mean(row.per_class[name]):.1f}" for name in classes)
            + " |"
            for row in rows
            if row.per_class
        ),
    ]
    return "\n\n".join(lines)


def _chosen_elsewhere(settings: dict[str, Any]) -> str:
    chosen, own = ((settings[f"{kind}precision"], settings[f"{kind}epochs"]) for kind in ("chosen_", ""))
    return "" if chosen == own else f", in {chosen[0]} and {chosen[1]} epochs,"


def _cells(row: Row, step_times: dict[str, float]) -> str:
    time = f"x{step_times[row.loss]:.2f}" if row.loss in step_times else ""
    half = f"{statistics.mean(row.steps_to_half):.0f}" if row.steps_to_half else ""
    cells = [
        row.loss,
        f"{row.rate:g}",
        f"{row.box_weight:g}",
        _spread(row.metrics.get("mAP", [])),
        _spread(row.metrics.get("AP50", [])),
        half,
        time,
        f"{row.num_non_finite} of {row.num_runs}",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean, low, high = (100 * value for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _noise(rows: list[Row]) -> str:
    """Say how far apart two losses have to be: two standard errors of a difference of means, seeds pooled."""
    groups = [row.metrics["mAP"] for row in rows if len(row.metrics.get("mAP", [])) > 1]
    if not groups:
        return "One seed: differences say nothing."
    pooled = statistics.mean(statistics.variance(group) for group in groups) ** 0.5
    num_seeds = min(len(group) for group in groups)
    margin = 2 * pooled * (2 / num_seeds) ** 0.5
    means = [row.mean_average_precision for row in rows]
    return (
        f"The standard deviation over seeds, pooled over the losses, is {100 * pooled:.1f} points of mAP, so two means "
        f"of {num_seeds} seeds that differ by less than {100 * margin:.1f} are not told apart; the losses span "
        f"{100 * (max(means) - min(means)):.1f}."
    )


def _draw(plots: list[tuple[str, list[Row]]], path: Path) -> None:
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
