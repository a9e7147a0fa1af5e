from collections import Counter

import pytest
from torch.utils.data import DistributedSampler

from onestage.data.samplers import EvaluationSampler, TrainingSampler
from onestage.errors import ConfigError, DataError


class Images:
    """A data set of which only the length matters."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.annotations = self
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
