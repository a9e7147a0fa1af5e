"""What came out of a run: read from what the run left, kept beside it, and compared with others of its loss."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import origin
from comparison.plan import Run
from onestage.errors import NonFiniteError

Outcome = dict[str, Any]

# A run that ended in any other way was interrupted or could not begin, which says nothing of its loss.
MADE = (0, NonFiniteError.exit_code)


def gather(folder: Path, exit_code: int, commit: str | None) -> Outcome:
    """Return the last run's metrics, AP by class, [step, mAP] after every epoch, and whether all numbers were finite.

    A run that the guard against non-finite numbers ended has no metrics; its curve says how far it came.

    Args:
        folder: of the experiment, with one version_* for every try.
        exit_code: one of `MADE`.
        commit: of the code that was run.
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
        # The guard skips a step that is not finite, and says so in a file; without it the run would have been lost.
        "is_finite": exit_code == 0
        and all(math.isfinite(loss) for loss in losses)
        and not (newest / "skipped_steps.json").is_file(),
    }


def keep(outcome: Outcome, file: Path) -> None:
    """Write an outcome in one go: a file that exists is whole."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    unfinished.replace(file)


def read(file: Path) -> Outcome | None:
    """Return what came out of a run, None if it was not made yet or ended before it could say anything."""
    if not file.is_file():
        return None
    outcome: Outcome = json.loads(file.read_text(encoding="utf-8"))
    return outcome if outcome["exit_code"] in MADE else None


def score(outcome: Outcome) -> float | None:
    """Return the mAP, 0 where it is undefined, None for a run that has not come to its end."""
    return (outcome["metrics"]["mAP"] or 0.0) if outcome["metrics"] else None


def best_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the run of each loss with the highest mAP; a loss none of whose runs came to its end is left out."""
    best: dict[str, tuple[float, Run]] = {}
    for run in runs:
        outcome = read(run.outcome_file)
        found = score(outcome) if outcome else None
        if found is not None and (run.loss not in best or found > best[run.loss][0]):
            best[run.loss] = found, run
    return {loss: run for loss, (_, run) in best.items()}
