#!/usr/bin/env python
"""Train one detector with several losses on equal terms, and write the page that compares them.

    python scripts/compare_losses.py                          the study behind docs/focal_loss.md: hours
    python scripts/compare_losses.py --plan mine.yaml         your own: another detector, other data, other losses
    python scripts/compare_losses.py --only boundary          one group of trainings
    python scripts/compare_losses.py --report docs            write the page of the finished trainings

A plan names an experiment, the settings of every training, and groups of trainings: every loss (a file of
configs/compare, or as_configured) under every condition with every seed; a loss may bring settings of its own, such as
the weight of the box loss. All have the same images in the same order and the same initial weights. Each is an
`onestage fit` and a row of the plan's table, so the same command continues an interrupted study.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from comparison import Table, joined, write_page

REPOSITORY = Path(__file__).resolve().parents[1]
LOSSES = REPOSITORY / "configs" / "compare"
AS_CONFIGURED = "as_configured"  # the loss of the plan's experiment
NON_FINITE = 6  # exit code of a training that met NaN or infinity: an outcome too
LOG_LINES = 12  # shown of a failed training
METRICS = ("mAP", "AP50", "AP75")


class Training(NamedTuple):
    """What identifies a row of the table."""

    group: str
    loss: str
    seed: int
    condition: str  # JSON: the settings of the condition and of the loss, by key


class PlanError(Exception):
    """The plan cannot be used; the message says why."""


class FailedError(Exception):
    """A training failed or was interrupted; no further one was started."""


def main() -> int:
    """Make the missing trainings, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = REPOSITORY / "scripts" / "focal_study.yaml"
    parser.add_argument("--plan", type=Path, default=default, help="default: scripts/focal_study.yaml")
    parser.add_argument("--only", help="name of one group")
    parser.add_argument("--jobs", type=int, default=2, help="simultaneous trainings, each on one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no training after this time")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder of all runs")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write loss_comparison.md here; make no training")
    arguments = parser.parse_args()
    try:
        plan = read_plan(arguments.plan)
        if arguments.report:
            write_page(plan, read_table(plan), arguments.report)
            return 0
        missing = missing_trainings(plan, arguments.only)
        end = time.time() + 60 * arguments.minutes
        make(plan, missing, arguments.runs_dir.resolve(), max(arguments.jobs, 1), end)
    except PlanError as error:
        print(f"{arguments.plan}: {error}", file=sys.stderr)
        return 2
    except FailedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: running trainings are lost; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def read_plan(path: Path) -> dict[str, Any]:
    """Return a plan with `settings`, its `folder`, an absolute `table`, and the settings of every loss.

    Raises:
        PlanError: it lacks a key or names a loss that configs/compare does not have.
    """
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        groups, folder = plan["groups"].values(), path.resolve().parent
        places = {"folder": str(folder), "config": plan["config"], "table": str(folder / plan["table"])}
        plan = {"settings": {}} | plan | places
        for group in groups:
            settings = group["losses"]
            group["losses"] = {loss: settings[loss] if isinstance(settings, dict) else {} for loss in settings}
        known = {AS_CONFIGURED, *(file.stem for file in LOSSES.glob("*.yaml"))}
        unknown = {loss for group in groups for loss in group["losses"]} - known
    except OSError as reason:
        raise PlanError(f"cannot be read: {reason.strerror}") from None
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as reason:
        rule = "a plan has config, table and groups, each group losses; see scripts/focal_study.yaml"
        raise PlanError(f"is no plan ({type(reason).__name__}: {reason}).\n{rule}") from None
    if unknown:
        raise PlanError(f"unknown losses {', '.join(sorted(unknown))}.\nKnown are {', '.join(sorted(known))}")
    return plan


def trainings(plan: dict[str, Any]) -> Iterator[Training]:
    """Yield all trainings of a plan, group by group, condition by condition."""
    for name, group in plan["groups"].items():
        for condition in group.get("conditions", [{}]):
            for seed in group.get("seeds", [0]):
                for loss, settings in group["losses"].items():
                    yield Training(name, loss, seed, joined(condition, settings))


def read_table(plan: dict[str, Any]) -> Table:
    """Return the rows of the finished trainings."""
    path = Path(plan["table"])
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def missing_trainings(plan: dict[str, Any], group: str | None = None) -> list[Training]:
    """Return the trainings without a row, of one group or of all; two groups may share one."""
    if group is not None and group not in plan["groups"]:
        raise PlanError(f"has no group {group}, only {', '.join(plan['groups'])}")
    seen = {(row["loss"], int(row["seed"]), row["condition"]) for row in read_table(plan)}
    missing = []
    for training in trainings(plan):
        if training[1:] not in seen and group in (None, training.group):
            seen.add(training[1:])
            missing.append(training)
    return missing


def make(plan: dict[str, Any], missing: list[Training], runs: Path, jobs: int, end: float) -> None:
    """Make trainings, `jobs` at a time, and append a row for each; start none after the time `end`.

    Raises:
        FailedError: one was interrupted or could not start; those under way were finished first.
    """
    print(f"{len(missing)} trainings to make, {jobs} at a time", flush=True)
    waiting, running, failures = list(missing), dict[Future[dict[str, Any]], Training](), list[FailedError]()
    with ThreadPoolExecutor(jobs) as pool:
        while running or (waiting and not failures and time.time() < end):
            while waiting and len(running) < jobs and not failures and time.time() < end:
                one = waiting.pop(0)
                running[pool.submit(train, plan, one, runs)] = one
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one = running.pop(future)
                try:
                    row = future.result()
                except FailedError as error:
                    failures.append(error)
                else:
                    _append(Path(plan["table"]), row)
                    outcome = "non-finite" if row["mAP"] == "" else row["mAP"]
                    print(outcome, one.group, one.loss, one.condition, one.seed, flush=True)
    if failures:
        raise failures[0]


def train(plan: dict[str, Any], training: Training, runs: Path) -> dict[str, Any]:
    """Make one training in a process of its own, on one thread; return its row.

    Raises:
        FailedError: it ended with another exit code than 0 and `NON_FINITE`.
    """
    condition = hashlib.sha256(training.condition.encode()).hexdigest()[:6]  # a folder of its own for each training
    experiment = f"{Path(plan['table']).stem}-{training.group}-{training.loss}-{training.seed}-{condition}"
    folder = runs / experiment
    settings = {"config": plan["config"], "trainer.enable_progress_bar": False, "drawn_images": 0}
    settings |= {"seed_everything": training.seed} | plan["settings"] | json.loads(training.condition)
    config = str(Path(plan["folder"]) / settings.pop("config"))  # a condition may name another experiment
    words = ["fit", "--config", config, "--runs_dir", str(runs), "--experiment", experiment]
    if training.loss != AS_CONFIGURED:
        words += ["--config", str(LOSSES / f"{training.loss}.yaml")]
    for key, value in settings.items():
        words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    folder.mkdir(parents=True, exist_ok=True)
    before, log = set(folder.glob("version_*")), folder / f"{time.time_ns()}.log"
    # Two trainings of a small network on one thread each are faster than one after the other on two threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "onestage.cli", *words]
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
        ).returncode
    if code not in (0, NON_FINITE):
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        again = "The same command continues with the missing trainings."
        raise FailedError(f"{experiment} ended with exit code {code}. The last lines of {log}:\n{last}\n{again}")
    [run] = set(folder.glob("version_*")) - before
    is_finite = code == 0
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"] if is_finite else {}
    values = {name: round(results[name] or 0.0, 4) if is_finite else "" for name in METRICS}
    return training._asdict() | values | _logged(run)


def _logged(run: Path) -> dict[str, Any]:
    """Return the length of a run, and its background anchors for each positive one, from the run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    counts = {"anchors/negatives": 0.0, "anchors/positives": 0.0}
    steps = 0
    for file in run.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in counts.keys() & set(events.Tags()["scalars"]):
            counts[name] += sum(event.value for event in events.Scalars(name))
            steps = max(steps, events.Scalars(name)[-1].step + 1)
    ratio = counts["anchors/negatives"] / max(counts["anchors/positives"], 1.0)
    return {"steps": steps, "background_per_positive": round(ratio, 1)}


def _append(table: Path, row: dict[str, Any]) -> None:
    is_new = not table.is_file()
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
