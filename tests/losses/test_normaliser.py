import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from onestage.losses import PositiveNormaliser


def positives(number: int) -> torch.Tensor:
    return torch.arange(20)[None] < number


def test_without_momentum_divisor_is_the_number_of_positives_at_least_one() -> None:
    normaliser = PositiveNormaliser()
    assert normaliser(positives(7)) == 7
    assert normaliser(positives(0)) == 1
    assert not normaliser.state_dict()


def test_running_mean_starts_at_the_first_batch_and_moves_by_a_tenth_per_batch() -> None:
    normaliser = PositiveNormaliser(momentum=0.9)
    assert_close(normaliser(positives(10)), torch.tensor(10.0))
    assert_close(normaliser(positives(20)), torch.tensor(11.0))
    assert_close(normaliser(positives(0)), torch.tensor(0.9 * 11 + 0.1))  # 0 positives count as 1
    assert_close(normaliser.state_dict()["running_mean"], torch.tensor(10.0))


def test_evaluation_divides_by_its_own_positives_and_keeps_the_running_mean(monkeypatch) -> None:
    normaliser = PositiveNormaliser(momentum=0.9)
    normaliser(positives(10))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda count: pytest.fail("a collective call in validation may hang"))
    assert normaliser.eval()(positives(3)) == 3
    assert normaliser.running_mean == 10


@pytest.mark.parametrize(
    ("numbers", "expected"), [((3, 1), 2.0), ((1, 0), 0.5), ((0, 0), 0.5), ((1, 0, 0, 0), 0.25), ((0, 0, 2, 1), 0.75)]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_divisor_is_all_positives_at_least_one_over_the_number_of_processes(monkeypatch, numbers, expected, momentum):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(numbers))
    monkeypatch.setattr(dist, "all_reduce", lambda count: count.fill_(sum(numbers)))
    for number in numbers:
        normaliser = PositiveNormaliser(momentum)
        first, second = normaliser(positives(number)), normaliser(positives(number))
        assert_close(first, torch.tensor(expected))
        assert_close(second, torch.tensor(expected))
