"""The page of a comparison: a table and a plot for each data set, from finished runs."""

import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from comparison import origin, plan, plot
from comparison.rows import Row, losses_in, losses_never_finished, read_rows, write_table
from comparison.step_time import StepTimes, read_step_times
from onestage.evaluation.results import installed_versions
from onestage.files import atomic_write

PAGE = "loss_comparison"


def write(folder: Path, target: Path, page: str = PAGE) -> None:
    """Write `<page>.md`, `images/<page>.png` and `<page>.csv` below `target` from all runs below `folder`."""
    times = read_step_times(folder / "step_times.json")
    sections, plots = [], []
    for file in sorted(folder.glob("*/*/*/study.json")):
        settings = json.loads(file.read_text(encoding="utf-8"))
        rows = sorted(read_rows(file.parent, settings), key=lambda row: -row.mean_average_precision)
        if any(row.metrics for row in rows):
            sections.append(_section(file.parent, settings, rows, times))
            plots.append((_title(settings), rows))
    target.mkdir(parents=True, exist_ok=True)
    if not sections:
        print(f"no finished runs below {folder}")
        return
    plot.draw(plots, target / "images" / f"{page}.png")
    write_table(folder, target / f"{page}.csv")
    with atomic_write(target / f"{page}.md") as temporary:
        text = "\n\n".join([_header(folder, times, page), *sections])
        temporary.write_text(f"{text}\n", encoding="utf-8")
    print(f"report: {target / f'{page}.md'}")


def _header(folder: Path, times: StepTimes | None, page: str) -> str:
    call = "--report docs" if page == PAGE else f"--report docs --page {page}"
    return (
        "# The losses compared: the numbers\n\n"
        f"Written by `python scripts/compare_losses.py {call}`; see "
        f"[focal_loss.md](focal_loss.md) for their meaning. Every run, selection runs included, is a line of "
        f"[{page}.csv]({page}.csv).\n\n"
        f"{_origins(folder)}\n\n"
        "Every loss has the same images in the same order, the same initial weights, and its own best of the given box "
        "loss weights and learning rates, chosen on a seed that is not shown. mAP and AP50 are those of the last "
        "weights, mean over seeds (lowest to highest), in percent. A run is non-finite if a loss, gradient or weight "
        f"is NaN or infinite at any step.{f' {times.explanation}' if times else ''}\n\n"
        f"![mAP of every loss and seed](images/{page}.png)"
    )


def _origins(folder: Path) -> str:
    """List commits, machines and versions of the outcomes; the current ones where an outcome has none."""
    found = [
        json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*/*/*/*/lr_*_box_*_seed_*/outcome.json")
    ]
    here = f"{origin.head(folder) or 'unknown'} (checked out now; the runs name none)"
    versions = [outcome.get("versions") or installed_versions() for outcome in found]
    parts = (
        _counted("Commit", [outcome.get("commit") or here for outcome in found]),
        _counted("machine", [outcome.get("machine") or origin.machine() for outcome in found]),
        _counted("versions", [", ".join(f"{name} {number}" for name, number in one.items()) for one in versions]),
    )
    return "; ".join(parts) + "."


def _counted(what: str, values: list[str]) -> str:
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return f"{what}: {counts[0][0]}"
    return f"{what}: " + ", ".join(f"{value} in {count} run{'s' if count > 1 else ''}" for value, count in counts)


def _title(settings: dict[str, Any]) -> str:
    parts = [settings["data"], settings["precision"], f"{settings['epochs']} epochs"]
    if not _is_default_config(settings):
        parts.append(Path(settings["config"]).stem)
    return ", ".join(parts)


def _is_default_config(settings: dict[str, Any]) -> bool:
    return plan.REPOSITORY / settings["config"] == plan.DEFAULT_CONFIG


def _section(folder: Path, settings: dict[str, Any], rows: list[Row], times: StepTimes | None) -> str:
    lines = [
        f"## {_title(settings)}",
        f"The detector and its training are those of `{settings['config']}`. {_noise(rows)}",
        _calls(folder, settings, rows),
        *_missing(folder, settings, rows),
        "| loss | learning rate | box weight | mAP | AP50 | steps to half of the mAP | step time | non-finite runs |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(_cells(row, times) for row in rows),
    ]
    classes = list(next((row.per_class for row in rows if row.per_class), {}))
    if classes:
        lines += ["AP by class, mean over seeds, in percent:", _class_table(rows, classes)]
    return "\n\n".join(lines)


def _calls(folder: Path, settings: dict[str, Any], rows: list[Row]) -> str:
    """List the commands that make these runs, one for all losses with the same choices."""
    groups: dict[tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for row in rows:
        groups[row.tried_rates, row.tried_box_weights, row.seeds].append(row.loss)
    told = []
    for (rates, box_weights, seeds), losses in groups.items():
        tried = f"box weights {_joined(', ', box_weights)} and learning rates {_joined(', ', rates)}"
        command = _command(folder, settings, sorted(losses), rates, box_weights, seeds)
        told.append(
            f"`{command}`: seeds {_joined(', ', seeds)}; chosen on seed {settings['selection_seed']}"
            f"{_chosen_elsewhere(settings)} from {tried}."
        )
    return told[0] if len(told) == 1 else "\n".join(f"- {one}" for one in told)


def _command(
    folder: Path,
    settings: dict[str, Any],
    losses: list[str],
    rates: tuple[float, ...],
    box_weights: tuple[float, ...],
    seeds: tuple[int, ...],
) -> str:
    """Return the command that makes the same runs again."""
    images = re.match(r"(\d+)_and_(\d+)_images_", folder.name)
    words = ["python scripts/compare_losses.py"]
    words.append(
        "--num_train {} --num_val {}".format(*images.groups()) if images else f"--data path/to/{settings['data']}"
    )
    if not _is_default_config(settings):
        words.append(f"--config {settings['config']}")
    if tuple(losses) != plan.all_losses():
        words.append(f"--losses {' '.join(losses)}")
    words.append(f"--precision {settings['precision']} --epochs {settings['epochs']}")
    if _chosen_elsewhere(settings):
        words.append(f"--chosen_precision {settings['chosen_precision']} --chosen_epochs {settings['chosen_epochs']}")
    words.append(f"--box_weights {_joined(' ', box_weights)} --rates {_joined(' ', rates)}")
    words.append(f"--selection_seed {settings['selection_seed']} --seeds {_joined(' ', seeds)}")
    return " ".join(words)


def _joined(between: str, numbers: tuple[float, ...]) -> str:
    return between.join(f"{number:g}" for number in numbers)


def _chosen_elsewhere(settings: dict[str, Any]) -> str:
    chosen, own = ((settings[f"{kind}precision"], settings[f"{kind}epochs"]) for kind in ("chosen_", ""))
    return "" if chosen == own else f", in {chosen[0]} and {chosen[1]} epochs,"


def _missing(folder: Path, settings: dict[str, Any], rows: list[Row]) -> list[str]:
    """List losses without a row, and losses whose row is not their best setting."""
    without = sorted({*losses_in(folder), *losses_never_finished(folder, settings)} - {row.loss for row in rows})
    behind = sorted(row.loss for row in rows if not row.is_best_tried)
    told = []
    if without:
        told.append(f"Without a final run: {', '.join(without)}.")
    if behind:
        told.append(f"Not at the best setting tried, which has no final run: {', '.join(behind)}.")
    return told


def _cells(row: Row, times: StepTimes | None) -> str:
    cells = [
        row.loss,
        f"{row.rate:g}",
        f"{row.box_weight:g}",
        _spread(row.metrics.get("mAP", [])),
        _spread(row.metrics.get("AP50", [])),
        f"{statistics.mean(row.steps_to_half):.0f}" if row.steps_to_half else "",
        times.cell(row.loss) if times else "",
        f"{row.num_non_finite} of {len(row.seeds)}",
    ]
    return f"| {' | '.join(cells)} |"


def _class_table(rows: list[Row], classes: list[str]) -> str:
    lines = [f"| loss | {' | '.join(classes)} |", f"|---{'|---' * len(classes)}|"]
    for row in rows:
        if row.per_class:
            averages = [f"{100 * statistics.mean(row.per_class[name]):.1f}" for name in classes]
            lines.append(f"| {row.loss} | {' | '.join(averages)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean, low, high = (100 * value for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _noise(rows: list[Row]) -> str:
    """State the significant difference: two standard errors of a difference of means, seeds pooled."""
    groups = [row.metrics["mAP"] for row in rows if len(row.metrics.get("mAP", [])) > 1]
    if not groups:
        return "One seed only: differences are not significant."
    pooled = statistics.mean(statistics.variance(group) for group in groups) ** 0.5
    num_seeds = min(len(group) for group in groups)
    margin = 2 * pooled * (2 / num_seeds) ** 0.5
    means = [row.mean_average_precision for row in rows]
    return (
        f"The standard deviation over seeds, pooled over the losses, is {100 * pooled:.1f} points of mAP, so a "
        f"difference of less than {100 * margin:.1f} between means of {num_seeds} seeds is not significant; the losses "
        f"span {100 * (max(means) - min(means)):.1f}."
    )
