"""What an evaluation leaves behind: `results.json`, COCO result files, and a table for the terminal."""

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onestage.errors import ResourceError
from onestage.evaluation.voc import choose_backend
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
    """Write the numbers of one evaluation as JSON, whole or not at all. NaN becomes null.

    Args:
        path: of the file; its folder is made if it is missing.
        stage: what was evaluated, such as `validate` or `test`.
        metrics: by name, 0..1.
        per_class: AP by class name, 0..1.
        class_names: in the order of the labels.
        seconds: that the evaluation took.
        images_per_second: of the evaluation.

    Raises:
        ResourceError: if the file cannot be written.
    """
    results = {
        "stage": stage,
        "metrics": dict(metrics),
        "per_class": dict(per_class),
        "class_names": list(class_names),
        "seconds": seconds,
        "images_per_second": images_per_second,
        "versions": installed_versions(),
    }
    content = json.dumps(_without_nan(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, content.encode())


def write_coco_results(path: Path, records: Sequence[JSONDict]) -> None:
    """Write COCO result records as one JSON list, a record a line, whole or not at all.

    Raises:
        ResourceError: if the file cannot be written.
    """
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in records)
    write_file(path, f"[\n{lines}\n]\n".encode())


def installed_versions() -> dict[str, str]:
    """Return the version of everything the numbers depend on; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in ("onestage", "torch", "torchvision", "lightning", "torchmetrics", choose_backend()):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def format_table(metrics: Metrics, per_class: Mapping[str, float]) -> str:
    """Return the twelve numbers in rows and the AP of each class, in percent, for the terminal."""
    rows = (
        ("mAP", "AP50", "AP75"),
        ("mAP_small", "mAP_medium", "mAP_large"),
        ("AR1", "AR10", "AR100"),
        ("AR_small", "AR_medium", "AR_large"),
    )
    lines = ["   ".join(f"{name:<10} {_percent(metrics[name])}" for name in row if name in metrics) for row in rows]
    lines = [line for line in lines if line]
    if per_class:
        width = max(len("class"), *(len(name) for name in per_class))
        lines += ["", f"{'class':<{width}}    AP"]
        lines += [f"{name:<{width}} {_percent(value)}" for name, value in per_class.items()]
    return "\n".join(lines)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it.

    Raises:
        ResourceError: if that is impossible: the disk is full, or the folder refuses.
    """
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written: {error.strerror or error}.\n"
            "Make room there, or choose a folder that this user may write to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _without_nan(value: Any) -> Any:
    """JSON has no word for NaN and the infinities; null says that there is no number."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value


def _percent(value: float) -> str:
    return "    -" if math.isnan(value) else f"{100 * value:5.1f}"
