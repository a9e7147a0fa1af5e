"""The validation losses."""

import pytest
import torch
from torchmetrics import Metric

from onestage.models import SSD160
from onestage.training.module import MeanPerPositive
from onestage.types import PADDING, Targets


def update(mean: MeanPerPositive, loss: float, num_positives: int) -> None:
    mean.update(torch.tensor(loss), torch.tensor(num_positives))


def test_each_loss_counts_as_much_as_its_positives() -> None:
    mean = MeanPerPositive()
    update(mean, 2.0, 24)
    update(mean, 9.0, 18)
    assert mean.compute().item() == 5.0  # (48 + 162) / 42; without the numbers 5.5
    mean.reset()
    update(mean, 3.0, 1)
    assert mean.compute().item() == 3.0


def test_batches_without_positives_add_their_loss_and_nothing_to_what_it_is_divided_by() -> None:
    mean = MeanPerPositive()
    update(mean, 4.0, 0)
    assert mean.compute().item() == 4.0  # nothing positive at all: by 1
    update(mean, 2.0, 0)
    assert mean.compute().item() == 6.0
    update(mean, 5.0, 3)
    assert mean.compute().item() == 7.0  # (4 + 2 + 15) / 3


@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 1, 1, 1], [1, 3]])
@pytest.mark.parametrize("labels_of_object", [1, PADDING])
def test_the_loss_of_some_images_is_the_same_in_any_batches(sizes: list[int], labels_of_object: int) -> None:
    torch.manual_seed(0)
    detector = SSD160(3).eval()
    images = torch.randint(0, 256, (4, 3, 160, 160), dtype=torch.uint8)
    boxes, labels = torch.zeros(4, 16, 4), torch.full((4, 16), PADDING)
    boxes[0, 0], labels[0, 0] = (
        torch.tensor([16.0, 16, 60, 50]),
        labels_of_object,
    )  # of four images, at most one has one
    with torch.no_grad():
        whole = detector.loss(detector(images), Targets(boxes, labels)).terms["classification"]
        mean = MeanPerPositive()
        for rows in torch.arange(4).split(sizes):
            losses = detector.loss(detector(images[rows]), Targets(boxes[rows], labels[rows]))
            mean.update(losses.terms["classification"], losses.num_positives)
    torch.testing.assert_close(mean.compute(), whole, rtol=1e-5, atol=0)


def test_processes_add_up_sums_and_numbers() -> None:
    mean = MeanPerPositive()
    for state in ("total", "num_positives", "num_updates"):
        assert mean._reductions[state] is not None
        assert mean._reductions[state](torch.tensor([1.0, 2.0])) == 3
    assert isinstance(mean, Metric)


def test_nothing_is_no_number_and_a_bad_value_stays_visible() -> None:
    mean = MeanPerPositive()
    assert mean.compute().isnan()
    update(mean, float("nan"), 1)
    update(mean, 1.0, 1)
    assert mean.compute().isnan()
