"""Results of an evaluation: `results.json`, COCO result files, and a table for the terminal."""

import contextlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onestage.evaluation.backends import choose_backend
from onestage.evaluation.coco import METRIC_NAMES
from onestage.files import atomic_write
from onestage.types import JSONDict, Metrics


def write_results(
    path: Path,
    *,
    stage: str,
    metrics: Metrics,
    per_class: Mapping[str, float],
    class_names: Sequence[str],
    seconds: float,
    images_per_second: float,
) -> None:
    """Write the metrics of one evaluation, `validate` or `test`, as JSON, atomically. NaN becomes null."""
    results: JSONDict = {"stage": stage, "metrics": metrics, "per_class": per_class, "class_names": list(class_names)}
    results |= {"seconds": seconds, "images_per_second": images_per_second, "versions": installed_versions()}
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(results, indent=2) + "\n", encoding="utf-8")


def write_coco_results(path: Path, records: Sequence[JSONDict]) -> None:
    """Write COCO result records as one JSON list, one record per line, atomically."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    with atomic_write(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text with null for NaN and infinities, which JSON does not know."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def installed_versions() -> dict[str, str]:
    """Return the version of every installed package that the metrics depend on."""
    versions = {"python": platform.python_version()}
    for package in ("onestage", "torch", "torchvision", "lightning", "torchmetrics", choose_backend()):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def format_table(metrics: Metrics, per_class: Mapping[str, float]) -> str:
    """Return the twelve metrics in rows and the AP of each class, in percent, for the terminal."""
    cells = [f"{name:<10} {_percent(metrics[name])}" for name in METRIC_NAMES if name in metrics]
    lines = ["   ".join(cells[start : start + 3]) for start in range(0, len(cells), 3)]
    if per_class:
        width = max(len("class"), *(len(name) for name in per_class))
        lines += ["", f"{'class':<{width}}    AP"]
        lines += [f"{name:<{width}} {_percent(value)}" for name, value in per_class.items()]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "    -" if math.isnan(value) else f"{100 * value:5.1f}"
