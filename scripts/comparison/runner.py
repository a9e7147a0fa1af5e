"""Make missing runs, several at a time, each a process on one thread."""

import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from comparison import origin, outcomes
from comparison.plan import REPOSITORY, Run

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0  # a run stops after its current step
LOG_LINES = 12  # shown of a failed run

Process = subprocess.Popen[bytes]


class Begun(NamedTuple):
    """A running training."""

    process: Process
    commit: str | None  # of the code at its start; the next run may have another


class RunFailedError(Exception):
    """A run was interrupted or failed to start."""

    def __init__(self, run: Run, exit_code: int) -> None:
        log = run.outcome_file.parent / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        told = "\n".join(f"  {line}" for line in lines[-LOG_LINES:])
        super().__init__(
            f"{run.study.data_name} {run.loss} {run.name} ended with exit code {exit_code}; it is not counted.\n"
            f"The last lines of {log}:\n{told}\nThe same command continues with the missing runs."
        )
        self.exit_code = exit_code


def make_runs(runs: Sequence[Run], jobs: int, deadline: float = math.inf) -> None:
    """Make the runs without an outcome; an interrupted comparison continues with the rest.

    Args:
        runs: in order.
        jobs: number of simultaneous runs.
        deadline: time.time() after which no run starts.

    Raises:
        RunFailedError: a run was interrupted or failed to start. No other was started; running ones were finished.
    """
    missing = [run for run in dict.fromkeys(runs) if outcomes.read(run.outcome_file) is None]
    if not missing:
        return
    print(f"{len(missing)} of {len(runs)} runs to make, {jobs} at a time", flush=True)
    waiting, running, failed = deque(missing), dict[Run, Begun](), list[RunFailedError]()
    try:
        while running or (waiting and not failed):
            while waiting and not failed and len(running) < jobs and time.time() <= deadline:
                run = waiting.popleft()
                running[run] = Begun(_start(run), origin.commit(REPOSITORY))
            if not running:
                print(f"{len(waiting)} runs postponed: the time is over", flush=True)
                return
            failed += _finished(running, len(missing) - len(waiting), len(missing))
            time.sleep(POLL_SECONDS)
    finally:
        _end([begun.process for begun in running.values()])
    if failed:
        raise failed[0]


def _start(run: Run) -> Process:
    folder = run.outcome_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "onestage.cli", *run.words()]
    # Two trainings of a small network on one thread each are faster than one after the other on two threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _finished(running: dict[Run, Begun], num_begun: int, num_missing: int) -> list[RunFailedError]:
    """Remove ended runs from `running`, store their outcomes, and return the failures."""
    failed = []
    for run, begun in list(running.items()):
        code = begun.process.poll()
        if code is None:
            continue
        number = num_begun - len(running) + 1
        del running[run]
        told = f"{number}/{num_missing}  {run.study.data_name} {run.loss} {run.name}"
        exit_code = 128 - code if code < 0 else code  # as in a shell: 128 + signal number
        if exit_code not in outcomes.MADE:
            failed.append(RunFailedError(run, exit_code))
            print(f"{told}: failed, exit code {exit_code}; no other run is started", flush=True)
            continue
        outcome = outcomes.gather(run.outcome_file.parent, exit_code, begun.commit)
        outcomes.keep(outcome, run.outcome_file)
        found = outcomes.score(outcome)
        print(f"{told}: {'no result' if found is None else f'mAP {found:.3f}'}", flush=True)
    return failed


def _end(left: Sequence[Process]) -> None:
    """Stop running trainings when the comparison is interrupted; they leave no outcome."""
    for process in left:
        process.terminate()
    try:
        for process in left:
            process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in left:
            process.kill()
            process.wait()
