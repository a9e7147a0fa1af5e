"""The DataLoader of training and evaluation: resumable inside an epoch, with one message per failure."""

import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from onestage.data.annotations import BAD_FRACTION_KEY, NUM_QUOTED, enough_allowed, num_allowed, quoted
from onestage.data.dataset import DetectionDataset, Failure, LoadedBatch, collate_with_failures
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.errors import ConfigError, DataError, OnestageError, ResourceError
from onestage.types import Batch

GRACE_SECONDS = 2.0  # torch's own timeout comes first
MAX_AUTO_WORKERS = 16  # more than one GPU needs at 200 images/s and core
KEY_BY_FIELD = {
    "seed": "seed_everything",
    "batch_size": "data.batch_size",
    "world_size": "trainer.devices",
    "num_images": "the number of training images in an epoch",
    "selection": "the choice of training images (a checksum of data.fold, data.sampling and the like)",
}

StartMethod = Literal["fork", "spawn", "forkserver"]

logger = logging.getLogger(__name__)


class DetectionLoader(DataLoader[Batch]):
    """Counts the batches it returns, and can start an epoch after those that a checkpoint has counted.

    Nothing is loaded before the first batch is requested, because Lightning creates the iterator before it sets the
    epoch of the sampler. It takes DataLoader's own arguments, because Lightning rebuilds loaders from those. Only a
    loader with a `TrainingSampler` has a position.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = 0  # of the batches returned last
        self._num_returned = 0  # batches of that epoch
        self._resume_from: dict[str, int] = {}
        self.unreadable: dict[int, str] = {}  # row of an image that could not be read -> the reason, in all epochs
        self._num_replaced = 0  # in this epoch; an image may be requested more than once
        self._processes: set[BaseProcess] = set()  # its workers
        self._awaited_since = math.inf  # the time since which the next batch is awaited
        self._is_overdue = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, and therefore lazy
        """Iterate over the batches of the sampler's epoch.

        Raises DataError if a worker died or no batch came in time, ResourceError if the shared memory was full.
        """
        sampler = self.sampler if isinstance(self.sampler, TrainingSampler) else None
        position, self._resume_from = self._resume_from, {}
        self._num_returned = 0
        if sampler is not None:
            self._epoch = sampler.epoch
            if position.get("epoch") == sampler.epoch:
                self._num_returned = position["batches"] % sampler.num_batches
            sampler.batches_to_skip = self._num_returned
        try:
            for loaded in self._await_batches(super().__iter__):
                if sampler is not None:
                    sampler.batches_to_skip = 0  # for this epoch only; the sampler has read it by now
                self._num_returned += 1
                if isinstance(loaded, LoadedBatch):
                    self._count_failures(loaded.failures)
                    loaded = loaded.batch
                yield loaded
        except OnestageError as error:  # torch puts the traceback of a worker before its message
            text, name = str(error), f"{type(error).__module__}.{type(error).__qualname__}: "
            raise type(error)(text.rpartition(name)[2].strip() if text.startswith("Caught ") else text) from error
        finally:  # also if the epoch is cut short
            self._report_replaced()

    def _await_batches(self, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Iterate over what the workers deliver, and explain their deaths and timeouts."""
        others, iterator, is_over = {*active_children()}, None, threading.Event()
        if self.timeout:
            threading.Thread(target=self._kill_overdue_workers, args=(is_over,), daemon=True).start()
        try:
            if any(worker.exitcode for worker in self._processes):  # active_children has kept that from torch
                raise RuntimeError("DataLoader worker died between two epochs")
            while True:
                self._awaited_since = time.monotonic()
                if iterator is None:  # workers of an earlier epoch answer here that they are ready
                    iterator = _call_noticing_deaths(start)
                    self._processes |= {*active_children()} - others
                    if self._processes and not _workers:
                        Finalize(None, _kill_workers, exitpriority=0)  # before multiprocessing waits for its processes
                    _workers.update(self._processes)
                loaded = _call_noticing_deaths(iterator.__next__)
                self._awaited_since = math.inf
                yield loaded
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:  # a dead worker's queue may be cut off, too
            if self._is_overdue or str(error).startswith("DataLoader timed out"):
                explained: Exception = DataError(
                    f"no batch came from the workers of the loader for {self.timeout:g} s; the disk or network drive "
                    "may be slow.\nSet data.worker_timeout_seconds higher, or copy the data to a local disk; then "
                    "continue with --resume auto."
                )
            else:
                explained = _explained(error, self._processes)
            if explained is not error:
                self._abandon(iterator or self._iterator)
            raise explained from error
        finally:
            self._awaited_since = math.inf
            is_over.set()

    def _kill_overdue_workers(self, is_over: threading.Event) -> None:
        """Kill workers that block this process: a stopped one, in the middle of a transfer, escapes torch's timeout."""
        while not is_over.wait(1):
            if time.monotonic() - self._awaited_since > self.timeout + GRACE_SECONDS:
                self._is_overdue = True
                for worker in self._processes:
                    worker.kill()
                return

    def _abandon(self, iterator: Any) -> None:
        """Kill the workers of a broken iterator, and keep torch from reporting their deaths to the next loader."""
        for worker in self._processes:
            worker.kill()
        if iterator is not None:
            iterator._shutdown_workers()
        self._iterator, self._is_overdue = None, False
        _workers.difference_update(self._processes)
        self._processes.clear()

    def _count_failures(self, failures: Sequence[Failure]) -> None:
        """Count the unread images of a batch, and warn of the first; DataError above `max_bad_fraction` of the set."""
        if not failures:
            return
        images: Any = self.dataset  # a DetectionDataset: others report no failures
        is_left_out = images.on_error == "leave_out"
        for image_index, message in failures:
            if image_index not in self.unreadable and len(self.unreadable) < NUM_QUOTED:
                what = "left out" if is_left_out else "skipped and another took its place"
                logger.warning("an image was %s: %s", what, message)
            self.unreadable.setdefault(image_index, message)
        if is_left_out:
            return
        self._num_replaced += len(failures)
        if len(self.unreadable) > num_allowed(images.max_bad_fraction, len(images)):
            raise DataError(
                f"{images.annotations.source}: {len(self.unreadable)} of {len(images)} images could not be read, "
                f"more than data.max_bad_fraction ({images.max_bad_fraction:g}) allows:\n  {self._quote_unreadable()}\n"
                f"Repair or remove them, or allow more: {BAD_FRACTION_KEY} "
                f"{enough_allowed(len(self.unreadable), len(images))}"
            )

    def _report_replaced(self) -> None:
        num_replaced, self._num_replaced = self._num_replaced, 0
        if num_replaced:
            images: Any = self.dataset
            logger.warning(
                f"epoch {self._epoch}: {num_replaced} times an image could not be read and another took its place; so "
                f"far {len(self.unreadable)} of the {len(images)} images of {images.annotations.source} have failed:\n"
                f"  {self._quote_unreadable()}"
            )

    def _quote_unreadable(self) -> str:
        return quoted([message.partition("\n")[0] for message in self.unreadable.values()])

    def state_dict(self) -> dict[str, int]:
        """Return the position inside the epoch, and what the order of images depends on."""
        if self._resume_from or not isinstance(self.sampler, TrainingSampler):
            return dict(self._resume_from)
        settings = {name: getattr(self.sampler, name) for name in KEY_BY_FIELD}
        batches = {"batches": self._num_returned, "num_batches": self.sampler.num_batches}
        return {"epoch": self._epoch, **batches, **settings}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration of its epoch at the position of `state`; ConfigError if its order was another."""
        if not state or not isinstance(self.sampler, TrainingSampler):
            return
        num_batches = state.get("num_batches", state["num_images"] // (state["batch_size"] * state["world_size"]))
        if state["batches"] % num_batches == 0:
            return  # between two epochs other settings do no harm
        for field, key in KEY_BY_FIELD.items():
            value = getattr(self.sampler, field)
            if value != state.get(field, value):
                raise ConfigError(
                    f"The checkpoint stopped after {state['batches']} of {num_batches} batches of epoch "
                    f"{state['epoch']}, when {key} was {state[field]}; now it is {value}, which gives other batches.\n"
                    f"Set it back to {state[field]}, or resume from a checkpoint written at the end of an epoch."
                )
        self._resume_from = dict(state)


def open_loader(
    dataset: DetectionDataset,
    sampler: TrainingSampler | EvaluationSampler,
    *,
    batch_size: int,
    num_workers: int,
    prefetch_factor: int = 4,
    start_method: StartMethod | None = None,
    timeout_seconds: float = 300.0,
) -> DetectionLoader:
    """Return the loader of a split. Workers stay alive between epochs, and images are pinned if there is a GPU."""
    return DetectionLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_with_failures,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        multiprocessing_context=start_method if num_workers else None,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        timeout=timeout_seconds if num_workers else 0,
    )


def num_auto_workers(num_processes: int, trains_on_cpu: bool = False) -> int:
    """Return the workers for each of `num_processes`: one per core that this one may use, less one for training.

    None for a CPU with two cores, where a worker costs the training more than it saves: a step of `make train` took 206
    and 223 ms with one, 187 and 203 ms without, in turns (EPYC, Zen 3, fp32).
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_cores //= num_processes
    return 0 if trains_on_cpu and num_cores <= 2 else min(max(num_cores - 1, 0), MAX_AUTO_WORKERS)


def start_worker(_worker_id: int) -> None:
    """Prepare a worker: one OpenCV thread, and no reaction to the signals that stop a training.

    Ctrl-C and a SIGTERM to the whole process group reach the workers too; the training decides when they end.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_torch_handler: Any = None  # of SIGCHLD
_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # of this process


def _call_noticing_deaths(function: Callable[[], Any]) -> Any:
    """Call a function that awaits workers; raise RuntimeError if one has died since the last call, or dies now.

    torch raises it in its handler of SIGCHLD, which would interrupt a training step at any place. So the handler is
    active only while a batch is awaited.
    """
    global _torch_handler
    previous: Any = signal.getsignal(signal.SIGCHLD)
    if str(getattr(previous, "__module__", "")).startswith("torch."):
        _torch_handler, previous = previous, signal.SIG_DFL
    if _torch_handler is None or threading.current_thread() is not threading.main_thread():
        return function()
    signal.signal(signal.SIGCHLD, _torch_handler)
    try:
        _torch_handler(signal.SIGCHLD, None)
        return function()
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)  # None: a handler that Python cannot restore


def _kill_workers() -> None:
    """Kill what an unclosed iterator has left: multiprocessing would wait for ever, as SIGTERM is ignored."""
    for worker in _workers:
        worker.kill()


def _explained(error: Exception, workers: set[BaseProcess]) -> Exception:
    """Return the error to raise for one that a dead worker has caused; others stay as they are."""
    if str(error).startswith("DataLoader worker"):
        workers = workers.union(_workers)  # torch reports those of the other split to whichever loader waits
    for worker in workers:
        worker.join(0.1)  # it may be dying
    code = next((worker.exitcode for worker in workers if worker.exitcode), None)
    if code is None:
        return error
    if code == -signal.SIGBUS:
        return ResourceError(
            "a worker process of the loader found the shared memory full (/dev/shm).\n"
            "Start the container with --shm-size=8g, or set data.num_workers: 0."
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return DataError(
        f"a worker process of the loader {how}, perhaps because memory ran out, or of a damaged image.\nLower "
        "data.num_workers, or check the images with `onestage doctor`; then continue with --resume auto."
    )
