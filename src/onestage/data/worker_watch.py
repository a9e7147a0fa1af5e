"""What the worker processes of a loader are reading, so that one that dies or hangs is named with its file."""

import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import torch

from onestage.data.reading_note import NOTE_BYTES, take_note
from onestage.errors import DataError, ResourceError

LOOK_SECONDS = 1.0

Item = TypeVar("Item")

_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # by this process; multiprocessing holds them while alive


def _end_workers() -> None:
    """End what an iterator that was never closed has left running, when this process ends.

    multiprocessing would send them a SIGTERM, which they ignore, and then wait for them for ever.
    """
    for worker in list(_started):
        if worker.is_alive():
            worker.kill()


class WorkerWatch:
    """Watches the workers of one loader, from the process that waits for their batches.

    torch tells of a worker's death in a signal handler, that is, in the middle of whatever the training does then. Here
    the death shows where the next batch is asked for, between two steps, where the state of a run is whole.

    Args:
        num_workers: of the loader, >= 1.
    """

    def __init__(self, num_workers: int) -> None:
        # A tensor, because torch can hand it to workers however they are started.
        self._notes = torch.zeros(num_workers, NOTE_BYTES, dtype=torch.uint8)
        self._notes.share_memory_()  # type: ignore[no-untyped-call] # torch gives it no types
        self.timeout_seconds = 300.0  # for one batch, after which the worker that stands still counts as hung
        self._workers: Sequence[BaseProcess] = []
        self._hung: int | None = None  # the worker that this watch has ended
        self._waiting_since: float | None = None

    def start_function(self, then: Callable[[int], None] | None) -> Callable[[int], None]:
        """Return what a worker is to run when it starts: `then`, and taking up its notes."""
        return partial(_start_worker, self._notes, then)

    def batches(self, iterator: Iterator[Item]) -> Iterator[Item]:
        """Iterate over what the workers deliver.

        Raises:
            DataError: one of them died or hung; the message names its file.
            ResourceError: one of them died of too little shared memory.
        """
        _keep_deaths_for_later()
        self._workers = getattr(iterator, "_workers", [])
        if not _started:
            Finalize(None, _end_workers, exitpriority=0)  # run before multiprocessing waits for its processes
        _started.update(self._workers)
        is_over = threading.Event()
        threading.Thread(target=self._look_for_hangs, args=(is_over,), name="loader watch", daemon=True).start()
        try:
            while True:
                self._waiting_since = time.monotonic()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._explained(error) from error
                finally:
                    self._waiting_since = None
                yield item
        finally:
            is_over.set()

    def _look_for_hangs(self, is_over: threading.Event) -> None:
        seen: dict[int, tuple[bytes, float]] = {}  # what each worker has been reading, and since when
        while not is_over.wait(min(LOOK_SECONDS, self.timeout_seconds / 4)):
            now = time.monotonic()
            for number in range(len(self._workers)):
                note = self._notes[number].numpy().tobytes()
                if seen.get(number, (b"", 0.0))[0] != note:
                    seen[number] = (note, now)
            since = self._waiting_since
            if since is None or now - since < self.timeout_seconds or not seen:
                continue
            slowest = min(seen, key=lambda number: seen[number][1])
            self._hung = slowest
            with contextlib.suppress(OSError, TypeError):
                os.kill(self._workers[slowest].pid or 0, signal.SIGKILL)  # torch then sees that it is gone
            return

    def _explained(self, error: RuntimeError) -> Exception:
        """Name the worker behind an error of torch's, if it is one's."""
        if "DataLoader worker" not in str(error):
            return error
        if self._hung is not None:
            return DataError(
                f"a worker process of the loader stood still for {self.timeout_seconds:g} s at "
                f"{self._file(self._hung)} and was ended.\nIs that a pipe, or on a network drive that does not "
                "answer? Remove the file, copy the data to a local disk or set data.worker_timeout_seconds "
                "higher, then go on with --resume auto."
            )
        dead = [number for number, worker in enumerate(self._workers) if worker.exitcode]
        if not dead:
            return error
        code = self._workers[dead[0]].exitcode or 0
        if -code == signal.SIGBUS:
            return ResourceError(
                "a worker process of the loader found the shared memory full (/dev/shm).\n"
                "Start the container with --shm-size=8g, or set data.num_workers: 0."
            )
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return DataError(
            f"a worker process of the loader {how} at {self._file(dead[0])}.\nWithout anybody's doing it is the "
            "system's, when memory runs out: lower data.num_workers. If the same file is named again, the file is the "
            "cause: remove it. Then go on with --resume auto."
        )

    def _file(self, number: int) -> str:
        name = self._notes[number].numpy().tobytes().rstrip(b"\0").decode(errors="surrogateescape")
        return repr(name) if name else "its start, before any file"


def _start_worker(notes: torch.Tensor, then: Callable[[int], None] | None, number: int) -> None:
    # Ctrl-C and a SIGTERM to the whole group reach the workers too. When they end is for the training to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(number)
    take_note(notes[number].numpy())


def _keep_deaths_for_later() -> None:
    """Take back the handler by which torch raises wherever the main thread happens to be."""
    handler: Any = signal.getsignal(signal.SIGCHLD)
    is_torch = callable(handler) and str(getattr(handler, "__module__", "")).startswith("torch.")
    if is_torch and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
