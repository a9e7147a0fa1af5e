"""The mean of validation losses."""

import torch

from onestage.training.weighted_mean import WeightedMean


def test_each_value_counts_as_much_as_its_weight() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor(2.0), torch.tensor(24.0))
    mean.update(torch.tensor(9.0), torch.tensor(18.0))
    assert mean.compute().item() == 5.0  # (48 + 162) / 42; without the weights 5.5
    mean.reset()
    mean.update(torch.tensor(3.0), torch.tensor(1.0))
    assert mean.compute().item() == 3.0


def test_nothing_is_no_number_and_a_bad_value_stays_visible() -> None:
    mean = WeightedMean()
    assert mean.compute().isnan()
    mean.update(torch.tensor(float("nan")), torch.tensor(1.0))
    mean.update(torch.tensor(1.0), torch.tensor(1.0))
    assert mean.compute().isnan()
