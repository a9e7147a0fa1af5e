"""Which file a worker process of a loader is reading, for the process that watches it. Nothing heavy is imported."""

import numpy as np
import numpy.typing as npt

NOTE_BYTES = 1024

Note = npt.NDArray[np.uint8]  # [NOTE_BYTES], in memory that the worker shares with the process that watches it

_note: Note | None = None  # in a worker: where it writes down what it reads


def take_note(note: Note) -> None:
    """Let this process write down what it reads."""
    global _note
    _note = note


def note_reading(path: str) -> None:
    """Write down, in a worker process, which file is about to be read. Elsewhere this does nothing."""
    if _note is not None:
        name = path.encode(errors="surrogateescape")[:NOTE_BYTES]
        _note[: len(name)] = np.frombuffer(name, dtype=np.uint8)
        _note[len(name) :] = 0
