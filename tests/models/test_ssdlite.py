"""torchvision's SSDLite320 is the second implementation: same weights, same images, same outputs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList

from onestage.losses import MinedCrossEntropy
from onestage.models import SSDLite320
from onestage.reliability.checkpoints import load_fitting_weights
from onestage.training.module import DetectionModule


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.01, 0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


@pytest.fixture(scope="module")
def weights_file(theirs, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "ssdlite.pth"
    torch.save(theirs.state_dict(), path)
    return str(path)


def test_outputs_and_anchors_equal_torchvision_with_its_weights(theirs, weights_file) -> None:
    detector = SSDLite320(4, MinedCrossEntropy(), anchors="coco", pretrained=weights_file).eval()
    images = torch.randint(0, 256, (1, 3, 320, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in images])
        features = list(theirs.backbone(transformed.tensors).values())
        expected = theirs.head(features)
        (anchors,) = theirs.anchor_generator(ImageList(transformed.tensors, [(320, 320)]), features)
        predictions = detector(images)
    logits = expected["cls_logits"]
    scale = float(logits.std())
    assert scale > 0.01  # the comparison is of something
    assert_close(predictions.class_logits / scale, logits[..., [1, 2, 3, 4, 0]] / scale, atol=1e-3, rtol=1e-3)
    boxes = expected["bbox_regression"]
    assert_close(predictions.box_outputs / boxes.std(), boxes / boxes.std(), atol=1e-3, rtol=1e-3)
    assert len(predictions.anchors.boxes) == 3234
    half = predictions.anchors.boxes[:, 2:] / 2
    corners = torch.cat([predictions.anchors.boxes[:, :2] - half, predictions.anchors.boxes[:, :2] + half], dim=1)
    assert_close(corners, anchors, atol=1e-3, rtol=0)


def test_published_weights_start_a_run_of_other_classes(weights_file, caplog) -> None:
    module = DetectionModule(SSDLite320(3))
    with caplog.at_level("INFO"):
        load_fitting_weights(module, weights_file, ["a", "b", "c"])
    fresh = {name for name, _ in module.detector.named_parameters() if f"detector.{name}: " in caplog.text}
    assert fresh == {f"class_head.levels.{level}.1.{part}" for level in range(6) for part in ("weight", "bias")}
