"""The DataLoader of training and evaluation: it can stop and go on inside an epoch, and it hands on errors whole."""

import os
from collections.abc import Iterator
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from onestage.data.dataset import DetectionDataset, LoadedBatch, collate_with_failures
from onestage.data.failures import FailureLog
from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.data.worker_watch import WorkerWatch
from onestage.errors import ConfigError, OnestageError
from onestage.types import Batch

MAX_AUTO_WORKERS = 16  # at 200 images/s and core more than one GPU takes
KEY_BY_FIELD = {
    "seed": "seed_everything",
    "batch_size": "data.batch_size",
    "world_size": "trainer.devices",
    "num_images": "the number of training images in an epoch",
    "selection": "the choice of training images (data.fold, data.sampling and the like; a number stands for it)",
}

StartMethod = Literal["fork", "spawn", "forkserver"]


class DetectionLoader(DataLoader[Batch]):
    """Counts the batches it hands out, and can begin an epoch after those that a checkpoint has counted.

    Nothing is loaded before the first batch is asked for. Lightning creates the iterator before it tells the sampler
    the epoch, so workers started at once would load the order of epoch 0 when training resumes.

    It takes DataLoader's own arguments, as Lightning rebuilds loaders from those. Only a loader with a
    `TrainingSampler` has a position.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = 0  # of the batches handed out last
        self._num_handed_out = 0  # batches of that epoch
        self._resume_from: dict[str, int] | None = None
        self._failures: FailureLog | None = None
        self.watch = WorkerWatch(self.num_workers) if self.num_workers else None
        if self.watch is not None:
            self.worker_init_fn = self.watch.start_function(self.worker_init_fn)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator: this is what makes it lazy
        """Iterate over the batches of the sampler's epoch."""
        sampler = self.sampler
        self._num_handed_out = self._take_offset()
        if isinstance(sampler, TrainingSampler):
            self._epoch = sampler.epoch
            sampler.batches_to_skip = self._num_handed_out
        try:
            iterator = super().__iter__()
            for loaded in self.watch.batches(iterator) if self.watch is not None else iterator:
                if isinstance(sampler, TrainingSampler):
                    sampler.batches_to_skip = 0  # for this epoch only; the sampler has read it by now
                self._num_handed_out += 1
                yield self._unpacked(loaded)
        except OnestageError as error:
            raise type(error)(_original_message(error)) from error
        finally:  # also where the epoch is cut short
            if self._failures is not None:
                self._failures.end_epoch(self._epoch)

    def _unpacked(self, loaded: Batch | LoadedBatch) -> Batch:
        """Return the batch alone, after taking note of what its workers could not read."""
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
            "batches": self._num_handed_out,
            **{name: getattr(self.sampler, name) for name in KEY_BY_FIELD},
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration at the position of `state`, if that iteration is of the same epoch.

        Raises:
            ConfigError: the position lies inside an epoch whose order of images depended on other settings.
        """
        sampler = self.sampler
        if not state or not isinstance(sampler, TrainingSampler):
            return
        num_batches = state["num_images"] // (state["batch_size"] * state["world_size"])
        if state["batches"] % num_batches == 0:
            return  # between two epochs nothing is left over, so other settings do no harm
        for field, key in KEY_BY_FIELD.items():
            value = getattr(sampler, field)
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
    prefetch_factor: int,
    start_method: StartMethod | None,
    timeout_seconds: float,
) -> DetectionLoader:
    """Return the loader of a split. Workers stay alive between epochs, and images are pinned where there is a GPU."""
    loader = DetectionLoader(
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
    )
    if loader.watch is not None:
        loader.watch.timeout_seconds = timeout_seconds
    return loader


def num_auto_workers(num_processes: int) -> int:
    """Return the workers for each of `num_processes`: one per core that this one may use, less one for training."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(num_cores // num_processes - 1, 0), MAX_AUTO_WORKERS)


def start_worker(_worker_id: int) -> None:
    """Keep OpenCV to one thread in each worker process: the workers are the parallelism."""
    cv2.setNumThreads(0)


def _original_message(error: OnestageError) -> str:
    """Return the message alone where torch has wrapped a worker's traceback around it."""
    text = str(error)
    _, found, message = text.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return message.strip() if found and text.startswith("Caught ") else text
