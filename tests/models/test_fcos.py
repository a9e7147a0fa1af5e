"""torchvision's FCOS is the second implementation: same weights, same images, same outputs, losses and detections."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import fcos, fcos_resnet50_fpn
from torchvision_pyramids import pyramid, randomise, share_of_same

from onestage.errors import ConfigError
from onestage.losses import MinedCrossEntropy
from onestage.models import FCOS, VGG, TorchvisionBackbone
from onestage.types import PADDING, Targets

SIDE = 128


def theirs_of(num_columns: int) -> fcos.FCOS:
    torch.manual_seed(0)
    model = fcos.FCOS(pyramid(), num_columns, min_size=SIDE, max_size=SIDE).eval()
    randomise(model)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.5)
    return model


@pytest.fixture(scope="module")
def small() -> TorchvisionBackbone:
    return TorchvisionBackbone("mobilenet_v3_small", (8, 16, 32))


def some_objects() -> Targets:
    boxes = torch.tensor([[[10.0, 12, 42, 30], [14, 15, 20, 61], [20, 5, 126, 122], [0, 0, 0, 0]], [[0.0] * 4] * 4])
    return Targets(boxes, torch.tensor([[1, 5, 0, PADDING], [PADDING] * 4]))


def test_outputs_losses_and_detections_equal_torchvision_with_its_weights(tmp_path) -> None:
    theirs = theirs_of(8)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    backbone = TorchvisionBackbone("resnet18", (8, 16, 32))
    detector = FCOS(7, backbone=backbone, pretrained=str(tmp_path / "weights.pth")).eval()
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator), some_objects()
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in images])
        features = list(theirs.backbone(transformed.tensors).values())
        outputs, anchors = theirs.head(features), theirs.anchor_generator(transformed, features)
        expected = theirs.postprocess_detections(
            {key: list(value.split([256, 64, 16, 4, 1], dim=1)) for key, value in outputs.items()},
            [list(rows.split([256, 64, 16, 4, 1])) for rows in anchors],
            transformed.image_sizes,
        )
        predictions = detector(images)
        their_targets = [
            {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
            for boxes, labels in zip(*targets, strict=True)
        ]
        losses = theirs.compute_loss(their_targets, outputs, anchors, [256, 64, 16, 4, 1])
        # Column 0 of the logits is never trained and not ours; its loss is of background alone.
        column = torch.sigmoid(outputs["cls_logits"][..., 0])
        background = (0.75 * column**2 * -(1 - column).log()).sum()
    tolerance = {"atol": 1e-3, "rtol": 1e-3}  # sums in another order, by instruction set
    assert_close(predictions.class_logits, outputs["cls_logits"][..., 1:], **tolerance)
    assert_close(predictions.box_outputs.relu(), outputs["bbox_regression"], **tolerance)
    assert_close(predictions.quality_logits, outputs["bbox_ctrness"][..., 0], **tolerance)
    assert torch.equal(predictions.anchors.boxes[:, :2], (anchors[0][:, :2] + anchors[0][:, 2:]) / 2)
    assert share_of_same(expected, detector.detect(predictions), at_least=50) > 0.99

    found = detector.loss(predictions, targets)
    assert found.num_positives >= 15
    expected_classes = losses["classification"] - background / found.num_positives
    assert_close(found.terms["classification"], expected_classes, **tolerance)
    assert_close(found.terms["box"], losses["bbox_regression"], **tolerance)
    assert_close(found.terms["centerness"], losses["bbox_ctrness"], **tolerance)


@pytest.mark.slow
def test_published_model_has_the_published_size_and_keys(tmp_path) -> None:
    theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    detector = FCOS(80, pretrained=str(tmp_path / "coco.pth"))
    # torchvision's 32,269,600 are without the batch norms of a ResNet-50, which are frozen there; 11 unused columns.
    assert sum(p.numel() for p in detector.parameters()) == 32_269_600 + 53_120 - 11 * (256 * 9 + 1)
    person = theirs.state_dict()["head.classification_head.cls_logits.weight"][1]
    assert torch.equal(detector.class_head.output.weight[0], person)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 32}, "channels must be > 0, a multiple of 64, got 32"),
        ({"backbone": VGG((1,) * 5, (2,) * 5, fc_width=2)}, r"must be \(8, 16, 32\), got \(8, 16\)"),
        ({"pretrained": "x", "classification_loss": MinedCrossEntropy()}, "a loss with sigmoids, got 'MinedCross"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, small) -> None:
    with pytest.raises(ConfigError, match=message):
        FCOS(3, **({"backbone": small, "channels": 64, "tower_convs": 1} | changes))
