import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onestage.boxes import matchers
from onestage.boxes.anchors import AnchorShapes
from onestage.errors import ConfigError
from onestage.losses import QualityFocalLoss, SigmoidFocalLoss
from onestage.models import Darknet19, Darknet53, TorchvisionBackbone, YOLOv2, YOLOv3
from onestage.types import BACKGROUND, PADDING, Predictions, Targets

K = 4
ONCE = (1, 1, 1, 1, 1)
LEVELS = [
    AnchorShapes(8, ((8.0, 8.0), (20.0, 10.0))),
    AnchorShapes(16, ((16.0, 30.0), (30.0, 16.0))),
    AnchorShapes(32, ((40.0, 40.0), (60.0, 60.0))),
]


def yolo(kind: str, **settings):
    torch.manual_seed(0)
    if kind == "v3":
        return YOLOv3(K, **{"backbone": Darknet53(2, ONCE), "anchors": LEVELS, **settings})
    one_level = [AnchorShapes(32, ((16.0, 16.0), (30.0, 20.0), (50.0, 60.0)))]
    return YOLOv2(K, **{"backbone": Darknet19(2), "anchors": one_level, **settings})


def images_of(batch_size: int, height: int = 64, width: int = 96):
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8)


def some_objects() -> Targets:
    """Two images of 64 x 96 px. In the first, two objects of different classes share their best anchor."""
    boxes = torch.zeros(2, 16, 4)
    labels = torch.full((2, 16), PADDING)
    boxes[0, 0], labels[0, 0] = torch.tensor([10.0, 12.0, 18.0, 20.0]), 1
    boxes[0, 1], labels[0, 1] = torch.tensor([9.0, 12.0, 18.0, 20.0]), 3
    boxes[0, 2], labels[0, 2] = torch.tensor([20.0, 5.0, 75.0, 62.0]), 0
    boxes[1, 0], labels[1, 0] = torch.tensor([50.0, 30.0, 79.0, 47.0]), 2
    return Targets(boxes, labels)


def near_outputs(detector, targets: Targets) -> Predictions:
    """Random predictions; some boxes lie near an object, so that the ignore rule decides."""
    generator = torch.Generator().manual_seed(1)
    anchors = detector(images_of(1)).anchors
    shape = (2, len(anchors.boxes))
    class_logits, boxes, quality = (torch.randn(*shape, n, generator=generator) for n in (K, 4, 1))
    for image, row in ((0, 2), (1, 0)):
        cell = detector.box_coder.encode(targets.boxes[image, row].expand(shape[1], 4), anchors)
        boxes[image, ::3] = cell[::3] + 0.05
    tensors = [tensor.double().requires_grad_() for tensor in (class_logits, boxes, quality[..., 0])]
    return Predictions(tensors[0], tensors[1], anchors, tensors[2])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def iou_of(a, b) -> float:
    """box_iou of darknet; boxes are (x, y, w, h) around their centres."""
    w = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    h = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    intersection = w * h if w > 0 and h > 0 else 0.0
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


def darknet_deltas(detector, predictions: Predictions, targets: Targets, ignore: float, is_v3: bool, is_early: bool):
    """Transliterate forward_yolo_layer and forward_region_layer: negative gradients of class, box and objectness."""
    width, height, levels = 96, 64, detector.anchor_grid.levels
    class_logits, outputs, _, quality = (part.tolist() if torch.is_tensor(part) else part for part in predictions)
    num_anchors = len(quality[0])
    classes = [[[0.0] * K for _ in range(num_anchors)] for _ in range(2)]
    boxes = [[[0.0] * 4 for _ in range(num_anchors)] for _ in range(2)]
    objects = [[0.0] * num_anchors for _ in range(2)]

    def delta_box(b, index, truth, cell, bias, scale):
        stride, i, j = cell
        tx, ty = truth[0] / stride - i, truth[1] / stride - j
        x, y = sigmoid(outputs[b][index][0]), sigmoid(outputs[b][index][1])
        slope_x, slope_y = (1.0, 1.0) if is_v3 else (x * (1 - x), y * (1 - y))
        boxes[b][index] = [
            scale * (tx - x) * slope_x,
            scale * (ty - y) * slope_y,
            scale * (math.log(truth[2] / bias[0]) - outputs[b][index][2]),
            scale * (math.log(truth[3] / bias[1]) - outputs[b][index][3]),
        ]

    for b in range(2):
        truths = []
        for box, label in zip(targets.boxes[b].tolist(), targets.labels[b].tolist(), strict=True):
            if label >= 0:
                x1, y1, x2, y2 = box
                truths.append((((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), label))
        place, start, predicted = {}, 0, {}
        for number, (stride, shapes, _) in enumerate(levels):
            w, h = int(width / stride), int(height / stride)
            for j in range(h):
                for i in range(w):
                    for n, bias in enumerate(shapes):
                        index = start + (j * w + i) * len(shapes) + n
                        place[number, i, j, n] = index
                        t = outputs[b][index]
                        pred = ((i + sigmoid(t[0])) * stride, (j + sigmoid(t[1])) * stride,
                                bias[0] * math.exp(t[2]), bias[1] * math.exp(t[3]))  # fmt: skip
                        predicted[index] = pred
                        best_iou = max((iou_of(pred, truth) for truth, _ in truths), default=0.0)
                        s = sigmoid(quality[b][index])
                        objects[b][index] = -s if is_v3 else -s * s * (1 - s)
                        if best_iou > ignore:
                            objects[b][index] = 0.0
                        if is_early:
                            own = ((i + 0.5) * stride, (j + 0.5) * stride, *bias)
                            delta_box(b, index, own, (stride, i, j), bias, 0.01)
            start += w * h * len(shapes)
        for truth, label in truths:
            best_iou, best = 0.0, None
            for number, (_, shapes, _) in enumerate(levels):
                for n, bias in enumerate(shapes):
                    iou = iou_of((0, 0, *bias), (0, 0, truth[2], truth[3]))
                    if iou > best_iou:
                        best_iou, best = iou, (number, n)
            number, n = best
            stride, shapes, _ = levels[number]
            i, j = int(truth[0] / stride), int(truth[1] / stride)
            index = place[number, i, j, n]
            scale = 2 - truth[2] / width * truth[3] / height if is_v3 else 1.0
            delta_box(b, index, truth, (stride, i, j), shapes[n], scale)
            s = sigmoid(quality[b][index])
            objects[b][index] = 1 - s if is_v3 else 5 * (iou_of(predicted[index], truth) - s) * s * (1 - s)
            logits = class_logits[b][index]
            if is_v3:
                if classes[b][index][0]:
                    classes[b][index][label] = 1 - sigmoid(logits[label])
                else:
                    classes[b][index] = [(c == label) - sigmoid(logits[c]) for c in range(K)]
            else:
                total = sum(math.exp(x) for x in logits)
                classes[b][index] = [(c == label) - math.exp(logits[c]) / total for c in range(K)]
    return [torch.tensor(values, dtype=torch.float64) for values in (classes, boxes, objects)]


@pytest.mark.parametrize(("kind", "is_early"), [("v3", False), ("v2", False), ("v2", True)])
def test_gradients_equal_a_transliteration_of_darknets_loss(kind, is_early) -> None:
    settings = {} if kind == "v3" else {"anchor_images": 10 if is_early else 0}
    detector, targets = yolo(kind, ignore_iou=0.6, **settings).train(), some_objects()
    predictions = near_outputs(detector, targets)
    labels, _ = detector.assign(predictions, targets)
    assert (labels == -2).sum() > 0
    losses = detector.loss(predictions, targets)
    assert list(losses.terms) == list(detector.loss_terms)
    (sum(losses.terms.values()) * 2).backward()  # darknet divides by the batch in its update
    expected = darknet_deltas(detector, predictions, targets, 0.6, kind == "v3", is_early)
    for tensor, delta in zip((predictions[0], predictions[1], predictions[3]), expected, strict=True):
        assert_close(-tensor.grad, delta, atol=3e-6, rtol=1e-5)
    assert int(detector.images_seen) == 2


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_several_anchors_of_an_object_learn_its_class_objectness_and_box(kind) -> None:
    detector, targets = yolo(kind, anchors_per_object=2), some_objects()
    targets.labels[0, :2] = PADDING  # each anchor has one object
    predictions = near_outputs(detector, targets)
    matched = detector.matcher.best_anchors(targets, predictions.anchors)[1, [0, 16]]
    assert matched.unique().shape == (2,)
    sum(detector.loss(predictions, targets).terms.values()).backward()
    has_class_loss = (predictions.class_logits.grad[1] != 0).any(dim=1)
    assert has_class_loss.nonzero().flatten().tolist() == sorted(matched.tolist())
    assert ((predictions.class_logits.grad[1, matched] < 0).int().argmax(dim=1) == 2).all()
    assert (predictions.quality_logits.grad[1, matched] < 0).all() or kind == "v2"  # v2's target is the IoU
    assert (predictions.box_outputs.grad[1, matched] != 0).all()


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_score_is_objectness_times_class_and_detect_finds_the_described_object(kind) -> None:
    detector = yolo(kind)
    predictions = near_outputs(detector, some_objects())
    quality = torch.full_like(predictions.quality_logits, -9.0)
    logits, boxes = torch.zeros_like(predictions.class_logits), torch.zeros_like(predictions.box_outputs)
    quality[:, 1], logits[:, 1, 2] = 2.0, 3.0
    found = detector.detect(Predictions(logits, boxes, predictions.anchors, quality))
    score_of_class = sigmoid(3) if kind == "v3" else math.exp(3) / (math.exp(3) + 3)
    assert found.labels[0, 0] == 2
    assert found.scores[0, 0] == pytest.approx(sigmoid(2) * score_of_class, rel=1e-5)
    (cx, cy, w, h) = predictions.anchors.boxes[1].tolist()  # in the first cell
    low = [max(0.0, cx - w / 2), max(0.0, cy - h / 2)]
    assert found.boxes[0, 0].tolist() == pytest.approx([*low, cx + w / 2, cy + h / 2])


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_loss_does_not_depend_on_the_chunks_of_matching(kind, monkeypatch) -> None:
    detector, targets = yolo(kind), some_objects()
    predictions = near_outputs(detector, targets)
    whole = detector.loss(predictions, targets).terms
    monkeypatch.setattr(matchers, "MAX_PAIRS", 1)  # one image
    chunked = detector.loss(predictions, targets).terms
    assert all(torch.equal(whole[name], chunked[name]) for name in whole)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_batch_without_objects_trains_objectness_alone(kind) -> None:
    detector = yolo(kind, **({"anchor_images": 0} if kind == "v2" else {})).train()
    for num_rows in (0, 16):
        targets = Targets(torch.zeros(2, num_rows, 4), torch.full((2, num_rows), PADDING))
        losses = detector.loss(detector(images_of(2)), targets)
        assert losses.terms["classification"] == losses.terms["box"] == losses.num_positives == 0
        assert losses.terms["objectness"] > 0
        sum(losses.terms.values()).backward()
        assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


def test_prior_gives_the_first_objectness_and_anchor_losses_are_those_of_objectness() -> None:
    detector = yolo("v3", prior=0.02).eval()
    for conv in detector.quality_head.levels:
        nn.init.zeros_(conv.weight)
    predictions, targets = detector(images_of(2)), some_objects()
    assert_close(predictions.quality_logits.sigmoid(), torch.full_like(predictions.quality_logits, 0.02))
    parts, losses = detector.anchor_losses(predictions, targets), detector.loss(predictions, targets)
    assert_close(parts.losses.sum() / 2, losses.terms["objectness"].detach())
    negatives = parts.labels == BACKGROUND
    assert_close(parts.true_probabilities[negatives], torch.full((int(negatives.sum()),), 0.98))
    assert losses.divisor == 2


@pytest.mark.parametrize(("kind", "loss"), [("v3", SigmoidFocalLoss()), ("v2", QualityFocalLoss())])
def test_focal_losses_serve_as_objectness(kind, loss) -> None:
    detector, targets = yolo(kind, objectness_loss=loss).train(), some_objects()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    images, totals = images_of(2), []
    for _ in range(5):
        total = sum(detector.loss(detector(images), targets).terms.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


def test_any_backbone_of_the_strides_and_any_canvas_of_their_multiple_is_taken() -> None:
    detector = YOLOv3(2, backbone=TorchvisionBackbone("mobilenet_v3_small", strides=(8, 16, 32)))
    for height, width in ((64, 64), (32, 96)):
        predictions = detector(images_of(1, height, width))
        assert len(predictions.anchors.boxes) == 3 * sum(height * width // stride**2 for stride in (8, 16, 32))
    with pytest.raises(ConfigError, match=r"multiples of 32, got \(64, 72\)"):
        detector(images_of(1, 64, 72))


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_autocast_gives_float32_predictions_and_losses(kind) -> None:
    detector = yolo(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(images_of(2))
        losses = detector.loss(predictions, some_objects())
    values = (*predictions[:2], predictions.quality_logits, *losses.terms.values())
    assert {value.dtype for value in values} == {torch.float32}
