"""When a process counts as standing still, and where it is said to stand."""

import bdb
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from onestage.reliability.standstill import Standstill

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processor time of children is read from /proc")


Lock = type(threading.Lock())


def looks_at(wait: Callable[[Lock], object], strangers: tuple[int, ...] = ()) -> tuple[list[float], str]:
    """What another thread sees while the main one is in `wait`: the seconds of four looks, and the last place.

    `wait` is given a lock that is released after the last look. The first look is left out, it has nothing to compare
    with. A look that found no standstill is exactly 0: how long the others are is not asked, because a busy machine may
    leave both threads without a processor for a while.
    """
    seen = []
    over = threading.Lock()
    over.acquire()

    def watch() -> None:
        time.sleep(0.2)
        standstill = Standstill(strangers)
        for _ in range(5):
            time.sleep(0.1)
            seen.append(standstill.look())
        over.release()

    thread = threading.Thread(target=watch)
    thread.start()
    wait(over)
    thread.join()
    return [seconds for seconds, _ in seen[1:]], seen[-1][1]


def sleep(over: Lock) -> None:
    over.acquire()


def spin(over: Lock) -> None:
    any(over.acquire(blocking=False) for _ in itertools.count())  # one line: only its work tells it from a wait


def test_asleep_is_standing_still_at_the_line_that_sleeps() -> None:
    seconds, place = looks_at(sleep)
    assert 0.0 < seconds[0] < seconds[-1]
    assert place == f"{__file__}:{sleep.__code__.co_firstlineno + 1} in sleep"


def test_a_wait_of_the_standard_library_is_placed_where_it_was_called() -> None:
    seconds, place = looks_at(
        lambda over: contextlib.ExitStack().enter_context(over)
    )  # which is Python code, and waits
    assert 0.0 < seconds[0] < seconds[-1]
    assert place.startswith(f"{__file__}:")


def test_work_is_no_standstill() -> None:
    assert 0.0 in looks_at(spin)[0]


def test_work_of_a_child_is_no_standstill_unless_it_is_a_stranger() -> None:
    for is_stranger in (False, True):
        held = threading.Lock()
        held.acquire()
        child = get_context("fork").Process(target=spin, args=(held,))
        child.start()
        seconds, _ = looks_at(sleep, (child.pid,) if is_stranger else ())
        child.kill()
        child.join()
        assert (0.0 in seconds) != is_stranger


def test_a_wait_inside_torch_is_somebody_elses_affair() -> None:
    torch_file = str(Path(torch.__file__).parent / "distributed" / "somewhere.py")
    code = compile("def wait(over):\n    over.acquire()\n", torch_file, "exec")
    names: dict[str, Callable[[Lock], object]] = {}
    exec(code, names)
    assert looks_at(names["wait"]) == ([0.0] * 4, "")


def test_a_halt_in_the_debugger_is_no_standstill() -> None:
    code = compile("def wait(over):\n    over.acquire()\n", str(bdb.__file__), "exec")
    names: dict[str, Callable[[Lock], object]] = {}
    exec(code, names)
    assert looks_at(names["wait"]) == ([0.0] * 4, "")
