"""torchvision's RetinaNet is the second implementation: same weights, same images, same outputs."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import RetinaNet as TheirRetinaNet, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision_pyramids import pyramid, randomise, share_of_same

from onestage.boxes.anchors import AnchorShapes
from onestage.errors import ConfigError
from onestage.losses import GIoULoss, MinedCrossEntropy
from onestage.models import VGG, RetinaNet, TorchvisionBackbone

STRIDES = (8, 16, 32)
VERSIONS = {1: {}, 2: {"p6_from": "c5", "group_norm": True, "box_loss": GIoULoss()}}


def theirs_of(version: int, num_columns: int, side: int = 128) -> TheirRetinaNet:
    """Return torchvision's model on a ResNet-18, with random statistics and scores above the threshold."""
    torch.manual_seed(version)
    norm = partial(nn.GroupNorm, 32) if version == 2 else None
    head = RetinaNetHead(256, 9, num_columns, norm_layer=norm)
    backbone = pyramid(256 if version == 1 else 512)
    model = TheirRetinaNet(backbone, num_columns, head=head, min_size=side, max_size=side).eval()
    randomise(model)
    return model


def ours_of(version: int, num_classes: int, **changes) -> RetinaNet:
    backbone = TorchvisionBackbone("resnet18", STRIDES)
    return RetinaNet(num_classes, backbone=backbone, **(VERSIONS[version] | changes)).eval()


@pytest.fixture(scope="module")
def small() -> TorchvisionBackbone:
    return TorchvisionBackbone("mobilenet_v3_small", STRIDES)


@pytest.mark.parametrize(
    ("version", "side"), [(1, 128), (2, 128), *[pytest.param(v, 256, marks=pytest.mark.slow) for v in (1, 2)]]
)
def test_outputs_anchors_and_detections_equal_torchvision_with_its_weights(version, side, tmp_path) -> None:
    theirs = theirs_of(version, num_columns=8, side=side)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    detector = ours_of(version, 7, pretrained=str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in images])
        features = list(theirs.backbone(transformed.tensors).values())
        outputs, anchors = theirs.head(features), theirs.anchor_generator(transformed, features)
        expected = theirs([image / 255 for image in images])
        predictions = detector(images)
    assert predictions.class_logits.shape == (1, 9 * sum((side // stride) ** 2 for stride in (8, 16, 32, 64, 128)), 7)
    tolerance = {"atol": 1e-3, "rtol": 1e-3}  # sums in another order, by instruction set
    assert_close(predictions.class_logits, outputs["cls_logits"][..., 1:], **tolerance)  # column 0 is never trained
    assert_close(predictions.box_outputs, outputs["bbox_regression"], **tolerance)
    half = predictions.anchors.boxes[:, 2:] / 2
    centres = predictions.anchors.boxes[:, :2]
    assert torch.equal(torch.cat([centres - half, centres + half], dim=1), anchors[0])
    assert share_of_same(expected, detector.detect(predictions), at_least=150) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("version", "num_parameters"), [(1, 34_014_999 + 53_120), (2, 38_198_935)])
def test_published_models_have_the_published_size_and_keys(version, num_parameters, tmp_path) -> None:
    make = retinanet_resnet50_fpn if version == 1 else retinanet_resnet50_fpn_v2
    theirs = make(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    detector = RetinaNet(80, pretrained=str(tmp_path / "coco.pth"), **VERSIONS[version])
    # 53,120: the batch norms of a ResNet-50, which are frozen in torchvision's published first version.
    unused = 11 * 9 * (256 * 9 + 1)  # 91 columns, of which COCO uses 80
    assert sum(p.numel() for p in theirs.parameters()) == num_parameters
    assert sum(p.numel() for p in detector.parameters()) == num_parameters - unused
    person = theirs.state_dict()["head.classification_head.cls_logits.weight"].view(9, 91, 256, 3, 3)[:, 1]
    assert torch.equal(detector.class_head.output.weight.view(9, 80, 256, 3, 3)[:, 0], person)


def test_files_of_torchvision_before_0_13_load_and_the_published_one_was_trained_with_eps_0(tmp_path) -> None:
    state, old = theirs_of(1, 8).state_dict(), {}
    for name, tensor in state.items():
        if "fpn.inner" in name or "fpn.layer" in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if ".conv." in name:
            *parts, index, _, kind = name.split(".")
            name = ".".join([*parts, str(2 * int(index)), kind])
        old[name] = tensor
    assert "head.regression_head.conv.6.weight" in old
    assert "backbone.fpn.inner_blocks.2.weight" in old
    path = tmp_path / "retinanet_resnet50_fpn_coco-eeacb38b.pth"
    torch.save(old, path)
    detector = ours_of(1, 7, pretrained=str(path))
    assert torch.equal(detector.box_head.tower[3][0].bias, state["head.regression_head.conv.3.0.bias"])
    norm = detector.backbone.body.bn1
    assert_close(norm.running_var + norm.eps, state["backbone.body.bn1.running_var"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": VGG((1,) * 5, (2,) * 5, fc_width=2)}, r"must be \(8, 16, 32\), got \(8, 16\)\.\nSet strides"),
        ({"p6_from": "p7"}, "p6_from must be p5 or c5, got 'p7'"),
        ({"group_norm": True}, "channels must be > 0, a multiple of 64 with group_norm, got 16"),
        ({"anchors": [AnchorShapes(8, ((8, 8),))]}, "one level for each, got \\[8"),
        (
            {"pretrained": "torchvision_coco", "classification_loss": MinedCrossEntropy()},
            "got 'MinedCrossEntropy, group",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message, small) -> None:
    with pytest.raises(ConfigError, match=message):
        RetinaNet(3, **({"backbone": small, "channels": 16, "tower_convs": 1} | changes))
