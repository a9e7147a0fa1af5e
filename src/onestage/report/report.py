"""The command `onestage report`: one HTML page about a run, or about several side by side."""

import base64
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from zipfile import BadZipFile

import jinja2
import yaml

from onestage.errors import ConfigError, DataError, require
from onestage.files import atomic_write, printable, read_rows, read_text
from onestage.types import JSONDict

# What imports torch is imported inside of the functions, so that --help answers at once.

DATA_FOLDER, FACTS_FILE, MATCHES_FILE = "report", "facts.json", "matches.npz"
PAGE_FILE, COMPARISON_FILE = "report.html", "comparison.html"
TEMPLATE = Path(__file__).with_name("page.html")
MAX_BYTES = 100_000_000  # of a file of a run
MAX_CLASSES = 20  # with a curve of their own, and in the confusion matrix: those with the most objects
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 230, 44, 8, 8, 24  # of a chart and around its axes, in its own units


class Run(NamedTuple):
    """The files of a run, read."""

    folder: Path
    name: str
    results: JSONDict
    config: JSONDict
    facts: JSONDict  # see onestage.report.collection; empty for a run that ended without a report
    config_text: str
    rows: list[dict[str, str]]  # of metrics.csv; empty if nothing was trained


def report(runs: list[Path], *, out: Path | None = None) -> int:
    """Write an HTML page about a run, or about several side by side.

    The page is one file that needs no network. Of one run: the metrics, the command that repeats it, curves, classes,
    errors, data, images, configuration, versions. Of several: the metrics, curves and classes next to each other, what
    differs between their configurations, and a 95 % interval of the difference of mAP. `fit`, `validate` and `test`
    write the page of their run.

    onestage report runs/shapes_ssd/version_0
    onestage report runs/shapes_ssd/version_0 runs/shapes_ssd/version_1 --out focal_or_not.html

    Args:
        runs: folders of runs, runs/<experiment>/version_<n>.
        out: the file to write; default: report.html in the folder of the run, or comparison.html beside that of the
            first of several.
    """
    out = out or (runs[0] / PAGE_FILE if len(runs) == 1 else runs[0].parent / COMPARISON_FILE)
    require(out.suffix.lower() in (".html", ".htm"), "out", str(out), "a file that ends in .html")
    print(f"report: {write_page(runs, out)}")
    return 0


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the page about runs, atomically; return its path.

    ConfigError if a folder is none of a run or `out` cannot be a file, DataError if a file of a run is damaged.
    """
    runs = [_read_run(folder) for folder in folders]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["hue"] = lambda number: round(360 * (0.58 + 0.618034 * number)) % 360
    environment.filters["percent"] = lambda x: "–" if x is None or math.isnan(x) else f"{100 * x:.1f}"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    try:
        shown = _describe_run(runs[0]) if len(runs) == 1 else _compare(runs, out)
        text = template.render(runs=runs, **shown)
    # A file that another version or another program wrote lacks values, or has them of other types.
    except (LookupError, TypeError, ValueError, AttributeError, OSError, BadZipFile, jinja2.TemplateError) as reason:
        places = ", ".join(printable(folder) for folder in folders)
        problem = f"the files of the run are not those of this version of onestage ({type(reason).__name__}: {reason})"
        raise DataError(f"{places}: {problem}.\nEvaluate again: onestage validate --ckpt_path <checkpoint>") from reason
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return out


def _read_run(folder: Path) -> Run:
    remedy = "Give the folder of a run that was evaluated: runs/<experiment>/version_<n>."
    if not folder.is_dir():
        raise ConfigError(f"{printable(folder)}: is not a folder.\n{remedy}")
    files = [folder / name for name in ("results.json", f"{DATA_FOLDER}/{FACTS_FILE}", "config.yaml")]
    results, facts, config = (
        read_text(file, DataError, "a file of a run", remedy, MAX_BYTES) if file.exists() else "" for file in files
    )
    if not results:
        raise ConfigError(f"{printable(folder)}: has no results.json.\n{remedy}")
    try:
        known = json.loads(results), yaml.safe_load(config) or {}, json.loads(facts or "{}")
    except (ValueError, RecursionError, yaml.YAMLError) as reason:
        problem = f"results.json, facts.json or config.yaml is damaged: {reason}".partition("\n")[0]
        raise DataError(f"{printable(folder)}: {problem}.\n{remedy}") from None
    rows = read_rows(folder / "metrics.csv")[1] if (folder / "epochs.csv").is_file() else []  # not of an evaluation
    absolute = folder.absolute()
    return Run(folder, f"{absolute.parent.name}/{absolute.name}", *known, config, rows)


def _describe_run(run: Run) -> JSONDict:
    """Return what the template shows of a run."""
    from onestage.evaluation.figures import training_curves

    results, facts, classes = run.results, run.facts, run.results["classes"]
    names = results["class_names"]
    # Of data that were given in Python, config.yaml has neither source nor path.
    data, file = run.config.get("data") or {}, str(run.folder / "config.yaml")
    command = facts.get("command") or ("fit" if run.rows else results["stage"])
    anew = " --resume none" if run.config.get("resume", "none") != "none" else ""  # else this run would be continued
    again = f"onestage {command} --config {shlex.quote(file)}{anew}"
    largest = sorted(range(len(names)), key=lambda label: -classes[names[label]]["num_objects"])[:MAX_CLASSES]
    found = {f"all {len(names)} classes": results["overall"]}
    found |= {names[label]: classes[names[label]] for label in largest}
    precision = {name: [(n / 100, p) for n, p in enumerate(one["precision_by_recall"])] for name, one in found.items()}
    return {
        "command": again if data.get("source") or data.get("path") else f"onestage.train({file!r}, data=...)",
        "curves": [chart(f"{panel} over steps", lines) for panel, lines in training_curves(run.rows).items()],
        "precision": chart("precision over recall, IoU 0.5", precision, (0, 1), (0, 1)),
        "confused": [*sorted(largest), len(names)] if results["confusion"] else [],
        "images": {
            kind: [(shown, image) for image in facts.get(kind, ()) if (shown := _picture(run.folder, image["file"]))]
            for kind in ("worst", "random")
        },
    }


def _picture(folder: Path, name: str) -> str:
    """Return a JPEG of the run as base64; empty if it is missing. Only the name counts: no path leads elsewhere."""
    file = folder / DATA_FOLDER / Path(name).name
    content = file.read_bytes() if file.is_file() and file.stat().st_size < MAX_BYTES else b""
    return base64.b64encode(content).decode() if content.startswith(b"\xff\xd8") else ""


def _compare(runs: Sequence[Run], out: Path) -> JSONDict:
    """Return what the template shows of several runs, the first of which is the one to compare with."""
    from onestage.evaluation.figures import training_curves
    from onestage.report.comparison import config_differences

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, run in enumerate(runs, start=1):
        panels = training_curves(run.rows)
        for panel, line in (("loss", "train/loss"), ("loss", "val/loss"), ("mAP", "val/mAP")):
            if points := panels.get(panel, {}).get(line):
                curves.setdefault(line, {})[f"{number} {run.name}"] = points
    pages = [run.folder / PAGE_FILE for run in runs]
    links = [quote(Path(os.path.relpath(page, out.parent)).as_posix()) if page.is_file() else "" for page in pages]
    tables = {"metrics": "metrics", "AP of each class": "per_class", "AP50 lost by type of error": "error_types"}
    names = {key: dict.fromkeys(name for run in runs for name in run.results[key]) for key in tables.values()}
    return {
        "tables": [
            (text, {name: [run.results[key].get(name) for run in runs] for name in names[key]})
            for text, key in tables.items()
        ],
        "intervals": ["", *(_interval(runs[0], run) for run in runs[1:])],
        "curves": [chart(f"{name} over steps", lines) for name, lines in curves.items()],
        "differences": config_differences([run.config for run in runs]),
        "links": links,
    }


def _interval(first: Run, second: Run) -> str:
    from onestage.report.comparison import are_comparable, difference_interval, read_matches

    matches = [read_matches(run.folder / DATA_FOLDER / MATCHES_FILE) for run in (first, second)]
    if matches[0] is None or matches[1] is None:
        without = first if matches[0] is None else second
        return f"no interval: {without.name} has no matches.npz"
    if first.results["class_names"] != second.results["class_names"] or not are_comparable(matches[0], matches[1]):
        return "no interval: not the same images, objects or classes"
    low, high = difference_interval(matches[0], matches[1])
    difference = second.results["metrics"]["mAP"] - first.results["metrics"]["mAP"]
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> JSONDict:
    """Return the lines of a chart as points of an SVG, with the places and texts of its ticks.

    lines: name -> points (x, y); those without a finite y are left out. Ranges: of the axes; None: of the points,
    with 0 on the y axis.
    """
    finite = {name: [p for p in points if p[1] is not None and math.isfinite(p[1])] for name, points in lines.items()}
    finite = {name: points for name, points in finite.items() if points}
    xs, ys = ([point[axis] for points in finite.values() for point in points] for axis in (0, 1))
    (x1, x2), (y1, y2) = x_range or _range(xs), y_range or _range([0.0, *ys])

    def x(value: float) -> float:
        return round(LEFT + (value - x1) / (x2 - x1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y1) / (y2 - y1) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "title": title,
        "lines": {name: " ".join(f"{x(a)},{y(b)}" for a, b in points) for name, points in finite.items()},
        "x_ticks": [(x(value), f"{value:g}") for value in _ticks(x1, x2)],
        "y_ticks": [(y(value), f"{value:g}") for value in _ticks(y1, y2)],
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low, low + 1.0)


def _ticks(low: float, high: float) -> Iterable[float]:
    """Return three to six round numbers in a range."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * factor for factor in (5, 2, 1) if power * factor <= (high - low) / 3 * (1 + 1e-9))
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
