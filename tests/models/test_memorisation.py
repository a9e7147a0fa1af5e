"""Every family learns two images by heart: matching, losses, gradients and decoding fit together."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

from onestage import models
from onestage.boxes.anchors import AnchorShapes
from onestage.boxes.point_matchers import ATSSMatcher
from onestage.types import PADDING, Targets


def pyramid(kind: type, channels: int, **settings: object) -> torch.nn.Module:
    backbone = models.TorchvisionBackbone("mobilenet_v3_small", (8, 16, 32))
    return kind(2, backbone=backbone, channels=channels, tower_convs=1, **settings)


def levels(*strides: int) -> list[AnchorShapes]:
    return [AnchorShapes(stride, ((20.0, 30.0), (36.0, 36.0))) for stride in strides]


FAMILIES = {
    "SSD128": lambda: models.SSD128(2),
    "SSDLite320": lambda: models.SSDLite320(2),
    "RetinaNet": lambda: pyramid(models.RetinaNet, 32, anchor_scale=2.0),
    "FCOS": lambda: pyramid(models.FCOS, 64),
    "ATSS": lambda: pyramid(models.FCOS, 64, matcher=ATSSMatcher()),
    "YOLOv2": lambda: models.YOLOv2(2, backbone=models.Darknet19(8), anchors=levels(32)),
    "YOLOv3": lambda: models.YOLOv3(2, backbone=models.Darknet53(6, (1, 1, 1, 1, 1)), anchors=levels(8, 16, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_images_are_memorised(family) -> None:
    torch.manual_seed(0)
    detector = FAMILIES[family]().train()
    scale = (detector.image_size or 64) / 64
    images = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [0, 0, 0, 0]], [[20, 4, 60, 36], [4, 40, 20, 60]]])
    labels = torch.tensor([[0, PADDING], [1, 0]])
    for image, rows, classes in zip(images, boxes.long(), labels, strict=True):
        for (x1, y1, x2, y2), label in zip(rows.tolist(), classes.tolist(), strict=True):
            image[label, y1:y2, x1:x2] = 250
    images, targets = F.interpolate(images, scale_factor=scale), Targets(boxes * scale, labels)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(60 if scale > 1 else 120):
        losses = detector.loss(detector(images), targets)
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = detector.detect(detector(images))  # with the statistics of this batch
    for row, (truth, classes) in enumerate(zip(*targets, strict=True)):
        for box, label in zip(truth[classes >= 0], classes[classes >= 0], strict=True):
            is_it = (box_iou(box[None], found.boxes[row])[0] > 0.7) & (found.labels[row] == label)
            assert found.scores[row][is_it].max() > 0.5
