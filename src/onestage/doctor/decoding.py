"""Decodes every image of a split whole, in child processes that a malicious or damaged file may kill."""

import multiprocessing
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import SpawnProcess
from pathlib import Path

from onestage.data.annotations import IMAGE_UNREADABLE
from onestage.data.image_headers import image_finding
from onestage.doctor.decoder_child import READY, Task, decode_each
from onestage.errors import ImageError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

SECONDS_PER_IMAGE = 30.0  # the largest image that is decoded at all takes three
START_SECONDS = 60.0  # to import what decodes, on a machine that has other things to do


def decode_all(splits: Iterable[AnnotationSet], num_processes: int) -> list[Finding]:
    """Decode all images of some splits and return a finding for each that cannot be.

    Args:
        splits: whose images.
        num_processes: children that decode side by side, at least 1.
    """
    tasks = [
        Task(str(path), (height, width))
        for annotations in splits
        for path, (height, width) in zip(annotations.image_paths, annotations.sizes.tolist(), strict=True)
    ]
    shares = [tasks[start::num_processes] for start in range(num_processes)]  # an empty one starts no child
    with ThreadPoolExecutor(num_processes) as pool:
        found = [finding for part in pool.map(decode_in_child, shares) for finding in part]
    return sorted(found, key=lambda finding: finding.place)


def decode_in_child(tasks: Sequence[Task]) -> list[Finding]:
    """Decode images one after the other in a child process; when it dies, a new one goes on behind its last image."""
    findings: list[Finding] = []
    done = 0
    while done < len(tasks):
        num_answers, reason = _run_child(tasks[done:], findings)
        done += num_answers
        if reason:
            place = printable(tasks[done].path)
            findings.append(IMAGE_UNREADABLE.broken(place, f"{reason} while it was decoded"))
            done += 1
    return findings


def _run_child(tasks: Sequence[Task], findings: list[Finding]) -> tuple[int, str]:
    """Return how many images one child decoded, and what ended it before the last ("" if nothing did)."""
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads hold
    parent_end, child_end = context.Pipe()
    child = context.Process(target=decode_each, args=(child_end, list(tasks)), daemon=True)
    child.start()
    child_end.close()
    num_answers = 0
    try:
        if not parent_end.poll(START_SECONDS) or parent_end.recv() != READY:
            return num_answers, _end(child)
        while num_answers < len(tasks):
            if not parent_end.poll(SECONDS_PER_IMAGE):
                _end(child)
                return num_answers, f"took more than {SECONDS_PER_IMAGE:g} s"
            problem = parent_end.recv()
            if problem:
                findings.append(image_finding(Path(tasks[num_answers].path), ImageError(problem)))
            num_answers += 1
    except EOFError:  # the child died
        return num_answers, _end(child)
    _end(child)
    return num_answers, ""


def _end(child: SpawnProcess) -> str:
    """Wait for a child that ends by itself, else end it; return how it ended."""
    child.join(1.0)
    if child.is_alive():
        child.kill()
        child.join()
    code = child.exitcode or 0
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    return f"the decoder died ({name})"
