"""What a decoding child process runs. It imports little, so that a child starts in a fraction of a second."""

import contextlib
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from onestage.data.images import REMEDY, read_image
from onestage.errors import ImageError
from onestage.files import printable

MEMORY_BYTES = 4 << 30  # address space of a child: the largest image takes a gigabyte in all of its forms
READY = "ready"


class Task(NamedTuple):
    """One image to decode."""

    path: str
    annotated_size: tuple[int, int]  # (height, width); 0, 0 where the annotation gives none


def decode_each(answers: Connection, tasks: Sequence[Task]) -> None:
    """Send `READY`, and then for each image what is wrong with it, or "" where it can be decoded."""
    _limit_memory()
    answers.send(READY)
    for task in tasks:
        problem = ""
        try:
            read_image(task.path, task.annotated_size)
        except ImageError as reason:
            problem = str(reason)
        except MemoryError:
            problem = f"{printable(task.path)}: needs more memory than an image should.\n{REMEDY}"
        answers.send(problem)
    answers.close()


def _limit_memory() -> None:
    """Let this process fail rather than the machine. Where the system knows no such limit there is none."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
