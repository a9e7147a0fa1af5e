"""Makes the runs that are missing, several at a time, each on one thread, and keeps what came out of each."""

import csv
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import plan
from comparison.plan import Run, Study

Outcome = dict[str, Any]


def write_settings(study: Study) -> None:
    """Keep what the page about the runs has to say of them, beside them."""
    settings = {
        "data": study.data_name,
        "precision": study.precision,
        "rates": study.rates,
        "box_weights": study.box_weights,
        "selection_seed": study.selection_seed,
        "seeds": study.seeds,
        "epochs": study.epochs,
        "chosen_precision": study.chosen_precision,
        "chosen_epochs": study.chosen_epochs,
        "options": _options(study),
    }
    study.results_folder.mkdir(parents=True, exist_ok=True)
    (study.results_folder / "study.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _options(study: Study) -> str:
    """Return the words that make the same runs again."""
    is_shapes = study.data == "shapes"
    words = [f"--num_train {study.num_train}"] if is_shapes else [f"--data path/to/{study.data_name}"]
    words += [f"--precision {study.precision}", f"--epochs {study.epochs}"]
    if study.losses != plan.all_losses():
        words.append(f"--losses {' '.join(study.losses)}")
    if study.choosing == study:
        words.append(f"--box_weights {' '.join(f'{weight:g}' for weight in study.box_weights)}")
        words.append(f"--rates {' '.join(f'{rate:g}' for rate in study.rates)}")
    else:
        words.append(f"--chosen_precision {study.chosen_precision} --chosen_epochs {study.chosen_epochs}")
    return " ".join([*words, f"--seeds {' '.join(map(str, study.seeds))}"])


def make_runs(runs: Sequence[Run], jobs: int, deadline: float = math.inf) -> None:
    """Make those of the runs that have no outcome yet; each leaves one, so that the rest can be made another time.

    Args:
        runs: in the order in which they are to be made.
        jobs: how many at a time.
        deadline: no run is begun after this time (of time.time()).
    """
    missing = [run for run in runs if not run.outcome_file.is_file()]
    if not missing:
        return
    print(f"{len(missing)} of {len(runs)} runs to make, {jobs} at a time", flush=True)
    # One thread each: two trainings of a small network side by side are faster than one after the other on two threads.
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        tasks = [(run, deadline) for run in missing]
        for number, (run, outcome) in enumerate(pool.imap_unordered(_make_run, tasks), start=1):
            told = f"mAP {outcome['metrics']['mAP']:.3f}" if outcome and outcome["metrics"] else "no result"
            told = told if outcome else "put off"
            print(f"{number}/{len(missing)}  {run.study.data_name} {run.loss} {run.name}: {told}", flush=True)


def _make_run(task: tuple[Run, float]) -> tuple[Run, Outcome | None]:
    run, deadline = task
    if time.time() > deadline:
        return run, None
    folder = run.outcome_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    outcome = _read_outcome(folder, _run_quietly(run.words(), folder / "log.txt"))
    unfinished = run.outcome_file.with_suffix(".part")
    unfinished.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    unfinished.replace(run.outcome_file)
    return run, outcome


def _run_quietly(words: list[str], log: Path) -> int:
    """Run a command of onestage in this process, with all that it prints in a file."""
    import torch

    from onestage.cli import main

    torch.set_num_threads(1)
    with log.open("w", encoding="utf-8") as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            return main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _read_outcome(folder: Path, exit_code: int) -> Outcome:
    """Return the last run's metrics, AP by class, [step, mAP] after every epoch, and whether all numbers were finite.

    A run that ended early has no metrics; its curve says how far it came.
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
        "metrics": results.get("metrics", {}),
        "per_class": results.get("per_class", {}),
        "curve": curve,
        # The guard skips a step that is not finite, and says so in a file; without it the run would have been lost.
        "is_finite": exit_code == 0
        and all(math.isfinite(loss) for loss in losses)
        and not (newest / "skipped_steps.json").is_file(),
    }


def read_outcome(run: Run) -> Outcome | None:
    """Return what came out of a run, None if it was not made yet."""
    if not run.outcome_file.is_file():
        return None
    outcome: Outcome = json.loads(run.outcome_file.read_text(encoding="utf-8"))
    return outcome


def best_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Return the run of each loss with the highest mAP; a loss none of whose runs came to its end is left out."""
    best: dict[str, tuple[float, Run]] = {}
    for run in runs:
        outcome = read_outcome(run)
        if outcome and outcome["metrics"]:
            found = outcome["metrics"]["mAP"]
            if run.loss not in best or found > best[run.loss][0]:
                best[run.loss] = found, run
    return {loss: run for loss, (_, run) in best.items()}
