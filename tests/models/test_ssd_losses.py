"""What SSD tells its losses, and that each member of the family trains it."""

import pytest
import torch
from torch.testing import assert_close

from onestage.errors import ConfigError
from onestage.losses import (
    AutomatedFocalLoss,
    CIoULoss,
    DIoULoss,
    EffectiveNumberWeights,
    GIoULoss,
    L1Loss,
    MinedCrossEntropy,
    OHEMCrossEntropy,
    QualityFocalLoss,
    SigmoidCrossEntropy,
    SigmoidFocalLoss,
    SmoothL1Loss,
    SoftmaxCrossEntropy,
    SoftmaxFocalLoss,
    VarifocalLoss,
)
from onestage.models import SSD160
from onestage.types import PADDING, Targets

CLASSIFICATION_LOSSES = [
    AutomatedFocalLoss,
    MinedCrossEntropy,
    OHEMCrossEntropy,
    QualityFocalLoss,
    SigmoidCrossEntropy,
    SigmoidFocalLoss,
    SoftmaxCrossEntropy,
    SoftmaxFocalLoss,
    VarifocalLoss,
]
BOX_LOSSES = [SmoothL1Loss, L1Loss, GIoULoss, DIoULoss, CIoULoss]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def one_object(batch_size: int = 2) -> Targets:
    """The first image has an object, the others have none."""
    boxes, labels = torch.zeros(batch_size, 16, 4), torch.full((batch_size, 16), PADDING)
    boxes[0, 0], labels[0, 0] = torch.tensor([20.0, 30.0, 90.0, 100.0]), 1
    return Targets(boxes, labels)


def images_of(batch_size: int = 2):
    return torch.randint(0, 256, (batch_size, 3, 160, 160), dtype=torch.uint8)


@pytest.mark.parametrize("loss", CLASSIFICATION_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_classification_loss_goes_down_from_scratch(loss, dtype) -> None:
    detector = SSD160(num_classes=3, classification_loss=loss()).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    images, targets, totals = images_of(), one_object(), []
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = detector.loss(detector(images), targets).terms
        total = losses["classification"] + losses["box"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(torch.tensor(totals).isfinite())
    assert totals[-1] < totals[0]
    assert all(parameter.isfinite().all() for parameter in detector.parameters())


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_every_box_loss_goes_down(loss) -> None:
    detector = SSD160(num_classes=3, box_loss=loss()).train()
    optimizer = torch.optim.SGD(detector.box_head.parameters(), lr=1e-3)
    images, targets, totals = images_of(), one_object(), []
    for _ in range(4):
        total = detector.loss(detector(images), targets).terms["box"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


class Recorder(QualityFocalLoss):
    """Keeps what it was told of the boxes."""

    def costs(self, class_logits, labels, box_quality):
        self.labels, self.box_quality = labels, box_quality
        return super().costs(class_logits, labels, box_quality)


def test_quality_is_the_iou_of_the_predicted_box_at_positives() -> None:
    detector = SSD160(num_classes=3, classification_loss=Recorder()).eval()
    targets = one_object(1)
    predictions = detector(images_of(1))
    perfect = detector.box_coder.encode(targets.boxes[:, :1], predictions.anchors)  # of every anchor
    shifted = perfect + torch.tensor([0.0, 0.0, 5 * torch.log(torch.tensor(2.0)).item(), 0.0])  # twice as wide
    detector.loss(predictions._replace(box_outputs=perfect), targets)
    assert_close(detector.classification_loss.box_quality[detector.classification_loss.labels >= 0].min().item(), 1.0)
    detector.loss(predictions._replace(box_outputs=shifted), targets)
    quality, labels = detector.classification_loss.box_quality, detector.classification_loss.labels
    assert_close(quality[labels >= 0], torch.full_like(quality[labels >= 0], 0.5))
    assert (quality[labels < 0] == 0).all()


def test_class_counts_reach_the_weights() -> None:
    loss = SigmoidFocalLoss(class_weights=EffectiveNumberWeights())
    detector = SSD160(num_classes=3, classification_loss=loss)
    detector.set_class_counts(torch.tensor([1000, 10, 10]))
    assert loss.class_weights.values[1] > loss.class_weights.values[0]
    SSD160(num_classes=3).set_class_counts(torch.tensor([1, 1, 1]))  # a loss without weights does not mind
    with pytest.raises(ConfigError, match="2 numbers, but the data has 3 classes"):
        SSD160(3, SigmoidFocalLoss(class_weights=[1.0, 2.0])).set_class_counts(torch.tensor([1, 1, 1]))


def test_running_normaliser_divides_by_the_mean_of_the_batches() -> None:
    detector = SSD160(num_classes=3, normaliser_momentum=0.5).train()
    images, targets = images_of(), one_object()
    predictions = detector(images)
    first = detector.loss(predictions, targets)
    nothing = targets._replace(labels=torch.full_like(targets.labels, PADDING))
    num_positives = detector.normaliser.running_mean.clone()
    assert num_positives > 1
    detector.loss(predictions, nothing)
    assert_close(detector.normaliser.running_mean, (num_positives + 1) / 2)
    again = detector.loss(predictions, targets)
    assert_close(again.terms["box"] / first.terms["box"], num_positives / detector.normaliser.running_mean)


def test_one_seed_gives_all_but_the_class_head_the_same_weights_for_any_loss() -> None:
    def parameters(loss):
        torch.manual_seed(3)
        return dict(SSD160(num_classes=3, classification_loss=loss).named_parameters())

    sigmoid, softmax = parameters(SigmoidFocalLoss()), parameters(SoftmaxFocalLoss())
    same = [name for name in sigmoid if not name.startswith("class_head.")]
    assert len(same) > 20
    assert all(torch.equal(sigmoid[name], softmax[name]) for name in same)
