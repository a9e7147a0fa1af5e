"""Kill one run fifty times, resume it after each kill, and compare its end with an undisturbed run.

A program of its own: it imports everything once and forks a process for each attempt. It prints one line of JSON: the
number of kills, of kills during a save and of damaged files, the most steps lost, and the differences at the end.
"""

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tiny_run

from onestage.data.shapes import draw_shapes
from onestage.errors import CheckpointError
from onestage.reliability.checkpoints import read_checkpoint
from onestage.training.module import DetectionModule

INTERVAL = 2  # optimizer steps between two checkpoints
EPOCHS = 40  # of 8 steps
NUM_STEPS = EPOCHS * 8
LAST_STEPS = 40  # without a planned kill: a late one must still come before the end


def command(data: Path, runs: Path, *options: str) -> list[str]:
    rare = ("--trainer.check_val_every_n_epoch", "10", "--last_checkpoint.every_n_steps", str(INTERVAL))
    return tiny_run.words(data, runs, *rare, *options, epochs=EPOCHS)


class StepCounter:
    """Count the steps of a process in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def watch(self) -> None:
        step = DetectionModule.on_train_batch_end

        def counted(module: DetectionModule, *arguments: object, **named: object) -> object:
            self._memory[:8] = struct.pack("q", module.global_step)
            return step(module, *arguments, **named)

        DetectionModule.on_train_batch_end = counted

    @property
    def value(self) -> int:
        return int(struct.unpack("q", self._memory[:8])[0])


def kill_after(seconds: float) -> None:
    """Kill this process from a timer."""
    timer = threading.Timer(seconds, lambda: tiny_run.send(signal.SIGKILL))
    timer.daemon = True
    timer.start()


def attempt(words: list[str], counter: StepCounter, fault: Callable[[], None] = lambda: None) -> int:
    """Run until the end or a kill; return the exit code, negative for a signal."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        counter.watch()
        fault()
        os._exit(tiny_run.onestage(*words))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_in_save(draw: random.Random) -> Callable[[], None]:
    """Kill half-way through the bytes, before they are on the disk, or before the rename."""
    where, first, last = draw.choice([("write", 1, 3), ("sync", 2, 7), ("replace", 4, 8)])
    count = draw.randint(first, last)
    return lambda: tiny_run.break_at(where, count, lambda: tiny_run.send(signal.SIGKILL))


def kill_anywhere(draw: random.Random, steps_left: int, kills_left: int) -> Callable[[], None]:
    """Kill after some step, so that all kills fit into the run; one in ten while it starts."""
    seconds = draw.uniform(0, 0.05)
    spare = max(0, steps_left - LAST_STEPS)
    if draw.random() < 0.1 and spare > LAST_STEPS:
        return lambda: kill_after(10 * seconds)
    step = draw.randint(1, max(1, min(spare, 2 * spare // kills_left)))
    return lambda: tiny_run.break_at("step", step, lambda: kill_after(seconds))


def state_of(folder: Path) -> tuple[int, int]:
    """Return the number of damaged files, and the step of the newest whole checkpoint (0: none)."""
    damaged, steps = 0, [0]
    for file in folder.glob("checkpoints/*.ckpt"):
        try:
            steps.append(int(read_checkpoint(file)["global_step"]))
        except CheckpointError:
            damaged += 1
    return damaged, max(steps)


def folder_of_run(runs: Path) -> Path:
    """Return the folder of the run. A kill before the first checkpoint leaves an empty one behind."""
    folders = sorted((runs / "tiny").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    with_checkpoints = [path for path in folders if any(path.glob("checkpoints/*.ckpt"))]
    assert with_checkpoints in ([], folders[-1:]), f"several runs have checkpoints: {with_checkpoints}"
    return folders[-1] if folders else runs / "tiny" / "version_0"


def storm(data: Path, runs: Path, num_kills: int, num_in_save: int, seed: int) -> dict[str, object]:
    """Kill, check, resume; then run to the end."""
    draw = random.Random(seed)
    words = command(data, runs, "--resume", "auto")
    in_save = set(draw.sample(range(1, num_kills), num_in_save))
    counter = StepCounter()
    damaged, lost, newest, kills, kills_in_save = 0, 0, 0, 0, 0
    while kills < num_kills:
        is_in_save = kills in in_save
        fault = kill_in_save(draw) if is_in_save else kill_anywhere(draw, NUM_STEPS - newest, num_kills - kills)
        code = attempt(words, counter, fault)
        if code != -signal.SIGKILL:
            break  # the run ended before all kills; their number shows it
        kills += 1
        kills_in_save += is_in_save
        num_damaged, newest = state_of(folder_of_run(runs))
        damaged += num_damaged
        lost = max(lost, counter.value - newest)
    code = attempt(words, counter)
    return {
        "kills": kills, "kills_in_save": kills_in_save, "damaged_files": damaged, "most_steps_lost": lost,
        "interval": INTERVAL, "exit_code": code,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--in_save", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.monotonic()
    data = given.folder / "data"
    draw_shapes(data, num_train=32, num_val=7, seed=0)
    whole = attempt(command(data, given.folder / "whole"), StepCounter())
    report = storm(data, given.folder / "broken", given.kills, given.in_save, given.seed)
    states = [tiny_run.final_state(folder_of_run(given.folder / name)) for name in ("whole", "broken")]
    report["differences"] = tiny_run.differences(*states)
    report["whole_exit_code"] = whole
    report["seconds"] = round(time.monotonic() - start)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
