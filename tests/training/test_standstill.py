"""When a process counts as standing still, and where it is said to stand."""

import bdb
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from onestage.training.standstill import Standstill

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processor time of children is read from /proc")


def seconds_of(waiting: Callable[[], object], strangers: tuple[int, ...] = ()) -> tuple[float, str]:
    """What another thread sees after the main one has been in `waiting` for half a second."""
    seen = []

    def watch() -> None:
        time.sleep(0.2)
        standstill = Standstill(strangers)
        for _ in range(4):
            time.sleep(0.1)
            seen.append(standstill.look())

    thread = threading.Thread(target=watch)
    thread.start()
    waiting()
    thread.join()
    return seen[-1]


def sleep() -> None:
    time.sleep(1.0)


def spin() -> None:
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        pass


def test_asleep_is_standing_still_at_the_line_that_sleeps() -> None:
    seconds, place = seconds_of(sleep)
    assert seconds > 0.2
    assert place == f"{__file__}:{sleep.__code__.co_firstlineno + 1} in sleep"


def test_a_wait_of_the_standard_library_is_placed_where_it_was_called() -> None:
    seconds, place = seconds_of(lambda: threading.Event().wait(1.0))
    assert seconds > 0.2
    assert place.startswith(f"{__file__}:")


def test_work_is_no_standstill() -> None:
    assert seconds_of(spin)[0] < 0.15


def test_work_of_a_child_is_no_standstill_unless_it_is_a_stranger() -> None:
    for is_stranger in (False, True):
        child = get_context("fork").Process(target=spin)
        child.start()
        seconds, _ = seconds_of(sleep, (child.pid,) if is_stranger else ())
        child.join()
        assert (seconds > 0.2) == is_stranger


def test_a_wait_inside_torch_is_somebody_elses_affair() -> None:
    torch_file = str(Path(torch.__file__).parent / "distributed" / "somewhere.py")
    code = compile("import time\ndef wait():\n    time.sleep(1.0)\n", torch_file, "exec")
    names: dict[str, Callable[[], object]] = {}
    exec(code, names)
    assert seconds_of(names["wait"]) == (0.0, "")


def test_a_halt_in_the_debugger_is_no_standstill() -> None:
    code = compile("import time\ndef wait():\n    time.sleep(1.0)\n", str(bdb.__file__), "exec")
    names: dict[str, Callable[[], object]] = {}
    exec(code, names)
    assert seconds_of(names["wait"]) == (0.0, "")
