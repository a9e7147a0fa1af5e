"""How long this process has stood still, and where: asleep in code that waits for what may never come."""

import os
import sys
import sysconfig
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType

BUSY = 0.05  # of a processor; the threads that only wait, this watch among them, use less
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
PACKAGES = sysconfig.get_paths()["purelib"]


class Standstill:
    """Counts the seconds in which the main thread stays in one line of Python and nothing uses a processor.

    A process that waits inside torch is left out: it waits for the other processes, for a device or for a worker of the
    loader, and those are watched by others. So is one that a debugger has halted. On Linux only, elsewhere it counts 0.

    Args:
        strangers: children of this process that work for themselves, as those that Lightning starts.
    """

    def __init__(self, strangers: Collection[int] = ()) -> None:
        self._strangers = frozenset(strangers)
        self._place: tuple[str, int] | None = None
        self._since = self._looked = time.monotonic()
        self._used = used_seconds(self._strangers)

    def look(self) -> tuple[float, str]:
        """Return for how many seconds the process has stood still, and where: `file:line in function`."""
        now, used = time.monotonic(), used_seconds(self._strangers)
        frame = waiting_frame()
        place = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else None
        is_busy = used - self._used > BUSY * (now - self._looked)
        if is_busy or place is None or place != self._place:
            self._since = now
        self._place, self._used, self._looked = place, used, now
        if frame is None:
            return 0.0, ""
        return now - self._since, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def waiting_frame() -> FrameType | None:
    """Return what the main thread is in, calls into the standard library aside; None for torch and a debugger."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and _is_standard(frame.f_code.co_filename):
        if frame.f_code.co_filename.endswith("bdb.py"):
            return None
        frame = frame.f_back
    return None if frame is None or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename else frame


def _is_standard(file: str) -> bool:
    return file.startswith("<") or (file.startswith(STANDARD_LIBRARY) and not file.startswith(PACKAGES))


def used_seconds(strangers: Collection[int] = ()) -> float:
    """Return the processor time of this process and its living children; infinite where it cannot be known."""
    try:
        children = [child for child in _children() if child not in strangers]
    except OSError:
        return float("inf")
    return time.process_time() + sum(map(_seconds_of, children))


def _children() -> Iterator[int]:
    for thread in Path("/proc/self/task").iterdir():
        yield from map(int, (thread / "children").read_text().split())


def _seconds_of(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
