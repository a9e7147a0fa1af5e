"""Kill and stop runs at many moments, resume each, and compare their ends with those of undisturbed runs.

A program of its own: it imports everything once and forks the processes of each attempt. It prints one line of JSON:
what was done, how long the slowest end took, and everything that should not have happened, under `failures`.
"""

import argparse
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiny_run
from lightning.pytorch.utilities import rank_zero_only

from onestage.data.shapes import draw_shapes
from onestage.errors import CheckpointError, DataError, ProcessLostError
from onestage.reliability.checkpoints import LAST, PREVIOUS, read_checkpoint
from onestage.training.module import DetectionModule

INTERVAL = 2  # optimizer steps between two checkpoints
EPOCHS = 60  # of 8 steps and a validation
KINDS = {"start": 3, "step": 17, "save": 5, "damaged last.ckpt, save": 5, "validation": 10, "worker": 10}
REACH = {"save": 8, "damaged last.ckpt, save": 8, "validation": 8, "worker": 19}  # steps until the process ends
LAST_STEPS = 30  # without a kill: a late one must still come before the end
WORKERS = ("--data.num_workers", "2", "--data.worker_timeout_seconds", "5")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
STOPS = [  # of process 0 or 1: after so many calls of a moment, and up to so many seconds later
    *[(rank, "configure_optimizers", 1, 0.0) for rank in (0, 1)],
    *[(rank, "step", 3, 0.0) for rank in (0, 1)],
    *[(rank, "validation", 1, 0.0) for rank in (0, 1)],
    (0, "write", 1, 0.0),
    (1, "step", 2, 0.3),
    *[(rank, "teardown", 1, 0.0) for rank in (0, 1)],  # between the training and the evaluation of best.ckpt
]
HANG_SECONDS = 200  # such a process is killed, and counts as a failure
Fault = Callable[[], None]


class Attempt(NamedTuple):
    """The end of the processes of a run."""

    codes: list[int]  # exit codes, negative for a signal
    seconds: float  # from the fault to the end of the last process
    num_steps: int


def act(record: np.ndarray, number: int, process: Callable[[], int] = os.getpid) -> Fault:
    """Return a function that notes the moment and sends a signal."""

    def action() -> None:
        record[1] = time.monotonic()
        os.kill(process(), number)
        time.sleep(0)  # Python handles it here

    return action


def after(seconds: float, action: Fault) -> Fault:
    """Return a function that lets a timer run the action."""

    def start() -> None:
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        timer.start()

    return start


def count_steps(record: np.ndarray) -> None:
    step = DetectionModule.on_train_batch_end

    def counted(module: DetectionModule, *arguments: object, **named: object) -> object:
        record[0] = module.global_step
        return step(module, *arguments, **named)

    DetectionModule.on_train_batch_end = counted


def attempt(words: list[str], record: np.ndarray, faults: list[Fault | None]) -> Attempt:
    """Run a process for each fault, None for a process without one, until all have ended."""
    record[:] = 0
    sys.stdout.flush()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ends: dict[int, int] = {}
    processes = []
    for rank, fault in enumerate(faults):
        processes.append(os.fork())
        if processes[-1] == 0:
            if len(faults) > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
                os.environ.update(address, LOCAL_RANK=str(rank))
                rank_zero_only.rank = rank
            with Path(words[words.index("--runs_dir") + 1], "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if rank == 0:
                count_steps(record)
            if fault is not None:
                fault()
            sys.exit(tiny_run.onestage(*words))
    deadline = time.monotonic() + HANG_SECONDS
    while len(ends) < len(processes):
        for process in processes:
            if process not in ends and (ended := os.waitpid(process, os.WNOHANG))[0]:
                ends[process] = os.waitstatus_to_exitcode(ended[1])
            elif process not in ends and time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    seconds = float(time.monotonic() - (record[1] or np.inf))
    return Attempt([ends[process] for process in processes], seconds, int(record[0]))


def folder_of_run(runs: Path) -> Path:
    """Return the folder of the run. A kill before the first checkpoint leaves an empty one behind."""
    folders = sorted((runs / "tiny").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    with_checkpoints = [path for path in folders if any(path.glob("checkpoints/*.ckpt"))]
    assert with_checkpoints in ([], folders[-1:]), f"several runs have checkpoints: {with_checkpoints}"
    return folders[-1] if folders else runs / "tiny" / "version_0"


def stored_steps(runs: Path) -> dict[str, int]:
    """Return the step of each checkpoint by its name; -1: the file is damaged."""
    steps = {}
    for file in folder_of_run(runs).glob("checkpoints/*.ckpt"):
        try:
            steps[file.name] = int(read_checkpoint(file)["global_step"])
        except CheckpointError:
            steps[file.name] = -1
    return steps


def damage(file: Path, draw: random.Random) -> None:
    """Cut a file off, or flip a bit, or fill it with zeros."""
    content = bytearray(file.read_bytes())
    place, how = draw.randrange(100, len(content)), draw.choice(["cut", "flip", "zero"])
    if how == "flip":
        place = len(content) // 2  # in the tensors; there are bytes that no reader needs
        content[place] ^= 1
    file.write_bytes(content[:place] if how == "cut" else bytes(len(content)) if how == "zero" else content)


def fault_of(kind: str, draw: random.Random, record: np.ndarray, num_steps: int) -> tuple[Fault, int, tuple[str, ...]]:
    """Return a fault, the exit code that it must lead to, and the options of the attempt.

    num_steps: a fault in a step comes after at most so many.
    """
    kill, soon = act(record, signal.SIGKILL), draw.uniform(0, 0.05)
    if kind == "worker":
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        victim = act(record, number, lambda: draw.choice(sorted(worker.pid or 0 for worker in active_children())))
        step = draw.randint(1, 3)
        moments = [
            lambda: tiny_run.break_at("step", step, victim),
            lambda: tiny_run.break_at("validation", draw.randint(1, 2), victim),
            # By then the workers of both loaders exist, and those of the validation are idle.
            lambda: tiny_run.break_at("validation", 1, lambda: tiny_run.break_at("step", step, victim)),
        ]
        return draw.choice(moments), DataError.exit_code, WORKERS
    moment: Fault = after(draw.uniform(0, 2), kill)
    if kind == "step":
        count = draw.randint(1, max(1, num_steps))
        moment = lambda: tiny_run.break_at("step", count, after(soon, kill))  # noqa: E731
    elif kind == "validation":
        count = draw.randint(1, 2)
        moment = lambda: tiny_run.break_at("validation", count, after(4 * soon, kill) if count == 2 else kill)  # noqa: E731
    elif kind != "start":
        # Half-way through the bytes, before they are on the disk, before the rename. The first of two renames keeps
        # previous.ckpt; a damaged last.ckpt has only its own.
        where, first, last = draw.choice([("write", 1, 3), ("sync", 2, 7), ("replace", 4, 8)])
        if kind != "save":
            where, first, last = draw.choice([("write", 1, 1), ("sync", 2, 3), ("replace", 2, 3)])
        count = draw.randint(first, last)
        moment = lambda: tiny_run.break_at(where, count, kill)  # noqa: E731
    return moment, -signal.SIGKILL, ()


def kill_storm(data: Path, runs: Path, num_kills: int, seed: int) -> dict[str, object]:
    """Kill one run or its workers again and again, and resume it; compare its end with that of an undisturbed run."""
    draw, record = random.Random(seed), np.frombuffer(mmap.mmap(-1, 16))  # memory that outlives a process
    words = {name: command(data, runs / name, EPOCHS) for name in ("whole", "broken")}
    whole = attempt(words["whole"], record, [None])
    kinds = draw.sample([*KINDS], num_kills, counts=[*KINDS.values()])
    done: Counter[str] = Counter()
    failures, slowest, most_lost, newest, is_hurt = [], 0.0, 0, 0, False
    while kinds:
        steps = stored_steps(runs / "broken")
        # A kill between the two renames of a save leaves one file with two names: damage to one is damage to both.
        files = [folder_of_run(runs / "broken") / "checkpoints" / name for name in (LAST, PREVIOUS)]
        has_two = all(steps.get(file.name, -1) > 0 for file in files) and not files[0].samefile(files[1])
        kind = kinds.pop(next((n for n, kind in enumerate(kinds) if "damaged" not in kind or has_two), 0))
        if "damaged" in kind:
            damage(files[0], draw)
            newest, is_hurt = steps[PREVIOUS], True
        room = EPOCHS * 8 - newest - LAST_STEPS - sum(REACH.get(other, 1) for other in kinds)
        fault, code, options = fault_of(kind, draw, record, 2 * room // (1 + kinds.count("step")))
        end = attempt([*words["broken"], *options], record, [fault])
        before, steps = newest, stored_steps(runs / "broken")
        newest = max(steps.values(), default=0)
        is_hurt &= steps.get(LAST, 0) < 0  # until a new one has replaced it
        damaged = {name for name, step in steps.items() if step < 0} - ({LAST} if is_hurt else set())
        if end.codes != [code] or newest < before or damaged:
            failures.append(f"{kind}: codes {end.codes}, step {before} -> {newest}, damaged {damaged}")
        done[kind] += 1
        print(f"{kind}: {end}, step {newest}", file=sys.stderr, flush=True)
        slowest, most_lost = max(slowest, end.seconds), max(most_lost, end.num_steps - newest)
    end = attempt(words["broken"], record, [None])
    return {
        "kills": done, "failures": [*failures, *compare(runs, whole.codes + end.codes)], "interval": INTERVAL,
        "most_steps_lost": most_lost, "slowest_end_seconds": round(slowest, 1),
    }  # fmt: skip


def stop_storm(data: Path, runs: Path, num_stops: int) -> dict[str, object]:
    """Stop one of two processes again and again, and resume; compare the end with that of an undisturbed run."""
    record = np.frombuffer(mmap.mmap(-1, 16))
    words = {name: command(data, runs / name, 8, *TWO) for name in ("whole", "broken")}
    whole = attempt(words["whole"], record, [None, None])
    failures, slowest, newest = [], 0.0, 0
    for rank, where, count, seconds in STOPS[:num_stops]:
        stop = act(record, signal.SIGSTOP)
        action = after(seconds, stop) if seconds else stop
        faults: list[Fault | None] = [None, None]
        faults[rank] = lambda: tiny_run.break_at(where, count, action)  # noqa: B023 # called before the next one
        codes = [ProcessLostError.exit_code] * 2
        codes[rank] = -signal.SIGKILL  # by the other process: it would keep its memory for ever
        end = attempt(words["broken"], record, faults)
        before, newest = newest, max(stored_steps(runs / "broken").values(), default=0)
        slowest = max(slowest, end.seconds)
        print(f"process {rank} in {where}: {end}, step {newest}", file=sys.stderr, flush=True)
        if end.codes != codes or newest < before:
            failures.append(f"process {rank} in {where}: codes {end.codes}, step {before} -> {newest}")
    end = attempt(words["broken"], record, [None, None])
    return {
        "stops": len(STOPS[:num_stops]), "failures": [*failures, *compare(runs, whole.codes + end.codes)],
        "slowest_end_seconds": round(slowest, 1),
    }  # fmt: skip


def command(data: Path, runs: Path, epochs: int, *options: str) -> list[str]:
    runs.mkdir(parents=True)
    every = ("--last_checkpoint.every_n_steps", str(INTERVAL), "--resume", "auto")
    return tiny_run.words(data, runs, *every, *options, epochs=epochs)


def compare(runs: Path, codes: list[int]) -> Iterator[str]:
    """Yield how the two runs ended otherwise than in order and with the same bits."""
    if any(codes):
        yield f"the undisturbed run and the last attempt ended with {codes}"
    else:
        yield from tiny_run.differences(*(tiny_run.final_state(folder_of_run(runs / n)) for n in ("whole", "broken")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw_shapes(given.folder / "data", num_train=32, num_val=7, seed=0)
    report: dict[str, object] = {}
    if given.kills:
        report["kill"] = kill_storm(given.folder / "data", given.folder / "kills", given.kills, given.seed)
    if given.stops:
        report["stop"] = stop_storm(given.folder / "data", given.folder / "stops", given.stops)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
