import math
from pathlib import Path

import pytest
import torch
from faulty_training import FaultyDetector, train
from lightning.pytorch.loggers import CSVLogger
from torch.testing import assert_close

from onestage.evaluation.analysis import anchor_statistics, missing_prior
from onestage.training.callbacks import AnchorMonitor
from onestage.types import BACKGROUND, IGNORE, AnchorLosses, Anchors

# Two images of five anchors: three at stride 8, two at stride 16.
STRIDES = torch.tensor([8.0, 8.0, 8.0, 16.0, 16.0])
LABELS = torch.tensor(
    [[0, BACKGROUND, BACKGROUND, IGNORE, 3], [BACKGROUND, BACKGROUND, IGNORE, BACKGROUND, BACKGROUND]]
)
P_T = torch.tensor([[0.2, 0.95, 0.5, 0.3, 0.6], [0.99, 0.9, 0.1, 0.91, 0.05]])
LOSSES = torch.tensor([[3.0, 0.5, 1.0, 0.0, 1.0], [0.25, 0.25, 0.0, 0.5, 1.5]])  # 8 in all


def test_anchors_are_counted_and_weighed_for_all_levels_and_for_each() -> None:
    statistics = anchor_statistics(AnchorLosses(LABELS, LOSSES, P_T), STRIDES)
    expected = {
        "anchors/positives": 2,
        "anchors/negatives": 6,
        "anchors/ignored": 2,
        "anchors/loss_of_positives": (3 + 1) / 8,
        "anchors/loss_of_easy_negatives": (0.5 + 0.25 + 0.5) / 8,  # p_t 0.95, 0.99, 0.91; 0.9 is not more than 0.9
        "anchors/loss_of_hard_negatives": (1 + 0.25 + 1.5) / 8,
        "anchors/p_t_of_positives": (0.2 + 0.6) / 2,
        "anchors/stride_8/positives": 1,
        "anchors/stride_8/negatives": 4,
        "anchors/stride_8/ignored": 1,
        "anchors/stride_8/loss_of_positives": 3 / 8,
        "anchors/stride_8/loss_of_easy_negatives": 0.75 / 8,
        "anchors/stride_8/loss_of_hard_negatives": 1.25 / 8,
        "anchors/stride_8/p_t_of_positives": 0.2,
        "anchors/stride_16/positives": 1,
        "anchors/stride_16/negatives": 2,
        "anchors/stride_16/ignored": 1,
        "anchors/stride_16/loss_of_positives": 1 / 8,
        "anchors/stride_16/loss_of_easy_negatives": 0.5 / 8,
        "anchors/stride_16/loss_of_hard_negatives": 1.5 / 8,
        "anchors/stride_16/p_t_of_positives": 0.6,
    }
    assert statistics == pytest.approx(expected)


def test_what_is_undefined_is_left_out() -> None:
    statistics = anchor_statistics(
        AnchorLosses(torch.full((1, 5), BACKGROUND), torch.zeros(1, 5), torch.ones(1, 5)), STRIDES
    )
    assert statistics["anchors/negatives"] == 5
    assert not [name for name in statistics if "loss_of" in name or "p_t" in name]


def first_batch(background: float, gamma: float = 0.0, mined: int | None = None) -> AnchorLosses:
    """2 positives and 998 negatives of one probability; `mined`: only so many of these have a part in the loss."""
    labels = torch.full((1, 1000), BACKGROUND)
    labels[0, :2] = 0
    p_t = torch.full((1, 1000), background)
    losses = -p_t.log() * (1 - p_t) ** gamma
    if mined is not None:
        losses[0, 2 + mined :] = 0
    return AnchorLosses(labels, losses, p_t)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 5.0])
def test_a_loss_over_all_anchors_without_a_prior_is_told_whatever_gamma(gamma: float) -> None:
    warning = missing_prior(first_batch(0.5, gamma))
    assert warning is not None
    # 1000 anchors of loss 0.5^gamma ln 2, divided by 2 positives
    assert f"is {1000 * 0.5**gamma * math.log(2) / 2:,.4g} for each positive anchor" in warning
    assert "99.8% of it from 998 background anchors" in warning
    assert "model.detector.init_args.prior" in warning


def test_a_prior_or_mined_negatives_or_no_negatives_are_fine() -> None:
    assert missing_prior(first_batch(0.97)) is None
    assert missing_prior(first_batch(0.5, mined=6)) is None
    only_positives = first_batch(0.5)._replace(labels=torch.zeros(1, 1000, dtype=torch.int64))
    assert missing_prior(only_positives) is None


def test_every_loss_of_the_family_starts_without_the_warning_and_only_mined_ones_without_a_prior() -> None:
    import onestage.losses
    from onestage.models import SSD160
    from onestage.types import Targets

    boxes, labels = torch.zeros(1, 16, 4), torch.full((1, 16), -1)
    boxes[0, 0], labels[0, 0] = torch.tensor([16.0, 16.0, 60.0, 50.0]), 1
    images = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("SigmoidFocalLoss", "SoftmaxFocalLoss", "SigmoidCrossEntropy", "MinedCrossEntropy"):
        for prior in (0.01, 0.5):
            torch.manual_seed(0)
            detector = SSD160(num_classes=3, classification_loss=getattr(onestage.losses, name)(), prior=prior)
            losses = detector.anchor_losses(detector(images), Targets(boxes, labels))
            assert losses.losses.shape == losses.labels.shape == losses.true_probabilities.shape == (1, 2390)
            found[name, prior] = missing_prior(losses) is not None
    assert found == {
        (name, prior): prior == 0.5 and name != "MinedCrossEntropy"
        for name, prior in found
    }  # fmt: skip


class NotedLogger(CSVLogger):
    """Keeps what is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.noted: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        if "anchors/positives" in metrics:
            self.noted.append((step, metrics))


class DetectorThatTells(FaultyDetector):
    """Counts how often it is asked."""

    num_asked = 0

    def forward(self, images):
        anchors = Anchors(torch.ones(4, 4), torch.tensor([8.0, 8.0, 8.0, 16.0]), (3, 1))
        return super().forward(images)._replace(anchors=anchors)

    def anchor_losses(self, predictions, targets):
        assert not predictions.class_logits.requires_grad
        self.num_asked += 1
        labels = torch.full((2, 4), BACKGROUND)
        labels[0, 0] = 0
        return AnchorLosses(labels, torch.ones(2, 4), torch.full((2, 4), 0.95))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_steps_alone_are_looked_at_and_each_once(tmp_path: Path, accumulate: int) -> None:
    logger, detector = NotedLogger(tmp_path), DetectorThatTells()
    train(
        tmp_path, detector=detector, num_steps=6, callbacks=(AnchorMonitor(),), logger=logger, log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert [step for step, _ in logger.noted] == [2, 5]  # the third and the sixth
    assert detector.num_asked == 2 + 1  # and the first batch
    assert logger.noted[0][1]["anchors/stride_8/positives"] == 1
    assert logger.noted[0][1]["anchors/loss_of_easy_negatives"] == 7 / 8


def test_a_detector_that_does_not_tell_trains_all_the_same(tmp_path: Path) -> None:
    logger = NotedLogger(tmp_path)
    train(tmp_path, num_steps=2, callbacks=(AnchorMonitor(),), logger=logger, log_every_n_steps=1)
    assert logger.noted == []


def test_the_parts_of_the_loss_add_up_to_the_loss() -> None:
    from onestage.models import SSD160
    from onestage.types import Targets

    torch.manual_seed(0)
    detector = SSD160(num_classes=3)
    boxes, labels = torch.zeros(2, 16, 4), torch.full((2, 16), -1)
    boxes[:, 0], labels[:, 0] = torch.tensor([16.0, 16.0, 60.0, 50.0]), 1
    targets = Targets(boxes, labels)
    predictions = detector(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8))
    parts = detector.anchor_losses(predictions, targets)
    num_positives = (parts.labels >= 0).sum()
    assert num_positives > 0
    losses = detector.loss(predictions, targets)
    assert_close(parts.losses.sum() / num_positives, losses.terms["classification"].detach())
