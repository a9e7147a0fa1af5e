import pytest
import torch
from torch.testing import assert_close

from onestage.errors import ConfigError
from onestage.losses import PositiveNormaliser


def positives(number: int) -> torch.Tensor:
    return torch.arange(20)[None] < number


def test_without_momentum_it_is_the_number_of_positives_and_never_0() -> None:
    normaliser = PositiveNormaliser()
    assert normaliser(positives(7), is_training=True) == 7
    assert normaliser(positives(0), is_training=True) == 1
    assert not normaliser.state_dict()


def test_running_mean_starts_at_the_first_batch_and_moves_by_a_tenth() -> None:
    normaliser = PositiveNormaliser(momentum=0.9)
    assert_close(normaliser(positives(10), is_training=True), torch.tensor(10.0))
    assert_close(normaliser(positives(20), is_training=True), torch.tensor(11.0))
    assert_close(normaliser(positives(0), is_training=True), torch.tensor(0.9 * 11 + 0.1))  # none counts as one
    assert_close(normaliser.state_dict()["running_mean"], torch.tensor(10.0))


def test_evaluation_divides_by_its_own_number_and_leaves_the_mean_alone() -> None:
    normaliser = PositiveNormaliser(momentum=0.9)
    normaliser(positives(10), is_training=True)
    assert normaliser(positives(3), is_training=False) == 3
    assert normaliser.running_mean == 10


def test_bad_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"normaliser_momentum is 1\.0"):
        PositiveNormaliser(momentum=1.0)
