"""The DataLoader of training and evaluation: resumable inside an epoch, with one message per failure."""

import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from onestage.data.dataset import DetectionDataset, Failure, LoadedBatch, collate_with_failures
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.errors import ConfigError, DataError, OnestageError, ResourceError
from onestage.types import Batch

MAX_AUTO_WORKERS = 16  # more than one GPU needs at 200 images/s and core
NUM_QUOTED = 3  # images that a report quotes
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

    Nothing is loaded before the first batch is requested: Lightning creates the iterator before it sets the epoch of
    the sampler, so workers started at once would load the order of epoch 0 when training resumes.

    It takes DataLoader's own arguments, because Lightning rebuilds loaders from those. Only a loader with a
    `TrainingSampler` has a position.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = 0  # of the batches returned last
        self._num_returned = 0  # batches of that epoch
        self._resume_from: dict[str, int] | None = None
        self._failures: FailureLog | None = None
        self._processes: set[BaseProcess] = set()  # its workers

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, and therefore lazy
        """Iterate over the batches of the sampler's epoch.

        Raises:
            DataError: a worker died, or no batch came for `timeout` seconds.
            ResourceError: a worker died of too little shared memory.
        """
        sampler = self.sampler
        self._num_returned = self._take_offset()
        if isinstance(sampler, TrainingSampler):
            self._epoch = sampler.epoch
            sampler.batches_to_skip = self._num_returned
        try:
            for loaded in self._await_batches(super().__iter__):
                if isinstance(sampler, TrainingSampler):
                    sampler.batches_to_skip = 0  # for this epoch only; the sampler has read it by now
                self._num_returned += 1
                yield self._unpack(loaded)
        except OnestageError as error:
            raise type(error)(_original_message(error)) from error
        finally:  # also if the epoch is cut short
            if self._failures is not None:
                self._failures.end_epoch(self._epoch)

    def _await_batches(self, start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Iterate over what the workers deliver, and explain their deaths and timeouts."""
        others = set(active_children())
        iterator = start()
        self._processes |= set(active_children()) - others
        if self._processes and not _workers:
            Finalize(None, _kill_workers, exitpriority=0)  # runs before multiprocessing waits for its processes
        _workers.update(self._processes)
        while True:
            try:
                loaded = _deaths.next_of(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # a dead worker's queue may be cut off, too
                explained = _explained(error, self._processes, self.timeout)
                if explained is not error:
                    self._abandon(iterator)
                raise explained from error
            yield loaded

    def _abandon(self, iterator: Any) -> None:
        """Kill the workers of a broken iterator, and keep torch from reporting their deaths to the next loader."""
        for worker in self._processes:
            worker.kill()
        iterator._shutdown_workers()
        self._iterator = None
        _workers.difference_update(self._processes)
        self._processes.clear()

    def _unpack(self, loaded: Batch | LoadedBatch) -> Batch:
        """Return the batch, after counting what its workers could not read."""
        if not isinstance(loaded, LoadedBatch):
            return loaded
        if loaded.failures:
            if self._failures is None:
                dataset: Any = self.dataset
                self._failures = FailureLog(dataset.annotations.source, len(dataset), dataset.max_bad_fraction)
            self._failures.add(loaded.failures)
        return loaded.batch

    def _take_offset(self) -> int:
        """Return how many batches of this epoch were already used before training resumed."""
        state, self._resume_from = self._resume_from, None
        if state is None or not isinstance(self.sampler, TrainingSampler) or state["epoch"] != self.sampler.epoch:
            return 0
        return state["batches"] % self.sampler.num_batches

    def state_dict(self) -> dict[str, int]:
        """Return the position inside the epoch, and what the order of images depends on."""
        if self._resume_from is not None:
            return dict(self._resume_from)
        if not isinstance(self.sampler, TrainingSampler):
            return {}
        return {
            "epoch": self._epoch,
            "batches": self._num_returned,
            **{name: getattr(self.sampler, name) for name in KEY_BY_FIELD},
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration at the position of `state`, if that iteration is of the same epoch.

        Raises:
            ConfigError: the position lies inside an epoch whose order of images depended on other settings.
        """
        sampler = self.sampler
        if not state or not isinstance(sampler, TrainingSampler):
            return
        num_batches = state["num_images"] // (state["batch_size"] * state["world_size"])
        if state["batches"] % num_batches == 0:
            return  # between two epochs other settings do no harm
        for field, key in KEY_BY_FIELD.items():
            value = getattr(sampler, field)
            if value != state.get(field, value):
                raise ConfigError(
                    f"The checkpoint stopped after {state['batches']} of {num_batches} batches of epoch "
                    f"{state['epoch']}, when {key} was {state[field]}; now it is {value}, which gives other batches.\n"
                    f"Set it back to {state[field]}, or resume from a checkpoint written at the end of an epoch."
                )
        self._resume_from = dict(state)


class FailureLog:
    """Counts, in the training process, the images that its workers could not read.

    Args:
        source: the split, for messages.
        num_images: of the split.
        max_bad_fraction: the fraction of them that may fail before the run is stopped.
    """

    def __init__(self, source: str, num_images: int, max_bad_fraction: float) -> None:
        self.source = source
        self.num_images = num_images
        self.max_bad_fraction = max_bad_fraction
        self._messages: dict[int, str] = {}  # of all epochs, by image
        self._num_replaced = 0  # in this epoch; an image may be requested more than once

    def add(self, failures: Sequence[Failure]) -> None:
        """Count the failures of a batch, and warn about the first images.

        Raises:
            DataError: more images have failed than may.
        """
        for image_index, message in failures:
            self._num_replaced += 1
            if image_index not in self._messages:
                if len(self._messages) < NUM_QUOTED:
                    logger.warning("an image was skipped and another took its place: %s", message)
                self._messages[image_index] = message
        limit = self.max_bad_fraction * self.num_images
        if failures and len(self._messages) > limit:
            raise DataError(
                f"{self.source}: {len(self._messages)} of {self.num_images} images could not be read, more than "
                f"data.max_bad_fraction ({self.max_bad_fraction:g}) allows:\n  {self._quoted()}\n"
                "Repair or remove them, or raise data.max_bad_fraction."
            )

    def end_epoch(self, epoch: int) -> None:
        """Report what the epoch skipped, if anything, and reset the count."""
        num_replaced, self._num_replaced = self._num_replaced, 0
        if num_replaced:
            logger.warning(
                "epoch %d: %d times an image could not be read and another took its place; so far %d of the %d images "
                "of %s have failed:\n  %s",
                epoch,
                num_replaced,
                len(self._messages),
                self.num_images,
                self.source,
                self._quoted(),
            )

    def _quoted(self) -> str:
        lines = [message.partition("\n")[0] for message in list(self._messages.values())[:NUM_QUOTED]]
        more = len(self._messages) - len(lines)
        return "\n  ".join([*lines, *([f"and {more} more"] if more else [])])


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


def num_auto_workers(num_processes: int) -> int:
    """Return the workers for each of `num_processes`: one per core that this one may use, less one for training."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(num_cores // num_processes - 1, 0), MAX_AUTO_WORKERS)


def start_worker(_worker_id: int) -> None:
    """Prepare a worker: one OpenCV thread, and no reaction to the signals that stop a training.

    Ctrl-C and a SIGTERM to the whole process group reach the workers too; the training decides when they end.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _DeferredDeaths:
    """Delays torch's report of a worker's death until the next batch is awaited.

    torch raises it in its SIGCHLD handler, which would interrupt a training step at any place.
    """

    def __init__(self) -> None:
        self._torch_handler: Callable[[int, Any], Any] | None = None
        self._is_waiting = False

    def __call__(self, number: int, frame: Any) -> None:
        if self._is_waiting and self._torch_handler is not None:
            self._torch_handler(number, frame)

    def next_of(self, iterator: Iterator[Any]) -> Any:
        """Return the next batch; raise RuntimeError if a worker has died since the last one, or dies now."""
        handler: Any = signal.getsignal(signal.SIGCHLD)
        is_torch = callable(handler) and str(getattr(handler, "__module__", "")).startswith("torch.")
        if is_torch and threading.current_thread() is threading.main_thread():
            self._torch_handler = handler
            signal.signal(signal.SIGCHLD, self)
        self._is_waiting = True
        try:
            self(signal.SIGCHLD, None)
            return next(iterator)
        finally:
            self._is_waiting = False


_deaths = _DeferredDeaths()
_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # of this process


def _kill_workers() -> None:
    """Kill what an unclosed iterator has left: multiprocessing would wait for ever, as SIGTERM is ignored."""
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


def _explained(error: Exception, workers: set[BaseProcess], timeout_seconds: float) -> Exception:
    """Return the error to raise for one that a dead or slow worker has caused; others stay as they are."""
    if str(error).startswith("DataLoader timed out"):
        return DataError(
            f"no batch came from the workers of the loader for {timeout_seconds:g} s. An image may be on a network "
            "drive that does not answer, or the disk is slow.\nSet data.worker_timeout_seconds higher, or copy the "
            "data to a local disk; then continue with --resume auto."
        )
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
        f"a worker process of the loader {how}.\nThe system kills processes when memory runs out: lower "
        "data.num_workers. If it happens again at the same place, an image may be the cause: `onestage doctor` checks "
        "them. Then continue with --resume auto."
    )


def _original_message(error: OnestageError) -> str:
    """Return the message alone, without the traceback of a worker that torch has put before it."""
    text = str(error)
    _, found, message = text.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return message.strip() if found and text.startswith("Caught ") else text
