"""Results of a run: read from the run folder, stored beside it, compared by loss."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import origin
from comparison.plan import Run
from onestage.errors import NonFiniteError
from onestage.evaluation.results import to_json
from onestage.files import atomic_write

Outcome = dict[str, Any]

# Any other exit code means an interruption or a failed start, and counts as not run.
MADE = (0, NonFiniteError.exit_code)


def gather(folder: Path, exit_code: int, commit: str | None) -> Outcome:
    """Return the last run's metrics, AP by class, [step, mAP] after every epoch, and whether all numbers were finite.

    A run stopped because of non-finite numbers has no metrics, but a curve.

    Args:
        folder: of the experiment, with one version_* per attempt.
        exit_code: one of `MADE`.
        commit: of the code.
    """
    versions = sorted(folder.glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    newest = versions[-1] if versions else folder
    results = json.loads((newest / "results.json").read_text(encoding="utf-8")) if exit_code == 0 else {}
    rows: list[dict[str, str]] = []
    if (newest / "metrics.csv").is_file():
        with (newest / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    curve = [[int(row["step"]) + 1, float(row["val/mAP"])] for row in rows if row.get("val/mAP")]
    return {
        "exit_code": exit_code,
        "commit": commit,
        "machine": origin.machine(),
        "versions": results.get("versions"),
        "metrics": results.get("metrics", {}),
        "per_class": results.get("per_class", {}),
        "curve": curve,
        # Non-finite steps are skipped and listed in skipped_steps.json.
        "is_finite": exit_code == 0
        and all(math.isfinite(loss) for loss in losses)
        and not (newest / "skipped_steps.json").is_file(),
    }


def keep(outcome: Outcome, file: Path) -> None:
    """Write an outcome atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text(to_json(outcome, indent=1), encoding="utf-8")


def read(file: Path) -> Outcome | None:
    """Return the result of a run, None if it is missing or was interrupted."""
    if not file.is_file():
        return None
    outcome: Outcome = json.loads(file.read_text(encoding="utf-8"))
    return outcome if outcome["exit_code"] in MADE else None


def score(outcome: Outcome) -> float | None:
    """Return the mAP, 0 where it is undefined, None for an unfinished run."""
    return (outcome["metrics"]["mAP"] or 0.0) if outcome["metrics"] else None


def best_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the run of each loss with the highest mAP; losses without a finished run are omitted."""
    best: dict[str, tuple[float, Run]] = {}
    for run in runs:
        outcome = read(run.outcome_file)
        found = score(outcome) if outcome else None
        if found is not None and (run.loss not in best or found > best[run.loss][0]):
            best[run.loss] = found, run
    return {loss: run for loss, (_, run) in best.items()}
