"""Complete decoding of images in child processes, which a damaged or malicious file may kill."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from onestage.data.images import REMEDY, read_image
from onestage.errors import ImageError
from onestage.files import printable

if TYPE_CHECKING:  # a child imports this file: with torch it would start slowly and exceed its address space
    from onestage.types import AnnotationSet, Finding

MEMORY_BYTES = 4 << 30  # address space of a child; the largest image takes a quarter of it
MAX_SECONDS = 30  # of an image; the largest takes 3 s

Task = tuple[str, tuple[int, int]]  # path and annotated (height, width); 0, 0 if unknown


def decode_all(splits: Iterable["AnnotationSet"]) -> "list[Finding]":
    """Decode all images of some splits in child processes; return a finding for each that fails."""
    from onestage.data.image_headers import image_finding

    tasks: list[Task] = [
        (str(path), (height, width))
        for annotations in splits
        for path, (height, width) in zip(annotations.image_paths, annotations.sizes.tolist(), strict=True)
    ]
    num_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [tasks[start::num_processes] for start in range(num_processes)]
    with ThreadPoolExecutor(num_processes) as pool:
        problems = zip(shares, pool.map(decode_in_child, shares), strict=True)
        pairs = [(path, problem) for share, found in problems for (path, _), problem in zip(share, found, strict=True)]
    findings = [image_finding(path, ImageError(problem)) for path, problem in sorted(pairs) if problem]
    # Their headers are whole: training meets them when it reads them, and stops unless data.on_error is skip.
    return [finding._replace(effect="error") for finding in findings]


def decode_in_child(tasks: Sequence[Task]) -> list[str]:
    """Return the problem of each image, or "". If the child dies, a new one continues after that image."""
    problems: list[str] = []
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    while len(problems) < len(tasks):
        with ProcessPoolExecutor(1, context, initializer=limit_memory) as child, contextlib.suppress(BrokenProcessPool):
            for task in tasks[len(problems) :]:
                # Unless the child survives to give another answer.
                problems.append(f"it crashed the decoder, or took more than {MAX_SECONDS} s")
                problems[-1] = child.submit(problem_of, task).result()
    return problems


def limit_memory() -> None:
    """Limit the memory of this process, so that it fails instead of the machine."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def problem_of(task: Task) -> str:
    """Return why an image cannot be decoded, or ""; runs in a child, which the alarm kills."""
    alarm = getattr(signal, "alarm", lambda seconds: 0)  # Windows has none
    alarm(MAX_SECONDS)
    try:
        read_image(*task)
    except ImageError as reason:
        return str(reason)
    except MemoryError:
        return f"{printable(task[0])}: needs more than {MEMORY_BYTES >> 30} GiB to decode.\n{REMEDY}"
    finally:
        alarm(0)
    return ""
