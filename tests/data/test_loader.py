"""The loader: the same samples for any number of workers, exact resume, replaced images, dead and slow workers."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from image_sets import image_set, noise
from processes import finish, start

from onestage.data.dataset import DetectionDataset
from onestage.data.loader import DetectionLoader, num_auto_workers, open_loader
from onestage.data.resize import Stretch
from onestage.data.samplers import TrainingSampler
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.errors import ConfigError, DataError, ImageError, OnestageError
from onestage.types import AnnotationSet, Batch

NUM_IMAGES = 11
DAMAGED = (3, 7)
STRETCH = Stretch(32)


@pytest.fixture
def annotations(tmp_path: Path) -> AnnotationSet:
    """Eleven small images; the class of the object of each is the number of the image."""
    return image_set(tmp_path, [noise(30, 40, number) for number in range(NUM_IMAGES)])


@pytest.fixture
def damaged(annotations: AnnotationSet) -> AnnotationSet:
    for number in DAMAGED:
        Path(annotations.image_paths[number]).write_bytes(b"no image at all")
    return annotations


def dataset(annotations: AnnotationSet, seed: int = 0, **settings: object) -> DetectionDataset:
    return DetectionDataset(annotations, SeededTransform(ssd_transforms(STRETCH), STRETCH), seed=seed, **settings)


def training_loader(annotations, num_workers=0, batch_size=2, seed=0, world_size=1, start_method=None, **settings):
    images = dataset(annotations, seed, **settings)
    sampler = TrainingSampler(images, batch_size=batch_size, seed=seed, world_size=world_size)
    options = {"batch_size": batch_size, "num_workers": num_workers, "prefetch_factor": 2}
    return open_loader(images, sampler, **options, start_method=start_method)


def epoch_bytes(loader: DetectionLoader, epoch: int) -> list[bytes]:
    loader.sampler.set_epoch(epoch)
    return [as_bytes(batch) for batch in loader]


def as_bytes(batch: Batch) -> bytes:
    tensors = [batch.images, *batch.targets, batch.image_indices, batch.original_sizes, batch.placements]
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def test_samples_are_the_same_for_any_number_of_workers_and_new_in_every_epoch(annotations) -> None:
    expected = [epoch_bytes(training_loader(annotations), epoch) for epoch in range(3)]
    assert [len(epoch) for epoch in expected] == [5, 5, 5]
    assert len({batch for epoch in expected for batch in epoch}) == 15
    for num_workers in (1, 2):
        loader = training_loader(annotations, num_workers)
        assert [epoch_bytes(loader, epoch) for epoch in range(3)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_samples_are_the_same_for_any_start_method(annotations, start_method) -> None:
    expected = epoch_bytes(training_loader(annotations), 1)
    assert epoch_bytes(training_loader(annotations, 1, start_method=start_method), 1) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batches_done", [1, 4])
def test_resumed_epoch_returns_exactly_the_batches_that_were_left(annotations, num_workers, batches_done) -> None:
    whole = training_loader(annotations)
    expected = epoch_bytes(whole, 4)
    stopped = training_loader(annotations, num_workers)
    stopped.sampler.set_epoch(4)
    iterator = iter(stopped)
    for _ in range(batches_done):
        next(iterator)
    state = stopped.state_dict()
    assert (state["epoch"], state["batches"]) == (4, batches_done)
    resumed = training_loader(annotations, num_workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # also if it is saved again before its first batch
    iterator = iter(resumed)  # before the epoch is set, as Lightning does
    resumed.sampler.set_epoch(4)
    assert [as_bytes(batch) for batch in iterator] == expected[batches_done:]
    assert epoch_bytes(resumed, 5) == epoch_bytes(whole, 5)  # the next epoch is whole


@pytest.mark.parametrize(("state", "epoch"), [({"epoch": 0, "batches": 5}, 0), ({"epoch": 0, "batches": 3}, 1)])
def test_position_at_the_end_of_an_epoch_or_of_another_epoch_is_not_used(annotations, state, epoch) -> None:
    loader = training_loader(annotations)
    loader.load_state_dict(loader.state_dict() | state)
    assert len(epoch_bytes(loader, epoch)) == 5


def test_abandoned_iteration_does_not_shift_the_next(annotations) -> None:
    loader = training_loader(annotations)
    expected = epoch_bytes(loader, 0)
    loader.load_state_dict(loader.state_dict() | {"batches": 2})
    loader.sampler.set_epoch(0)
    next(iter(loader))
    assert epoch_bytes(loader, 0) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"(?s)seed_everything was 0; now it is 1.*back to 0"),
        ({"batch_size": 3}, r"(?s)after 2 of 5 batches of epoch 1, when data.batch_size was 2; now it is 3"),
        ({"world_size": 2}, "trainer.devices was 1; now it is 2"),
    ],
)
def test_position_inside_an_epoch_needs_the_same_settings(annotations, change, message) -> None:
    state = training_loader(annotations).state_dict() | {"epoch": 1, "batches": 2}
    other = training_loader(annotations, **change)
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(state)
    other.load_state_dict(state | {"batches": 5})  # between two epochs they may change


def test_substitute_is_another_sample_that_seed_epoch_and_index_decide(damaged) -> None:
    split, again = dataset(damaged, on_error="skip"), dataset(damaged, on_error="skip")
    again[0, 1]
    taken = set()
    for epoch in range(30):
        sample, other = split[epoch, 3], again[epoch, 3]
        assert sample.image.numpy().tobytes() == other.image.numpy().tobytes()
        assert sample.image_index == other.image_index not in DAMAGED
        assert set(sample.labels.tolist()) <= {sample.image_index}  # its own object, not the damaged image's
        assert sample.failures[0].image_index == 3
        assert damaged.image_paths[3] in sample.failures[0].message
        taken.add(sample.image_index)
    assert len(taken) > 6  # not always the same one
    assert split[0, 1].failures == ()


def test_samples_with_substitutes_are_the_same_for_any_number_of_workers(damaged) -> None:
    settings = {"on_error": "skip", "max_bad_fraction": 0.5, "mosaic": 0.3, "mixup": 0.3}
    expected = [epoch_bytes(training_loader(damaged, **settings), epoch) for epoch in range(2)]
    workers = training_loader(damaged, 2, **settings)
    assert [epoch_bytes(workers, epoch) for epoch in range(2)] == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_failures_are_reported_at_the_end_of_each_epoch(damaged, num_workers, caplog) -> None:
    split = training_loader(
        damaged, num_workers, batch_size=11, on_error="skip", max_bad_fraction=0.01
    )  # two always may
    assert len(epoch_bytes(split, 0)) == 1
    assert len([message for message in caplog.messages if "an image was skipped" in message]) == 2
    said = "epoch 0: 2 times an image could not be read and another took its place; so far 2 of the 11 images of hand-"
    assert caplog.messages[-1].startswith(said)
    assert all(damaged.image_paths[number] in caplog.messages[-1] for number in DAMAGED)
    caplog.clear()
    epoch_bytes(split, 1)
    assert [message[:16] for message in caplog.messages] == ["epoch 1: 2 times"]  # each image only once


TOO_MANY = (
    r"(?s)^hand-written: 2 of 11 images could not be read, more than data\.max_bad_fraction \(0\).*fraction: 0\.19"
)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"on_error": "raise"}, ImageError, r"^[^\n]*[37]\.png: is not an image"),
        ({"on_error": "skip", "max_bad_fraction": 0.0}, DataError, TOO_MANY),
    ],
)
def test_bad_images_stop_the_run_with_the_message_alone(damaged, num_workers, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        epoch_bytes(training_loader(damaged, num_workers, batch_size=11, **settings), 0)


def test_unreadable_partner_of_a_mosaic_is_replaced(damaged) -> None:
    split = dataset(damaged, on_error="skip", mosaic=1.0)
    failures = [failure.image_index for epoch in range(10) for failure in split[epoch, 0].failures]
    assert set(failures) == set(DAMAGED)


def test_set_without_a_readable_image_ends_with_the_name_of_one(annotations) -> None:
    for path in annotations.image_paths:
        Path(path).write_bytes(b"")
    with pytest.raises(ImageError, match=r"\d+\.png"):
        dataset(annotations, on_error="skip")[0, 0]


class Harmful(DetectionDataset):
    """Ends or delays its worker at one image."""

    harm = staticmethod(lambda: None)

    def __getitem__(self, key: tuple[int, int]):
        if torch.utils.data.get_worker_info() is not None and key[1] == 5:
            self.harm()
        return super().__getitem__(key)


def harmful_loader(annotations: AnnotationSet, harm, timeout_seconds: float = 60.0) -> DetectionLoader:
    images = Harmful(annotations, SeededTransform([], STRETCH))
    images.harm = harm
    sampler = TrainingSampler(images, batch_size=2, seed=0)
    return open_loader(images, sampler, batch_size=2, num_workers=1, timeout_seconds=timeout_seconds)


def started(loader, num_batches=1):
    """Return an iterator after some batches, and its worker."""
    others = set(torch.multiprocessing.active_children())  # exceptions of earlier tests keep their workers alive
    iterator = iter(loader)
    for _ in range(num_batches):
        next(iterator)
    (worker,) = set(torch.multiprocessing.active_children()) - others
    return iterator, worker


@pytest.mark.parametrize(
    ("harm", "exit_code", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 3, "(?s)was killed by SIGKILL.*data.num_workers"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), 5, "(?s)shared memory full.*--shm-size"),
        (lambda: time.sleep(100), 3, "(?s)no batch came .* for 2 s.*data.worker_timeout_seconds"),
    ],
    ids=["killed", "shared memory full", "hangs"],
)
def test_worker_that_dies_or_hangs_is_one_message(annotations, harm, exit_code, message) -> None:
    loader = harmful_loader(annotations, harm, 2.0 if "no batch" in message else 60.0)
    with pytest.raises(OnestageError, match=message) as caught:
        list(loader)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize("is_between_epochs", [False, True])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "a worker process of the loader was killed by SIGKILL"),
        # Its batches are sent, but not the memory they lie in: torch waits for that without any timeout.
        pytest.param(signal.SIGSTOP, "no batch came from the workers of the loader for 4 s", marks=pytest.mark.slow),
    ],
)
def test_worker_that_ends_outside_the_loader_is_reported_next(annotations, number, message, is_between_epochs) -> None:
    loader = harmful_loader(annotations, lambda: None, 4.0 if number == signal.SIGSTOP else 60.0)
    iterator, worker = started(loader, len(loader) if is_between_epochs else 1)
    time.sleep(0.5)
    os.kill(worker.pid, number)
    time.sleep(0.5)  # a training step, which torch's own signal handler would interrupt
    with pytest.raises(DataError, match=message):
        list(loader if is_between_epochs else iterator)


def test_death_in_an_idle_loader_is_explained_by_the_one_that_waits(annotations) -> None:
    _idle, worker = started(harmful_loader(annotations, lambda: None))
    waiting, _ = started(harmful_loader(annotations, lambda: None))
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # not join(), which would keep its death from torch
    with pytest.raises(DataError, match="a worker process of the loader was killed by SIGKILL"):
        list(waiting)


def test_workers_of_a_broken_iterator_disturb_no_later_one(annotations) -> None:
    others = set(torch.multiprocessing.active_children())
    loader = harmful_loader(annotations, lambda: time.sleep(100), 2.0)
    with pytest.raises(DataError, match="no batch came"):
        list(loader)
    assert set(torch.multiprocessing.active_children()) <= others
    assert len(list(iter(harmful_loader(annotations, lambda: None)))) == len(loader)
    loader.dataset.harm, loader.timeout = lambda: None, 60.0  # a busy machine may need more than 2 s
    assert len(list(loader)) == len(loader)


LEFT_OPEN = """
import multiprocessing, torch
from onestage.data.loader import DetectionLoader, start_worker
options = dict(num_workers=2, worker_init_fn=start_worker, persistent_workers=True, timeout=60)
iterator = iter(DetectionLoader(torch.arange(100), **options))
print(int(next(iterator)), *(worker.pid for worker in multiprocessing.active_children()))
"""


@pytest.mark.slow
def test_process_ends_although_an_iterator_was_never_closed() -> None:
    first, *workers = finish(start("-c", LEFT_OPEN))[0].split()
    assert first == "0"
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "on_gpu", "on_cpu"),
    [(1, 1, 0, 0), (2, 1, 1, 0), (4, 1, 3, 3), (4, 2, 1, 0), (64, 1, 16, 16)],
)
def test_auto_leaves_a_core_to_training_and_two_cores_of_a_cpu(num_cores, num_processes, on_gpu, on_cpu, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    assert num_auto_workers(num_processes) == on_gpu
    assert num_auto_workers(num_processes, trains_on_cpu=True) == on_cpu
