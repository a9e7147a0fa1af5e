"""Results of an evaluation: `results.json` (docs/report.md), COCO result files, and a table for the terminal."""

import contextlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onestage.evaluation.analysis import Analysis, ClassAnalysis
from onestage.evaluation.coco import METRIC_NAMES, Evaluation, choose_backend
from onestage.files import atomic_write
from onestage.types import JSONDict, Metrics

NUMBERS = re.compile(r"\[\n\s+(?:(?:[\d.e+-]+|null),?\s+)+\]")  # a list of numbers, which fits on one line


def write_results(
    path: Path, stage: str, metrics: Metrics, evaluation: Evaluation, seconds: float, num_images: int
) -> None:
    """Write one evaluation, `validate` or `test`, as JSON, atomically. NaN becomes null. metrics: with VOC's."""
    _, per_class, analysis = evaluation
    results: JSONDict = {"stage": stage, "metrics": metrics, "per_class": per_class, "class_names": list(per_class)}
    results |= {
        "score_threshold": analysis.score_threshold,
        "overall": _class_as_json(analysis.overall),
        "classes": {name: _class_as_json(one) for name, one in zip(per_class, analysis.classes, strict=True)},
        "confusion": analysis.confusion,
        "error_types": analysis.error_types,
    }
    rate = num_images / max(seconds, 1e-9)
    results |= {"seconds": seconds, "images_per_second": rate, "versions": installed_versions()}
    with atomic_write(path) as temporary:
        text = NUMBERS.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", to_json(results, indent=2))
        temporary.write_text(text + "\n", encoding="utf-8")


def _class_as_json(one: ClassAnalysis) -> JSONDict:
    curve = [round(value, 4) for value in one.precision]
    values: JSONDict = {"num_objects": one.num_objects, "AP50": one.ap50, "VOC07": one.voc07, "VOC10": one.voc10}
    return values | one.best._asdict() | {"precision_by_recall": curve}


def write_records(path: Path, records: Sequence[JSONDict]) -> None:
    """Write records, such as COCO results, as one JSON list, one record per line, atomically."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    with atomic_write(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text with null for NaN and infinities, which JSON does not know."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, allow_nan=False, ensure_ascii=False)


def installed_versions() -> dict[str, str]:
    """Return the version of every installed package that the metrics depend on."""
    versions = {"python": platform.python_version()}
    for package in ("onestage", "torch", "torchvision", "lightning", "torchmetrics", choose_backend()):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def format_table(metrics: Metrics, per_class: Mapping[str, float], analysis: Analysis) -> str:
    """Return the metrics, a row for each class and the error types for the terminal, in percent."""
    names = [name for name in (*METRIC_NAMES, "VOC07", "VOC10") if name in metrics]
    cells = [f"{name:<10} {_percent(metrics[name])}" for name in names]
    width = max(len("class"), *map(len, per_class))
    rows = [*zip(per_class, per_class.values(), analysis.classes, strict=True)]
    rows.append(("all", metrics["mAP"], analysis.overall))
    costs = [f"{name} {_percent(value).strip()}" for name, value in analysis.error_types.items()]
    return "\n".join(
        [
            *("   ".join(cells[start : start + 3]) for start in range(0, len(cells), 3)),
            *("", f"{'class':<{width}}    AP   AP50  prec.  recall    F1  score  objects"),
            *(f"{name:<{width}} {_percent(value)}{_class_cells(one)}" for name, value, one in rows),
            *("", "AP50 lost by error: " + ", ".join(costs)),
        ]
    )


def _class_cells(one: ClassAnalysis) -> str:
    best = one.best
    cells = map(_percent, (one.ap50, best.precision, best.recall, best.f1))
    threshold = "    -" if math.isnan(best.threshold) else f"{best.threshold:5.2f}"
    return "  " + "  ".join([*cells, threshold, f"{one.num_objects:>7}"])


def _percent(value: float) -> str:
    return "    -" if math.isnan(value) else f"{100 * value:5.1f}"
