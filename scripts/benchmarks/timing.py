"""Interleaved timing: every round calls all contestants, so that a busy machine slows all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def compare(
    title: str,
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Print a table of `time_in_turns`; the first contestant is the reference of the ratios. title: what is timed."""
    _print_table(title, time_in_turns(contestants, rounds, warm_up, clock))


def time_in_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of all contestants in all rounds.

    Args:
        contestants: what to call, by name.
        rounds: how often each is called; A B, then B A, then A B ...
        warm_up: call each once before the clock runs.
        clock: seconds; `time.process_time`, which other programs do not disturb, for what runs on one thread.
    """
    if warm_up:
        for call in contestants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(contestants[name], clock))
    return seconds


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    gc.collect()  # nobody pays for what another left behind
    _wait_for_device()
    start = clock()
    call()
    _wait_for_device()
    return clock() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print_table(title: str, seconds: Mapping[str, Sequence[float]]) -> None:
    reference = next(iter(seconds.values()))
    width = max(len(name) for name in seconds)
    print(f"\n{title}; {torch.get_num_threads()} threads, {len(reference)} rounds")
    print(f"{'':<{width}}   ms min / median / max          times faster, round by round: min / median / max")
    for name, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(reference, values, strict=True)]
        times = " / ".join(f"{1000 * value:.1f}" for value in _spread(values))
        print(f"{name:<{width}}   {times:<30} " + " / ".join(f"x{value:.2f}" for value in _spread(ratios)))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)
