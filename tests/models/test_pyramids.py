"""torchvision's RetinaNet and FCOS are the second implementation: same weights, images, outputs and detections."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from onestage.losses import GIoULoss
from onestage.models import FCOS, RetinaNet, TorchvisionBackbone
from onestage.types import PADDING, Detections, Targets

VERSION_2 = {"p6_from": "c5", "group_norm": True, "box_loss": GIoULoss()}
MODELS = {"FCOS": (FCOS, {}), "RetinaNet": (RetinaNet, {}), "RetinaNet 2": (RetinaNet, VERSION_2)}
TOLERANCE = {"atol": 1e-3, "rtol": 1e-3}  # sums in another order, by instruction set


def pyramid(p6_channels: int) -> BackboneWithFPN:
    settings = {"norm_layer": nn.BatchNorm2d, "returned_layers": [2, 3, 4], "trainable_layers": 5}
    extra = LastLevelP6P7(p6_channels, 256)
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, extra_blocks=extra, **settings)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give a model other statistics than 0 and 1, and logits and distances of order 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    head = model.head
    for conv in (*head.classification_head.modules(), *head.regression_head.modules()):
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    outputs = head(list(model.backbone(torch.randn(1, 3, 64, 64)).values()))
    head.classification_head.cls_logits.weight.div_(outputs["cls_logits"].std())  # else scores would be 0 or 1
    head.regression_head.bbox_reg.weight.div_(5 * outputs["bbox_regression"].std())
    head.classification_head.cls_logits.bias.fill_(-2.0)


def theirs_of(name: str, side: int = 128) -> nn.Module:
    """Return torchvision's model of 8 columns on a ResNet-18 with an FPN, with scores of all sizes."""
    torch.manual_seed([*MODELS].index(name))
    if name == "FCOS":
        model = detection.FCOS(pyramid(256), 8, min_size=side, max_size=side).eval()
    else:
        norm = partial(nn.GroupNorm, 32) if name == "RetinaNet 2" else None
        head = RetinaNetHead(256, 9, 8, norm_layer=norm)
        backbone = pyramid(512 if name == "RetinaNet 2" else 256)
        model = detection.RetinaNet(backbone, 8, head=head, min_size=side, max_size=side).eval()
    randomise(model)
    if name == "FCOS":
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.5)
    return model


def ours_of(name: str, file: Path) -> FCOS | RetinaNet:
    kind, settings = MODELS[name]
    backbone = TorchvisionBackbone("resnet18", (8, 16, 32))
    return kind(7, backbone=backbone, pretrained=str(file), **settings).eval()


def both_of(name: str, side: int, folder: Path) -> tuple:
    """Return our detector and torchvision's model of the same weights, two images, and its outputs and anchors."""
    theirs = theirs_of(name, side)
    torch.save(theirs.state_dict(), folder / "weights.pth")
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in images])
        features = list(theirs.backbone(transformed.tensors).values())
        outputs, anchors = theirs.head(features), theirs.anchor_generator(transformed, features)
    return ours_of(name, folder / "weights.pth"), theirs, images, outputs, anchors


def share_of_same(expected: list[dict[str, Tensor]], found: Detections, at_least: int) -> float:
    """Return the share of torchvision's detections of an image that are among ours; scores may swap order.

    Its column 0, which is never trained, takes some of its places. at_least: detections that it must have.
    """
    shares = []
    for boxes, scores, labels, theirs in zip(*found, expected, strict=True):
        is_class = theirs["labels"] > 0
        assert is_class.sum() >= at_least  # the comparison is of something
        distances = (theirs["boxes"][is_class, None] - boxes).abs().amax(dim=-1)
        same = (theirs["labels"][is_class, None] == labels + 1) & (distances < 0.05)
        same &= (theirs["scores"][is_class, None] - scores).abs() < 1e-3
        shares.append(same.any(dim=1).float().mean().item())
    return min(shares)


@pytest.mark.parametrize("side", [128, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "num_detections"), [("FCOS", 50), ("RetinaNet", 150), ("RetinaNet 2", 150)])
def test_outputs_anchors_and_detections_equal_torchvision_with_its_weights(name, num_detections, side, tmp_path):
    detector, theirs, images, outputs, anchors = both_of(name, side, tmp_path)
    with torch.no_grad():
        expected, predictions = theirs([image / 255 for image in images]), detector(images)
    assert_close(predictions.class_logits, outputs["cls_logits"][..., 1:], **TOLERANCE)  # column 0 is never trained
    boxes = box_convert(predictions.anchors.boxes, "cxcywh", "xyxy")
    if name == "FCOS":
        assert_close(predictions.box_outputs.relu(), outputs["bbox_regression"], **TOLERANCE)
        assert_close(predictions.quality_logits, outputs["bbox_ctrness"][..., 0], **TOLERANCE)
        assert torch.equal(boxes[:, :2] + boxes[:, 2:], anchors[0][:, :2] + anchors[0][:, 2:])  # only their centres
    else:
        assert_close(predictions.box_outputs, outputs["bbox_regression"], **TOLERANCE)
        assert torch.equal(boxes, anchors[0])
    assert share_of_same(expected, detector.detect(predictions), num_detections) > 0.99


def test_losses_of_fcos_equal_torchvision(tmp_path) -> None:
    detector, theirs, images, outputs, anchors = both_of("FCOS", 128, tmp_path)
    boxes = torch.tensor([[[10.0, 12, 42, 30], [14, 15, 20, 61], [20, 5, 126, 122], [0, 0, 0, 0]], [[0.0] * 4] * 4])
    targets = Targets(boxes, torch.tensor([[1, 5, 0, PADDING], [PADDING] * 4]))
    pairs = zip(*targets, strict=True)
    theirs_of_image = [{"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1} for boxes, labels in pairs]
    with torch.no_grad():
        losses = theirs.compute_loss(theirs_of_image, outputs, anchors, [256, 64, 16, 4, 1])
        found = detector.loss(detector(images), targets)
        # Column 0 of the logits is never trained and not ours; its loss is of background alone.
        column = torch.sigmoid(outputs["cls_logits"][..., 0])
        background = (0.75 * column**2 * -(1 - column).log()).sum()
    assert found.num_positives >= 15
    expected = losses["classification"] - background / found.num_positives
    assert_close(found.terms["classification"], expected, **TOLERANCE)
    assert_close(found.terms["box"], losses["bbox_regression"], **TOLERANCE)
    assert_close(found.terms["centerness"], losses["bbox_ctrness"], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "num_parameters"),
    [  # 53,120: the batch norms of a ResNet-50, which are frozen in torchvision's published first models
        ("FCOS", detection.fcos_resnet50_fpn, 32_269_600 + 53_120),
        ("RetinaNet", detection.retinanet_resnet50_fpn, 34_014_999 + 53_120),
        ("RetinaNet 2", detection.retinanet_resnet50_fpn_v2, 38_198_935),
    ],
)
def test_published_models_have_the_published_size_and_keys(name, make, num_parameters, tmp_path) -> None:
    theirs, (kind, settings) = make(weights=None, weights_backbone=None), MODELS[name]
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    detector, shapes = kind(80, pretrained=str(tmp_path / "coco.pth"), **settings), 1 if kind is FCOS else 9
    unused = 11 * shapes * (256 * 9 + 1)  # 91 columns, of which COCO uses 80
    assert sum(p.numel() for p in theirs.parameters()) == num_parameters
    assert sum(p.numel() for p in detector.parameters()) == num_parameters - unused
    weights = theirs.state_dict()["head.classification_head.cls_logits.weight"].view(shapes, 91, 256, 3, 3)
    assert torch.equal(detector.class_head.output.weight.view(shapes, 80, 256, 3, 3)[:, 0], weights[:, 1])  # person


def test_files_of_torchvision_before_0_13_load_and_the_published_one_was_trained_with_eps_0(tmp_path) -> None:
    state, old = theirs_of("RetinaNet").state_dict(), {}
    for name, tensor in state.items():
        if "fpn.inner" in name or "fpn.layer" in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if ".conv." in name:
            *parts, index, _, kind = name.split(".")
            name = ".".join([*parts, str(2 * int(index)), kind])
        old[name] = tensor
    assert {"head.regression_head.conv.6.weight", "backbone.fpn.inner_blocks.2.weight"} <= old.keys()
    path = tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    torch.save(old, path)
    detector = ours_of("RetinaNet", path)
    assert torch.equal(detector.box_head.tower[3][0].bias, state["head.regression_head.conv.3.0.bias"])
    norm = detector.backbone.body.bn1
    assert_close(norm.running_var + norm.eps, state["backbone.body.bn1.running_var"])
