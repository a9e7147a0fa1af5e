from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from onestage.data.samplers import EvaluationSampler, TrainingSampler, draw_copies
from onestage.errors import ConfigError, DataError


class Images:
    """A data set of which only the length matters."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.annotations = self
        self.image_ids = np.arange(number)
        self.source = "some/folder"

    def __len__(self) -> int:
        return self.number


def epoch_of(num_images: int, batch_size: int, world_size: int, *, epoch: int = 0, seed: int = 0) -> list[list]:
    """What each process gets in an epoch."""
    shares = []
    for rank in range(world_size):
        sampler = TrainingSampler(
            Images(num_images), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
        )
        sampler.set_epoch(epoch)
        share = list(sampler)
        assert len(share) == len(sampler)
        shares.append(share)
    return shares


def test_training_order_is_a_permutation_tagged_with_its_epoch() -> None:
    ((*share,),) = epoch_of(20, 5, 1, epoch=3)
    assert sorted(share) == [(3, index) for index in range(20)]
    assert share != sorted(share)


def test_training_order_depends_on_seed_and_epoch_only() -> None:
    orders = [tuple(i for _, i in epoch_of(20, 5, 1, epoch=e, seed=s)[0]) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9
    assert epoch_of(20, 5, 1, epoch=2, seed=1) == epoch_of(20, 5, 1, epoch=2, seed=1)


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), [(23, 4, 1), (23, 4, 2), (23, 2, 3), (24, 4, 3)])
def test_training_shards_have_equal_batches_and_no_image_twice(
    num_images: int, batch_size: int, world_size: int
) -> None:
    shares = epoch_of(num_images, batch_size, world_size)
    batches = num_images // (batch_size * world_size)
    assert [len(share) for share in shares] == [batches * batch_size] * world_size
    assert max(Counter(index for share in shares for _, index in share).values()) == 1


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_training_step_has_the_same_images_for_any_number_of_processes(world_size: int) -> None:
    (alone,) = epoch_of(40, 12, 1)
    shares = epoch_of(40, 12 // world_size, world_size)
    for step in range(3):
        size = 12 // world_size
        together = [item for share in shares for item in share[step * size : (step + 1) * size]]
        assert sorted(together) == sorted(alone[step * 12 : (step + 1) * 12])


def test_training_images_left_out_of_one_epoch_come_in_another() -> None:
    seen = {index for epoch in range(10) for _, index in epoch_of(23, 8, 1, epoch=epoch)[0]}
    assert seen == set(range(23))


def test_training_can_skip_batches() -> None:
    sampler = TrainingSampler(Images(20), batch_size=3, seed=0, rank=1, world_size=2)
    whole = list(sampler)
    sampler.batches_to_skip = 2
    assert list(sampler) == whole[6:]


def test_training_split_smaller_than_a_batch_names_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"(?s)data.batch_size is 8, .*only 7 images.*at most 7"):
        TrainingSampler(Images(7), batch_size=8, seed=0)
    with pytest.raises(ConfigError, match=r"(?s)on each of 4 processes.*only 7 images.*at most 1"):
        TrainingSampler(Images(7), batch_size=8, seed=0, world_size=4)


# Images that come more than once

REPEATS = np.array([0.25, 1.0, 2.5, 0.75, 1.0, 3.0, 1.5])  # 10 images an epoch


def repeated_epoch(epoch: int, *, batch_size: int = 2, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
    sampler = TrainingSampler(
        Images(7), batch_size=batch_size, seed=1, rank=rank, world_size=world_size, repeats=REPEATS
    )
    sampler.set_epoch(epoch)
    assert len(sampler) * world_size == 10
    return list(sampler)


def test_repeated_images_come_as_often_as_asked_on_average_and_never_off_by_more_than_one() -> None:
    counts = np.zeros((400, 7))
    for epoch in range(400):
        items = [item for _, item in repeated_epoch(epoch)]
        assert len(set(items)) == 10  # each copy has an item of its own, so it is augmented in its own way
        counts[epoch] = np.bincount([item % 7 for item in items], minlength=7)
    assert (counts >= np.floor(REPEATS)).all()
    assert (counts <= np.ceil(REPEATS)).all()
    assert counts.mean(axis=0) == pytest.approx(REPEATS, abs=0.08)  # three standard deviations of 400 coins


def test_repeated_images_depend_on_seed_and_epoch_only_and_not_on_the_number_of_processes() -> None:
    alone = repeated_epoch(3, batch_size=2)
    assert alone == repeated_epoch(3, batch_size=2)
    assert alone != repeated_epoch(4, batch_size=2)
    shares = [repeated_epoch(3, batch_size=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert [set(pair) for pair in zip(*shares, strict=True)] == [set(alone[i : i + 2]) for i in range(0, 10, 2)]


def test_repeated_images_can_be_resumed_inside_an_epoch() -> None:
    sampler = TrainingSampler(Images(7), batch_size=2, seed=1, repeats=REPEATS)
    whole = list(sampler)
    sampler.batches_to_skip = 3
    assert list(sampler) == whole[6:]


def test_copies_of_whole_repeats_are_not_random() -> None:
    items = draw_copies(np.array([2.0, 0.0, 1.0]), np.random.default_rng(0))
    assert items.tolist() == [0, 3, 2]  # image 0 twice: items 0 and 0 + 3; image 1 never; image 2 once


@pytest.mark.parametrize("fraction", [1 / 3, 0.1, 0.7])
def test_copies_add_up_whatever_rounding_does_to_the_sum(fraction: float) -> None:
    repeats = np.full(30_000, fraction)
    for seed in range(5):
        number = len(draw_copies(repeats, np.random.default_rng(seed)))
        assert number >= int(repeats.sum() + 1e-6)


def test_another_choice_of_images_has_another_number() -> None:
    def selection(repeats: np.ndarray | None) -> int:
        return TrainingSampler(Images(7), batch_size=1, seed=0, repeats=repeats).selection

    assert selection(None) == selection(None)
    assert len({selection(None), selection(REPEATS), selection(REPEATS[::-1].copy())}) == 3


# Evaluation


@pytest.mark.parametrize("num_images", [7, 8, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_visits_every_image_exactly_once(num_images: int, world_size: int) -> None:
    samplers = [EvaluationSampler(Images(num_images), rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert sorted(index for share in shares for index in share) == list(range(num_images))
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_of_fewer_images_than_processes_is_refused() -> None:
    with pytest.raises(DataError, match=r"(?s)some/folder has 3 images for 4 processes.*trainer.devices to at most 3"):
        EvaluationSampler(Images(3), rank=0, world_size=4)


def test_lightning_takes_both_for_sharded_already() -> None:
    assert issubclass(EvaluationSampler, DistributedSampler)
    assert issubclass(TrainingSampler, DistributedSampler)
