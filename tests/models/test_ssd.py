import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from onestage.errors import ConfigError
from onestage.losses import MinedCrossEntropy, SigmoidFocalLoss
from onestage.models import SSD160, SSD300, SSD512
from onestage.types import IGNORE, PADDING, Detector, Predictions, Targets


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images_of(batch_size: int, image_size: int = 160):
    return torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)


def two_objects(batch_size: int, num_rows: int = 16) -> Targets:
    boxes = torch.zeros(batch_size, num_rows, 4)
    labels = torch.full((batch_size, num_rows), PADDING)
    boxes[:, 0] = torch.tensor([16.0, 16.0, 60.0, 50.0])
    boxes[:, 1] = torch.tensor([70.0, 80.0, 150.0, 155.0])
    labels[:, :2] = torch.tensor([0, 2])
    return Targets(boxes, labels)


def no_objects(batch_size: int, num_rows: int = 16) -> Targets:
    return Targets(torch.zeros(batch_size, num_rows, 4), torch.full((batch_size, num_rows), PADDING))


@pytest.mark.parametrize(
    ("detector_class", "anchors", "num_anchors"),
    [
        (SSD300, "voc", 8732),
        (SSD300, "coco", 8732),
        (SSD512, "voc", 24564),
        (SSD512, "coco", 24564),
        (SSD160, "voc", 2390),
    ],
)
@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), MinedCrossEntropy()])
def test_every_anchor_gets_logits_and_deltas(detector_class, anchors, num_anchors, loss) -> None:
    with torch.device("meta"):
        detector = detector_class(num_classes=7, anchors=anchors, classification_loss=loss)
        side = detector.image_size
        predictions = detector(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    assert isinstance(detector, Detector)
    assert predictions.class_logits.shape == (2, num_anchors, loss.num_logits(7))
    assert predictions.box_outputs.shape == (2, num_anchors, 4)
    assert predictions.anchors.boxes.shape == (num_anchors, 4)
    assert predictions.anchors.strides.shape == (num_anchors,)


def test_predictions_of_a_level_stand_beside_its_anchors() -> None:
    detector = SSD160(num_classes=2).eval()
    with torch.no_grad():
        for level, conv in enumerate(detector.class_head.levels):  # each anchor's logits tell level and place in cell
            conv.weight.zero_()
            conv.bias.copy_(10 * level + torch.arange(len(conv.bias)) // 2)
    predictions = detector(images_of(1))
    values = predictions.class_logits[0, :, 0].long()
    strides = predictions.anchors.strides
    assert [values[strides == stride].max() // 10 for stride in (8, 16, 32, 53, 160)] == [0, 1, 2, 3, 4]
    # Of the first level's cell: 16 square, sqrt(16 * 32) square, wide, tall.
    widths = predictions.anchors.boxes[:, 2]
    assert_close(widths[values == 0].unique(), torch.tensor([16.0]))
    assert_close(widths[values == 1].unique(), torch.tensor([math.sqrt(512)]))
    assert_close(widths[values == 2].unique(), torch.tensor([16 * math.sqrt(2)]))
    assert_close(widths[values == 3].unique(), torch.tensor([16 / math.sqrt(2)]))


def test_cells_of_the_head_are_in_the_order_of_the_anchors() -> None:
    detector = SSD160(num_classes=1)
    features = torch.zeros(1, 128, 20, 20)
    features[0, 0, 3, 7] = 1.0  # row 3, column 7
    others = [torch.zeros(1, c, s, s) for c, s in ((256, 10), (128, 5), (128, 3), (128, 1))]
    with torch.no_grad():
        for conv in detector.box_head.levels:
            conv.weight.zero_()
            conv.bias.zero_()
        detector.box_head.levels[0].weight[:, 0, 1, 1] = 1.0  # pass the cell's own first channel on
        deltas = detector.box_head([features, *others])[0]
    lit = detector.anchor_grid([(20, 20), (10, 10), (5, 5), (3, 3), (1, 1)]).boxes[deltas[:, 0] == 1]
    assert lit[:, :2].tolist() == [[7.5 * 8, 3.5 * 8]] * 4


def test_uint8_images_are_normalised_on_the_way_in() -> None:
    detector = SSD160(num_classes=1)
    grey = torch.tensor([123, 117, 104], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 160, 160)
    assert detector.backbone.normalise(grey).abs().max() < 1e-3 / 64 * 2
    white = detector.backbone.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert_close(white[0, :, 0, 0], torch.tensor([132.0, 138.0, 151.0]) / 64, atol=1e-4, rtol=0)


def test_first_classification_loss_is_what_the_prior_makes_it() -> None:
    detector = SSD160(num_classes=6)
    with torch.no_grad():
        for conv in detector.class_head.levels:
            conv.weight.zero_()
        losses = detector.loss(detector(images_of(2)), no_objects(2)).terms
    # 2 * 2390 anchors * 6 classes, all negative: 0.75 * 0.01^2 * -ln(0.99); divided by max(0, 1) positives
    assert_close(losses["classification"], torch.tensor(2 * 2390 * 6 * 0.75e-4 * -math.log(0.99)), atol=0, rtol=1e-3)
    assert losses["box"] == 0


def test_first_classification_loss_with_its_noise_is_about_the_same() -> None:
    detector = SSD160(num_classes=6)
    losses = detector.loss(detector(images_of(2)), no_objects(2)).terms
    expected = 2 * 2390 * 6 * 0.75e-4 * -math.log(0.99)
    assert 0.5 * expected < float(losses["classification"].detach()) < 5 * expected


def test_loss_is_divided_by_the_number_of_positives() -> None:
    detector = SSD160(num_classes=3)
    predictions = detector(images_of(2))
    anchors = predictions.anchors.boxes.clone()
    targets = no_objects(2)
    # Two objects that are anchors themselves, far apart; each has some positives, counted by the matcher.
    targets.boxes[0, 0] = torch.cat([anchors[840, :2] - anchors[840, 2:] / 2, anchors[840, :2] + anchors[840, 2:] / 2])
    targets.labels[0, 0] = 1
    num_positives = int((detector.matcher(targets, predictions.anchors) >= 0).sum())
    assert num_positives > 1
    losses = detector.loss(predictions, targets).terms
    labels = torch.where(detector.matcher(targets, predictions.anchors) >= 0, 1, -1)
    expected = detector.classification_loss(predictions.class_logits, labels) / num_positives
    assert_close(losses["classification"], expected)


@pytest.mark.parametrize("num_rows", [0, 16])
@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), MinedCrossEntropy()])
def test_a_batch_without_objects_has_a_finite_loss_that_teaches_the_classifier(loss, num_rows) -> None:
    detector = SSD160(num_classes=1, classification_loss=loss)
    losses = detector.loss(detector(images_of(2)), no_objects(2, num_rows)).terms
    (losses["classification"] + losses["box"]).backward()
    assert losses["classification"] > 0
    assert losses["box"] == 0
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    assert detector.class_head.levels[0].bias.grad.abs().sum() > 0


def test_padding_does_not_change_the_loss() -> None:
    detector = SSD160(num_classes=3)
    predictions = detector(images_of(2))
    short, long = (detector.loss(predictions, two_objects(2, num_rows)).terms for num_rows in (2, 32))
    assert_close(short["classification"], long["classification"])
    assert_close(short["box"], long["box"])


def test_a_crowd_takes_its_anchors_out_of_the_loss() -> None:
    detector = SSD160(num_classes=3)
    predictions = detector(images_of(1))
    crowd = no_objects(1)
    crowd.boxes[0, 0] = torch.tensor([-200.0, -200.0, 400.0, 400.0])  # beyond the image: anchors are, too
    crowd.labels[0, 0] = IGNORE
    assert detector.loss(predictions, crowd).terms["classification"] == 0
    assert detector.loss(predictions, crowd).terms["box"] == 0


def test_bfloat16_autocast_gives_float32_predictions_and_losses() -> None:
    detector = SSD160(num_classes=3).to(memory_format=torch.channels_last)
    images = images_of(2).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(images)
        losses = detector.loss(predictions, two_objects(2)).terms
        detections = detector.detect(predictions)
    assert predictions.class_logits.dtype == predictions.box_outputs.dtype == torch.float32
    assert losses["classification"].dtype == losses["box"].dtype == torch.float32
    assert detections.boxes.dtype == torch.float32
    (losses["classification"] + losses["box"]).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())


def test_few_steps_lower_the_loss() -> None:
    detector = SSD160(num_classes=3)
    images, targets = images_of(2), two_objects(2)
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        losses = detector.loss(detector(images), targets).terms
        total = losses["classification"] + losses["box"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_detect_finds_the_object_that_the_predictions_describe() -> None:
    detector = SSD160(num_classes=3, max_detections=5)
    anchors = detector(images_of(1)).anchors
    class_logits = torch.full((1, 2390, 3), -10.0)
    class_logits[0, 1600, 2] = 3.0  # the first anchor of the second level: centre (8, 8), 32 x 32
    found = detector.detect(Predictions(class_logits, torch.zeros(1, 2390, 4), anchors))
    assert found.labels.tolist() == [[2, PADDING, PADDING, PADDING, PADDING]]
    assert_close(found.scores[0, 0], torch.tensor(3.0).sigmoid())
    assert found.boxes[0, 0].tolist() == [0, 0, 24, 24]  # clipped to the image


def test_one_class_softmax_detects() -> None:
    detector = SSD160(num_classes=1, classification_loss=MinedCrossEntropy(), max_detections=3)
    found = detector.detect(detector(images_of(2)))
    assert found.boxes.shape == (2, 3, 4)
    assert set(found.labels.flatten().tolist()) <= {0, PADDING}


def test_state_dict_holds_no_anchors_and_loads_into_a_new_detector() -> None:
    detector, other = SSD160(num_classes=2), SSD160(num_classes=2)
    state = detector.state_dict()
    assert not [key for key in state if "anchor" in key or "pixel" in key]
    other.load_state_dict(state)
    images = images_of(1)
    assert_close(detector.eval()(images).class_logits, other.eval()(images).class_logits)


def test_the_number_of_positives_is_returned_and_nothing_is_none() -> None:
    detector = SSD160(num_classes=3)
    predictions = detector(images_of(2))
    losses = detector.loss(predictions, two_objects(2))
    assert losses.num_positives == (detector.matcher(two_objects(2), predictions.anchors) >= 0).sum() > 0
    assert detector.loss(predictions, no_objects(2)).num_positives == 0


def test_positives_are_averaged_over_processes_in_training_only(monkeypatch) -> None:
    detector = SSD160(num_classes=3)
    predictions, targets = detector(images_of(1)), two_objects(1)
    num_positives = int((detector.matcher(targets, predictions.anchors) >= 0).sum())
    alone = detector.loss(predictions, targets).terms

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda count: count.mul_(4))  # the other process has three times as many
    together = detector.loss(predictions, targets).terms
    assert_close(together["box"] * (2 * num_positives), alone["box"] * num_positives)

    monkeypatch.setattr(dist, "all_reduce", lambda count: pytest.fail("a collective call in validation may hang"))
    with torch.no_grad():
        assert_close(detector.loss(detector.eval()(images_of(1)), targets).terms["box"].isfinite(), torch.tensor(True))


def test_loss_compiles_without_a_graph_break() -> None:
    detector = SSD160(num_classes=3)
    predictions, targets = detector(images_of(2)), two_objects(2)

    def total(class_logits, box_outputs, boxes, labels):
        outputs = Predictions(class_logits, box_outputs, predictions.anchors)
        losses = detector.loss(outputs, Targets(boxes, labels)).terms
        return losses["classification"] + losses["box"]

    arguments = (predictions.class_logits.detach(), predictions.box_outputs.detach(), *targets)
    arguments[0].requires_grad_()
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    assert_close(compiled(*arguments), total(*arguments))


def test_compiling_the_detector_compiles_its_network_and_its_classification_loss() -> None:
    detector, graphs = SSD160(num_classes=3), []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    images, targets = images_of(2), two_objects(2)
    expected = detector.eval().loss(detector(images), targets).terms
    names = list(detector.state_dict())
    detector.compile(backend=backend, fullgraph=True)
    predictions = detector(images)
    assert len(graphs) == 1
    losses = detector.loss(predictions, targets).terms
    assert len(graphs) == 2
    assert_close(losses, expected)
    assert list(detector.state_dict()) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"anchors": "kitti"}, "anchors must be one of voc, coco, got 'kitti'"),
        ({"prior": 0.0}, "got 0.0"),
        ({"prior": 1.0}, "got 1.0"),
        ({"positive_iou": 0.4}, "negative_iou"),
        ({"score_threshold": 1.0}, "score_threshold must be .*got 1.0"),
        ({"score_threshold": float("nan")}, "got nan"),
        ({"nms_threshold": -0.1}, "got -0.1"),
        ({"candidates_per_class": 0}, "candidates_per_class must be >= 1, got 0"),
        ({"max_detections": 0}, "max_detections must be >= 1, got 0"),
        ({"backbone_weights": "IMAGENET1K_FEATURES"}, "backbone_weights is IMAGENET1K_FEATURES"),
        ({"pretrained": "torchvision_coco"}, "pretrained is torchvision_coco"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SSD160(**({"num_classes": 3} | changes))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be \(160, 160\), got \(300, 300\)"):
        SSD160(num_classes=3)(images_of(1, image_size=300))


def test_detector_is_a_module_with_its_losses_inside() -> None:
    detector = SSD160(num_classes=3)
    assert isinstance(detector.classification_loss, nn.Module)
    assert isinstance(detector.classification_loss, SigmoidFocalLoss)
