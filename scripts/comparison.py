"""The page of a comparison of losses: a table for each group of trainings, and one picture of several groups."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REFERENCES = ("mining", "cross_entropy")


class Cell(NamedTuple):
    """The trainings of one loss under one condition."""

    by_seed: dict[int, float]  # mAP, %; a training that met non-finite numbers counts as 0
    background_per_positive: float

    @property
    def mean(self) -> float:
        """Mean mAP, %."""
        return statistics.mean(self.by_seed.values())


class Gain(NamedTuple):
    """By how much the first loss of a group is above another under one condition."""

    condition: str
    background_per_positive: float
    points: float  # of mAP, mean over the seeds that both have
    num_seeds: int

    def deviation(self, noise: float) -> float:
        """Standard deviation of `points`, from that of one training."""
        return noise * math.sqrt(2 / self.num_seeds)


Table = list[dict[str, str]]
Cells = dict[tuple[str, str], Cell]  # by loss and condition; those of a group are without its losses' own settings


def joined(condition: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return the settings of a condition and of a loss as they stand in a table."""
    return json.dumps(condition | settings, sort_keys=True)


def write_page(plan: dict[str, Any], table: Table, folder: Path) -> None:
    """Write loss_comparison.md and, of the groups that name a `series`, images/loss_comparison.png.

    The trainings of a group with `apart`, whose seeds served to choose settings, are shown in its table alone.
    """
    apart = {seed for group in plan["groups"].values() if group.get("apart") for seed in group["seeds"]}
    cells_apart = gather([row for row in table if int(row["seed"]) in apart])
    cells = gather([row for row in table if int(row["seed"]) not in apart])
    noise = paired_deviation(_compared(plan, cells))
    sections, shown, series = list[str](), set[tuple[str, str, bool]](), dict[str, Cells]()
    for name, group in plan["groups"].items():
        is_apart = group.get("apart", False)
        conditions = {joined(one, {}): one for one in group.get("conditions", [{}])}
        keys = {(loss, text): _key(group, loss, one) for loss in group["losses"] for text, one in conditions.items()}
        own = cells_apart if is_apart else cells
        found = {short: own[key] for short, key in keys.items() if key in own}
        made = {(*keys[short], is_apart) for short in found}
        if made <= shown:  # no training yet, or further seeds of another group's
            continue
        shown |= made
        losses = [loss for loss in group["losses"] if any(loss == one for one, _ in found)]
        texts = [text for text in conditions if any(text == one for _, one in found)]
        titles = {loss: _title(loss, group["losses"][loss]) for loss in losses}
        sections.append(f"## {name.replace('_', ' ').capitalize()}\n\n{group.get('question', '').strip()}\n")
        sections.append(format_table(found, titles, texts))
        if "series" in group:
            series[group["series"]] = found
    if series and noise is not None:
        picture = "images/loss_comparison.png"
        draw_gains(series, noise, folder / picture)
        title = "mAP of the first loss minus that of the others, against the imbalance"
        about_gains = "The same in numbers; bold is beyond noise.\n"
        sections[:0] = [f"![{title}]({picture})\n", about_gains, format_gains(series, noise)]
    about = f"{plan.get('about', '').strip()}\n\n{_about_noise(noise, len(table))}"
    source = f"Written from `{Path(plan['table']).name}` by `scripts/compare_losses.py --report`."
    page = folder / "loss_comparison.md"
    page.write_text(
        "\n".join(["# The losses compared: the numbers\n", source, f"{about}\n", *sections]), encoding="utf-8"
    )


def gather(table: Table) -> Cells:
    """Return the cells of a table; the seeds of all groups that share loss and condition come together."""
    rows = defaultdict(list)
    for row in table:
        rows[row["loss"], row["condition"]].append(row)
    return {
        key: Cell(
            {int(row["seed"]): 100 * float(row["mAP"] or 0) for row in found},
            statistics.mean(float(row["background_per_positive"]) for row in found),
        )
        for key, found in rows.items()
    }


def _key(group: dict[str, Any], loss: str, condition: dict[str, Any]) -> tuple[str, str]:
    return loss, joined(condition, group["losses"][loss])


def _compared(plan: dict[str, Any], cells: Cells) -> list[list[Cell]]:
    """Return the cells of several seeds that stand side by side in a row of some group, each such set once."""
    several = {key for key, cell in cells.items() if len(cell.by_seed) > 1}
    rows = [
        frozenset(_key(group, loss, condition) for loss in group["losses"]) & several
        for group in plan["groups"].values()
        for condition in group.get("conditions", [{}])
    ]
    return [[cells[key] for key in sorted(row)] for row in dict.fromkeys(rows)]


def paired_deviation(rows: Iterable[list[Cell]]) -> float | None:
    """Return the standard deviation of a training beside the others of its seed, in points of mAP, pooled over rows.

    The trainings of one seed share images, their order and the initial weights, so a seed moves all losses of a row
    together. That part is removed: what is left are the residuals of a table of losses and seeds.
    """
    squares, freedom = 0.0, 0
    for row in rows:
        seeds = sorted(set.intersection(*(set(cell.by_seed) for cell in row))) if row else []
        table = np.array([[cell.by_seed[seed] for seed in seeds] for cell in row])
        if min(len(row), len(seeds)) > 1:
            residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
            squares += float((residuals**2).sum())
            freedom += (len(row) - 1) * (len(seeds) - 1)
    return math.sqrt(squares / freedom) if freedom else None


def format_table(cells: Cells, losses: dict[str, str], conditions: list[str]) -> str:
    """Return a Markdown table: a row for each condition, a column for each loss and its title.

    A seed moves all losses of a row, so the best over the seeds that all its cells have is bold.
    """
    head = ["condition", "background per positive", *losses.values()]
    lines = [head, ["---"] * len(head)]
    for condition in conditions:
        found = {loss: cells[loss, condition] for loss in losses if (loss, condition) in cells}
        seeds = set.intersection(*(set(cell.by_seed) for cell in found.values()))
        means = {loss: statistics.mean(cell.by_seed[seed] for seed in seeds) for loss, cell in found.items() if seeds}
        best = {loss for loss, mean in means.items() if len(found) > 1 and mean == max(means.values())}
        has_more = any(len(cell.by_seed) > 1 for cell in found.values())
        ratio = statistics.mean(cell.background_per_positive for cell in found.values())
        words = [_format_cell(found[loss], loss in best, has_more) if loss in found else "" for loss in losses]
        lines.append([describe(condition), f"{ratio:.0f}", *words])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def describe(condition: str) -> str:
    """Return the settings of a condition by the last part of their keys, without paths and lists."""
    words = []
    for key, value in json.loads(condition).items():
        *_, name = key.split(".")
        if name != "path":
            words.append(name if isinstance(value, list) else f"{name} {_short(value)}")
    return ", ".join(words) or "as configured"


def _short(value: Any) -> Any:
    value = value.get("class_path", value) if isinstance(value, dict) else value
    if not isinstance(value, str):
        return value
    return Path(value).stem if "/" in value else value.split(".")[-1]


def gains(cells: Cells, reference: str) -> list[Gain]:
    """Return the gains of a group's first loss over another, in the order of the imbalance."""
    first, found = next(iter(cells))[0], []
    for (loss, condition), one in cells.items():
        other = cells.get((reference, condition))
        if loss == first != reference and other and (seeds := one.by_seed.keys() & other.by_seed.keys()):
            points = statistics.mean(one.by_seed[seed] - other.by_seed[seed] for seed in seeds)
            found.append(Gain(condition, one.background_per_positive, points, len(seeds)))
    return sorted(found, key=lambda gain: gain.background_per_positive)


def format_gains(series: dict[str, Cells], noise: float) -> str:
    """Return the gains of all groups as a Markdown table; bold: beyond two standard deviations."""
    head = ["series", "condition", "background per positive", *(f"minus {_title(name, {})}" for name in REFERENCES)]
    lines = [head, ["---"] * len(head)]
    for label, cells in series.items():
        rows = dict[str, list[str]]()
        for column, reference in enumerate(REFERENCES, 3):
            for gain in gains(cells, reference):
                start = [label, describe(gain.condition), f"{gain.background_per_positive:.0f}"]
                row = rows.setdefault(gain.condition, start + [""] * len(REFERENCES))
                row[column] = _format_gain(gain, noise)
        lines += rows.values()
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_gains(series: dict[str, Cells], noise: float, path: Path) -> None:
    """Draw by how much the first loss of each group is above the references, against the imbalance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(REFERENCES), figsize=(11, 4.7), sharey=True, layout="constrained")
    for axis, reference in zip(axes, REFERENCES, strict=True):
        for number, (label, cells) in enumerate(series.items()):
            first = next(iter(cells))[0]
            if found := gains(cells, reference):
                x, y, errors = zip(
                    *((gain.background_per_positive, gain.points, gain.deviation(noise)) for gain in found), strict=True
                )
                axis.errorbar(x, y, errors, fmt="o-", color=f"C{number}", capsize=3, linewidth=1, label=label)
        axis.axhline(0, color="#888888", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("background anchors for each positive one")
        axis.set_title(f"{first} minus {reference}".replace("_", " "))
        axis.grid(color="#dddddd")
    axes[0].set_ylabel("difference of mAP, points (bars: 1 SD)")
    drawn = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend([*drawn.values()], [*drawn], loc="outside lower center", ncols=min(len(series), 3), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(loss: str, settings: dict[str, Any]) -> str:
    own = f" ({describe(joined(settings, {}))})" if settings else ""
    return loss.replace("_", " ") + own


def _format_cell(cell: Cell, is_best: bool, names_seed: bool) -> str:
    text = f"{cell.mean:.1f}"
    if len(cell.by_seed) > 1:
        text += f" ({min(cell.by_seed.values()):.1f} to {max(cell.by_seed.values()):.1f})"
    elif names_seed:
        text += f" (seed {next(iter(cell.by_seed))})"
    return f"**{text}**" if is_best else text


def _format_gain(gain: Gain, noise: float) -> str:
    text = f"{gain.points:+.1f}"
    text = f"**{text}**" if abs(gain.points) > 2 * gain.deviation(noise) else text
    return f"{text} ({gain.num_seeds} seeds)" if gain.num_seeds > 1 else text


def _about_noise(noise: float | None, number: int) -> str:
    text = (
        f"{number} trainings. Each cell is the mAP in percent: of one seed, or the mean of several (lowest to "
        "highest). Bold is the best of a row over the seeds that all its cells have."
    )
    if noise is None:
        return f"{text} No condition has several seeds, so the noise is unknown."
    return (
        f"{text} Beside the other losses of its seed, a training varies by {noise:.1f} points (standard deviation, "
        f"pooled): two trainings of one seed that differ by less than {2 * noise * math.sqrt(2):.1f} are equal within "
        f"noise, two means over three seeds by less than {2 * noise * math.sqrt(2 / 3):.1f}. "
        "`as_configured` is the loss of the plan's configuration."
    )
