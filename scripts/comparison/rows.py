"""Summaries of the finished runs of each loss, and the table of all runs."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import outcomes
from comparison.outcomes import Outcome
from onestage.files import atomic_write

TABLE_METRICS = ("mAP", "AP50", "AP75")
Setting = tuple[float, float]  # learning rate, box weight


@dataclass(frozen=True)
class Row:
    """Summary of the final runs of one loss."""

    loss: str
    rate: float
    box_weight: float
    tried_rates: tuple[float, ...]  # choices of rate and box weight
    tried_box_weights: tuple[float, ...]
    is_best_tried: bool  # False: a better setting has no final run yet
    seeds: tuple[int, ...]
    metrics: dict[str, list[float]]  # by name, one value per seed with a finished run
    per_class: dict[str, list[float]]
    steps_to_half: list[float]
    num_non_finite: int

    @property
    def mean_average_precision(self) -> float:
        """Mean over the seeds; 0 without any."""
        return statistics.mean(self.metrics.get("mAP") or [0.0])


def read_rows(folder: Path, settings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every loss with a final run, on another seed than the selection seed.

    Args:
        folder: of comparable runs.
        settings: its study.json.
    """
    rows = []
    for loss in losses_in(folder):
        counting: dict[Setting, dict[int, Outcome]] = defaultdict(dict)
        for setting, seed, outcome in read_runs(folder / loss):
            if seed != settings["selection_seed"]:
                counting[setting][seed] = outcome
        if counting:
            rows.append(_row(loss, _tried(loss, folder, settings), counting))
    return rows


def losses_never_finished(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the losses without a finished run on the selection seed."""
    losses = losses_in(_chosen_folder(folder, settings))
    tried = {loss: _tried(loss, folder, settings) for loss in losses}
    return [loss for loss, scores in tried.items() if scores and set(scores.values()) == {None}]


def _tried(loss: str, folder: Path, settings: Mapping[str, Any]) -> dict[Setting, float | None]:
    """Return the score of every setting tried on the selection seed."""
    return {
        setting: outcomes.score(outcome)
        for setting, seed, outcome in read_runs(_chosen_folder(folder, settings) / loss)
        if seed == settings["selection_seed"]
    }


def losses_in(folder: Path) -> list[str]:
    """Return the losses that have runs here."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _chosen_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder of the runs that chose rates and box weights; the same by default."""
    name = folder.name.replace(f"{settings['epochs']}_epochs", f"{settings['chosen_epochs']}_epochs")
    return folder.parent.parent / settings["chosen_precision"] / name


def read_runs(folder: Path) -> list[tuple[Setting, int, Outcome]]:
    """Return setting, seed and outcome of every run."""
    found = []
    for file in sorted(folder.glob("lr_*_box_*_seed_*/outcome.json")):
        _, rate, _, weight, _, seed = file.parent.name.split("_")
        outcome = outcomes.read(file)
        if outcome is not None:
            found.append(((float(rate), float(weight)), int(seed), outcome))
    return found


def _row(loss: str, tried: dict[Setting, float | None], counting: dict[Setting, dict[int, Outcome]]) -> Row:
    scores = {setting: -1.0 if score is None else score for setting, score in tried.items()}
    chosen = max(counting, key=lambda setting: (scores.get(setting, -1.0), len(counting[setting])))
    found = counting[chosen]
    metrics, per_class = defaultdict(list), defaultdict(list)
    for outcome in found.values():
        for name, value in outcome["metrics"].items():
            metrics[name].append(value if value is not None else 0.0)
        for name, value in outcome["per_class"].items():
            per_class[name].append(value if value is not None else 0.0)
    steps = [steps_to_half(outcome["curve"]) for outcome in found.values() if outcome["metrics"]]
    return Row(
        loss,
        *chosen,
        tried_rates=tuple(sorted({rate for rate, _ in tried or [chosen]})),
        tried_box_weights=tuple(sorted({weight for _, weight in tried or [chosen]})),
        is_best_tried=scores.get(chosen, -1.0) >= max(scores.values(), default=-1.0),
        seeds=tuple(sorted(found)),
        metrics=dict(metrics),
        per_class=dict(per_class),
        steps_to_half=[step for step in steps if step is not None],
        num_non_finite=sum(not outcome["is_finite"] for outcome in found.values()),
    )


def steps_to_half(curve: list[list[float]]) -> float | None:
    """Return the step at which the curve [step, mAP] first reaches half of its last value, between points by a line.

    None: the curve has no point.
    """
    if not curve:
        return None
    half = curve[-1][1] / 2
    before_step, before = 0.0, 0.0
    for step, value in curve:
        if value >= half:
            share = (half - before) / (value - before) if value > before else 1.0
            return before_step + share * (step - before_step)
        before_step, before = step, value
    return before_step


def write_table(folder: Path, file: Path) -> None:
    """Write a CSV line for every run below `folder`: settings, metrics in percent, whether all numbers were finite."""
    header = ("data", "precision", "budget", "loss", "learning_rate", "box_weight", "seed")
    with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        lines.writerow([*header, *TABLE_METRICS, "finite", "commit"])
        for study in sorted(path for path in folder.glob("*/*/*") if path.is_dir()):
            for loss in losses_in(study):
                place = (study / loss).relative_to(folder).parts
                for (rate, box_weight), seed, outcome in read_runs(study / loss):
                    values = [outcome["metrics"].get(name) for name in TABLE_METRICS]
                    numbers = ["" if value is None else f"{100 * value:.3f}" for value in values]
                    is_finite = "yes" if outcome["is_finite"] else "no"
                    commit = outcome.get("commit") or ""
                    lines.writerow([*place, f"{rate:g}", f"{box_weight:g}", seed, *numbers, is_finite, commit])
