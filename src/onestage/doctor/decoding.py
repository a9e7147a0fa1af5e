"""Complete decoding of images in child processes, which a damaged or malicious file may kill."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, NamedTuple

from onestage.data.images import REMEDY, read_image
from onestage.errors import ImageError
from onestage.files import printable

if TYPE_CHECKING:  # a child imports this file: with torch it would start slowly and exceed its address space
    from onestage.types import AnnotationSet, Finding

MEMORY_BYTES = 4 << 30  # address space of a child; the largest image takes a quarter of it
SECONDS_PER_IMAGE = 30.0  # the largest image takes 3 s
START_SECONDS = 60.0  # for imports on a busy machine
READY = "ready"


class Task(NamedTuple):
    """An image to decode."""

    path: str
    annotated_size: tuple[int, int]  # (height, width); 0, 0 if unknown


def decode_all(splits: Iterable["AnnotationSet"], num_processes: int) -> "list[Finding]":
    """Decode all images of some splits in so many child processes; return a finding for each that fails."""
    tasks = [
        Task(str(path), (height, width))
        for annotations in splits
        for path, (height, width) in zip(annotations.image_paths, annotations.sizes.tolist(), strict=True)
    ]
    shares = [tasks[start::num_processes] for start in range(num_processes)]
    with ThreadPoolExecutor(num_processes) as pool:
        found = [finding for part in pool.map(decode_in_child, shares) for finding in part]
    return sorted(found, key=lambda finding: finding.place)


def decode_in_child(tasks: Sequence[Task]) -> "list[Finding]":
    """Decode images in a child process; if it dies, a new one continues after the image that killed it."""
    from onestage.data.image_headers import image_finding

    problems: list[str] = []
    while len(problems) < len(tasks):
        answers, reason = _run_child(tasks[len(problems) :])
        problems += answers
        problems += [f"{reason} while it was decoded"] if reason else []
    pairs = zip(tasks, problems, strict=True)
    return [image_finding(task.path, ImageError(problem)) for task, problem in pairs if problem]


def decode_each(answers: Connection, tasks: Sequence[Task]) -> None:
    """Send `READY`, then for each image its problem, or "" if it can be decoded. Runs in the child."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.send(READY)
    for task in tasks:
        problem = ""
        try:
            read_image(task.path, task.annotated_size)
        except ImageError as reason:
            problem = str(reason)
        except MemoryError:
            problem = f"{printable(task.path)}: needs more than {MEMORY_BYTES >> 30} GiB to decode.\n{REMEDY}"
        answers.send(problem)
    answers.close()


def _run_child(tasks: Sequence[Task]) -> tuple[list[str], str]:
    """Return the answers of one child, and what ended it before the last one, or ""."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    parent_end, child_end = context.Pipe()
    child = context.Process(target=decode_each, args=(child_end, list(tasks)), daemon=True)
    child.start()
    child_end.close()
    problems: list[str] = []
    try:
        if not parent_end.poll(START_SECONDS) or parent_end.recv() != READY:
            return problems, _stop(child)
        while len(problems) < len(tasks):
            if not parent_end.poll(SECONDS_PER_IMAGE):
                return problems, f"took more than {SECONDS_PER_IMAGE:g} s"
            problems.append(parent_end.recv())
        return problems, ""
    except EOFError:  # the child died
        return problems, _stop(child)
    finally:
        _stop(child)


def _stop(child: SpawnProcess) -> str:
    """Wait a second for a child to end, else kill it; return how it ended."""
    child.join(1.0)
    if child.is_alive():
        child.kill()
        child.join()
    code = child.exitcode or 0
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"the decoder died ({name})"
