import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from onestage.losses import MinedCrossEntropy, QualityFocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from onestage.models import SSD160, SSD256, SSD300, SSD512, TorchvisionBackbone
from onestage.types import IGNORE, PADDING, Predictions, Targets


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images_of(batch_size: int, image_size: int = 160):
    return torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)


def two_objects(batch_size: int, num_rows: int = 16) -> Targets:
    targets = no_objects(batch_size, num_rows)
    targets.boxes[:, 0] = torch.tensor([16.0, 16.0, 60.0, 50.0])
    targets.boxes[:, 1] = torch.tensor([70.0, 80.0, 150.0, 155.0])
    targets.labels[:, :2] = torch.tensor([0, 2])
    return targets


def no_objects(batch_size: int, num_rows: int = 16) -> Targets:
    return Targets(torch.zeros(batch_size, num_rows, 4), torch.full((batch_size, num_rows), PADDING))


def total_of(losses) -> torch.Tensor:
    return losses.terms["classification"] + losses.terms["box"]


@pytest.mark.parametrize(
    ("detector_class", "sides", "num_anchors"),
    [
        (SSD300, [38, 19, 10, 5, 3, 1], 8732),
        (SSD512, [64, 32, 16, 8, 4, 2, 1], 24564),
        (SSD256, [16, 8, 4], 4 * (256 + 64 + 16)),
        (SSD160, [20, 10, 5, 3, 1], 400 * 4 + 100 * 6 + 25 * 6 + 9 * 4 + 4),
    ],
)
def test_published_sizes_have_the_published_maps_and_anchors(detector_class, sides, num_anchors) -> None:
    loss = MinedCrossEntropy()
    with torch.device("meta"):
        detector = detector_class(num_classes=7, anchors="coco", classification_loss=loss)
        side = detector.image_size
        predictions = detector(torch.zeros(2, 3, side, side, dtype=torch.uint8))
        levels, grids = detector.anchor_summary()
    assert predictions.class_logits.shape == (2, num_anchors, loss.num_logits(7))
    assert predictions.box_outputs.shape == (2, num_anchors, 4)
    assert predictions.anchors.boxes.shape == (num_anchors, 4)
    assert sum(predictions.anchors.level_sizes) == num_anchors
    assert grids == tuple((side, side) for side in sides)
    assert levels == detector.anchor_grid.levels


@pytest.mark.parametrize(
    ("detector_class", "table", "first", "low", "step"),
    [
        (SSD300, "voc", 10, 20, 17),  # step = floor((90 - 20) / 4)
        (SSD300, "coco", 7, 15, 18),
        (SSD512, "voc", 7, 15, 15),
        (SSD512, "coco", 4, 10, 16),
        (SSD160, "voc", 10, 20, 23),
    ],
)
def test_anchor_sizes_follow_the_rule_of_the_caffe_code(detector_class, table, first, low, step) -> None:
    levels, side = detector_class.anchor_tables[table], detector_class.image_size
    percents = [first, *(low + step * k for k in range(len(levels)))]
    assert [level.shapes[0][0] for level in levels] == pytest.approx([side * p / 100 for p in percents[:-1]])
    for level, (percent, following) in zip(levels, pairwise(percents), strict=True):
        assert level.shapes[1][0] == pytest.approx(side * math.sqrt(percent * following) / 100)
    assert [len(level.shapes) for level in levels] == [4, *[6] * (len(levels) - 3), 4, 4]


def test_losses_are_divided_by_the_number_of_positives() -> None:
    detector = SSD160(num_classes=3)
    predictions, targets = detector(images_of(2)), two_objects(2)
    labels, _ = detector.assign(predictions, targets)
    losses = detector.loss(predictions, targets)
    assert losses.num_positives == (labels >= 0).sum() > 1
    total = detector.classification_loss(predictions[0], labels)
    assert_close(losses.terms["classification"] * losses.num_positives, total)
    assert detector.loss(predictions, no_objects(2)).num_positives == 0
    parts = detector.anchor_losses(predictions, targets)
    assert_close(parts.losses.sum() / losses.num_positives, losses.terms["classification"].detach())


@pytest.mark.parametrize(("loss", "num_rows"), [(SigmoidFocalLoss(), 0), (MinedCrossEntropy(), 16)])
def test_batch_without_objects_has_a_finite_loss_that_trains_the_class_head(loss, num_rows) -> None:
    detector = SSD160(num_classes=1, classification_loss=loss)
    losses = detector.loss(detector(images_of(2)), no_objects(2, num_rows))
    total_of(losses).backward()
    assert losses.terms["classification"] > 0
    assert losses.terms["box"] == 0
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    assert detector.class_head.levels[0].bias.grad.abs().sum() > 0


def test_padding_does_not_change_the_loss_and_a_crowd_ignores_its_anchors() -> None:
    detector = SSD160(num_classes=3)
    predictions, crowd = detector(images_of(2)), no_objects(2)
    short, long = (detector.loss(predictions, two_objects(2, num_rows)) for num_rows in (2, 32))
    assert_close(short, long)
    crowd.boxes[:, 0] = torch.tensor([-200.0, -200.0, 400.0, 400.0])  # larger than the image, as anchors are
    crowd.labels[:, 0] = IGNORE
    assert total_of(detector.loss(predictions, crowd)) == 0


def test_resnet_under_ssd_trains_a_step() -> None:
    detector = SSD160(num_classes=3, backbone=TorchvisionBackbone("resnet18")).train()
    detector.backbone.freeze(1)
    predictions = detector(images_of(1))
    assert predictions.anchors.level_sizes == (1600, 600, 150, 36, 4)
    total_of(detector.loss(predictions, two_objects(1))).backward()
    trained = {name for name, parameter in detector.named_parameters() if parameter.grad is not None}
    assert "backbone.body.layer2.0.conv1.weight" in trained
    assert "backbone.body.layer1.0.conv1.weight" not in trained


def test_detect_finds_the_described_object_and_clips_it() -> None:
    detector = SSD160(num_classes=3, max_detections=5)
    class_logits = torch.full((2, 2390, 3), -10.0)
    class_logits[:, 1600, 2] = 3.0  # the first anchor of the second level: centre (8, 8), 32 x 32
    predictions = Predictions(class_logits, torch.zeros(2, 2390, 4), detector(images_of(1)).anchors)
    found = detector.detect(predictions)
    assert found.labels.tolist() == [[2, PADDING, PADDING, PADDING, PADDING]] * 2
    assert_close(found.scores[0, 0], torch.tensor(3.0).sigmoid())
    assert found.boxes[0, 0].tolist() == [0, 0, 24, 24]  # clipped to the canvas
    content_sizes = torch.tensor([[10, 160], [160, 20]])  # height, width
    assert detector.detect(predictions, content_sizes).boxes[:, 0].tolist() == [[0, 0, 24, 10], [0, 0, 20, 24]]
    detector.image_size = None  # the canvas then follows from the anchors
    shifted = class_logits.roll(99 * 6, dims=1)  # the last cell: centre (152, 152)
    assert detector.detect(predictions._replace(class_logits=shifted)).boxes[0, 0].tolist() == [136, 136, 160, 160]


class Recorder(QualityFocalLoss):
    """Keeps its arguments."""

    def forward(self, class_logits, labels, box_quality=None):
        self.labels, self.box_quality = labels, box_quality
        return super().forward(class_logits, labels, box_quality)


def test_box_quality_is_the_iou_of_the_predicted_box_at_positives() -> None:
    detector = SSD160(num_classes=3, classification_loss=Recorder()).eval()
    predictions, targets = detector(images_of(1)), no_objects(1)
    targets.boxes[0, 0], targets.labels[0, 0] = torch.tensor([20.0, 30.0, 90.0, 100.0]), 1
    perfect = detector.box_coder.encode(targets.boxes[:, :1], predictions.anchors)  # of every anchor
    doubled = perfect + torch.tensor([0.0, 0.0, 5 * math.log(2), 0.0])  # twice as wide: IoU 1/2
    for outputs, iou in ((perfect, 1.0), (doubled, 0.5)):
        detector.loss(predictions._replace(box_outputs=outputs), targets)
        quality, labels = detector.classification_loss.box_quality, detector.classification_loss.labels
        assert_close(quality[labels >= 0], torch.full_like(quality[labels >= 0], iou), rtol=1e-4, atol=1e-4)
        assert (quality[labels < 0] == 0).all()


def test_one_seed_gives_all_but_the_class_head_the_same_weights_for_any_loss() -> None:
    def parameters(loss):
        torch.manual_seed(3)
        return dict(SSD160(num_classes=3, classification_loss=loss).named_parameters())

    sigmoid, softmax = parameters(SigmoidFocalLoss()), parameters(SoftmaxFocalLoss())
    same = [name for name in sigmoid if not name.startswith("class_head.")]
    assert all(torch.equal(sigmoid[name], softmax[name]) for name in same)


def test_loss_compiles_without_a_graph_break() -> None:
    detector = SSD160(num_classes=3)
    class_logits, box_outputs, anchors, _ = detector(images_of(2))

    def total(class_logits, box_outputs, boxes, labels):
        return total_of(detector.loss(Predictions(class_logits, box_outputs, anchors), Targets(boxes, labels)))

    arguments = (class_logits.detach().requires_grad_(), box_outputs.detach(), *two_objects(2))
    assert_close(torch.compile(total, fullgraph=True, backend="eager")(*arguments), total(*arguments))
