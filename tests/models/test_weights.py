"""torchvision's SSD300 and SSDLite320 are the second implementation: same weights, same images, same outputs."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert

from onestage.errors import CheckpointError, ConfigError
from onestage.losses import MinedCrossEntropy, SigmoidFocalLoss
from onestage.models import SSD300, VGG, SSDLite320
from onestage.models.weights import load_vgg16
from onestage.reliability.checkpoints import load_fitting_weights
from onestage.training.module import DetectionModule
from onestage.types import PADDING, Predictions


def ssd300(num_classes: int, **changes) -> SSD300:
    return SSD300(num_classes, **({"classification_loss": MinedCrossEntropy(), "anchors": "coco"} | changes))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Callable[[type], tuple[nn.Module, str]]:
    """Return torchvision's counterpart of a class, with 20 classes and random weights, and the file of the weights."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def make(kind: type) -> tuple[nn.Module, str]:
        torch.manual_seed(0)
        build = ssd300_vgg16 if kind is SSD300 else ssdlite320_mobilenet_v3_large
        model = build(weights=None, weights_backbone=None, num_classes=21).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.01, 0.1)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        path = folder / f"{kind.__name__}.pth"
        torch.save(model.state_dict(), path)
        return model, str(path)

    return make


def background_last(class_logits):
    return torch.cat([class_logits[..., 1:], class_logits[..., :1]], dim=-1)


@pytest.mark.parametrize("kind", [SSD300, SSDLite320])
def test_outputs_and_anchors_equal_torchvision_with_its_weights(kind, published) -> None:
    theirs, file = published(kind)
    detector = kind(20, MinedCrossEntropy(), anchors="coco", pretrained=file).eval()
    side = detector.image_size
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in images])
        features = list(theirs.backbone(transformed.tensors).values())
        expected, predictions = theirs.head(features), detector(images)
        (anchors,) = theirs.anchor_generator(ImageList(transformed.tensors, [(side, side)]), features)
    outputs = (predictions.class_logits, background_last(expected["cls_logits"]))
    for ours, of_torchvision in (outputs, (predictions.box_outputs, expected["bbox_regression"])):
        scale = of_torchvision.std()
        assert scale > 0.01  # the comparison is of something
        assert_close(ours / scale, of_torchvision / scale, atol=1e-3, rtol=1e-3)  # sums in another order
    assert_close(box_convert(predictions.anchors.boxes, "cxcywh", "xyxy"), anchors, atol=1e-3, rtol=0)


def test_published_weights_start_a_run_of_other_classes(published, caplog) -> None:
    module = DetectionModule(SSDLite320(3))
    with caplog.at_level("INFO"):
        load_fitting_weights(module, published(SSDLite320)[1], ["a", "b", "c"])
    fresh = {name for name, _ in module.detector.named_parameters() if f"detector.{name}: " in caplog.text}
    assert fresh == {f"class_head.levels.{level}.1.{part}" for level in range(6) for part in ("weight", "bias")}


def test_coco_weights_of_91_columns_give_the_80_labels_in_order_of_their_ids(tmp_path) -> None:
    with torch.device("meta"):
        state = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).state_dict()
    # Zeros that take no space on disk; the head's biases are the category ids of their columns.
    state = {key: torch.zeros(1).expand(value.shape) for key, value in state.items()}
    for level, anchors in enumerate((4, 6, 6, 6, 4, 4)):
        state[f"head.classification_head.module_list.{level}.bias"] = torch.arange(91.0).repeat(anchors)
    torch.save(state, tmp_path / "coco.pth")
    detector = ssd300(80, pretrained=str(tmp_path / "coco.pth"))
    used = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # ids that COCO skips
    for conv in detector.class_head.levels:
        assert all(row == [*used, 0] for row in conv.bias.view(-1, 81).long().tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 6}, "trained on 20 classes, the data have 6.*\n.*null and give --init_from "),
        ({"classification_loss": SigmoidFocalLoss()}, "got 'SSD300, coco, SigmoidFocalLoss'.\n.*MinedCrossEntropy"),
        ({"anchors": "voc"}, "got 'SSD300, voc, MinedCrossEntropy'"),
        ({"backbone": VGG(widths=(2, 2, 2, 2, 2), fc_width=4, batch_norm=True)}, "pretrained: .* detector must be"),
    ],
)
def test_pretrained_needs_the_same_classes_loss_anchors_and_backbone(changes, message, published) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        ssd300(**({"num_classes": 20, "pretrained": published(SSD300)[1]} | changes))


@pytest.mark.parametrize("key", ["pretrained", "backbone_weights"])
@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "text", "list", "object", "other model"])
def test_unusable_weight_files_give_one_message_with_a_remedy(content, key, tmp_path) -> None:
    path = tmp_path / "weights.pth"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("not weights\n" * 100)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    elif content == "object":
        torch.save({"weight": nn.Linear(1, 1)}, path)  # needs code to load
    elif content != "missing":
        torch.save(nn.Linear(100, 100).state_dict(), path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    with torch.device("meta"), pytest.raises(CheckpointError) as error:  # no need for 25 million random numbers
        ssd300(20, **{key: str(path)})
    assert str(error.value).startswith(f"{key}: {path}")
    assert f"Set {key} to one of" in str(error.value)


@pytest.mark.parametrize("key", ["pretrained", "backbone_weights"])
def test_unreachable_weights_name_the_choices(key, monkeypatch) -> None:
    value = "IMAGENET1K_FEATURES" if key == "backbone_weights" else "torchvision_coco"
    for weights in (VGG16_Weights, SSD300_VGG16_Weights):
        monkeypatch.setattr(weights, "get_state_dict", Mock(side_effect=URLError("no network")))
    with torch.device("meta"), pytest.raises(CheckpointError, match="no network") as error:
        ssd300(80, **{key: value})
    assert all(choice in str(error.value) for choice in (value, "path", "null", "checkpoints by hand"))


@pytest.mark.parametrize(("prefix", "with_fc"), [("features.", False), ("", True)])
def test_vgg16_weights_give_the_same_features_on_images_divided_by_64(prefix, with_fc, tmp_path) -> None:
    source, backbone = (VGG(widths=(2, 2, 4, 4, 4), fc_width=8) for _ in range(2))
    convs = [m for m in source.modules() if isinstance(m, nn.Conv2d)]
    state = OrderedDict({"classifier.0.weight": torch.zeros(1)})
    for index, conv in zip([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33][: 15 if with_fc else 13], convs):  # noqa: B905
        state[f"{prefix}{index}.weight"], state[f"{prefix}{index}.bias"] = conv.weight.detach(), conv.bias.detach()
    torch.save(state, tmp_path / "vgg.pth")
    load_vgg16(backbone, str(tmp_path / "vgg.pth"), scale=64.0)
    images = torch.randn(1, 3, 40, 40) * 50
    with torch.no_grad():
        (conv4, fc7), (expected_conv4, expected_fc7) = backbone.features(images / 64), source.features(images)
    assert torch.equal(conv4, expected_conv4)  # to the last bit: 64 is a power of two
    assert torch.equal(fc7, expected_fc7) == with_fc
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"conv1_1.weight of shape .* instead of \(64"):
        ssd300(20, backbone_weights=str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize(
    ("num_columns", "spread", "limits"),
    [
        (2, 1.5, (400, 200)),
        (21, 0.02, (400, 200)),  # as if untrained: all pass the threshold
        (91, 1.5, (400, 200)),
        (3, 1.5, (5, 50)),  # the limit per class decides: 10 detections at most
    ],
)
def test_detections_equal_torchvision_on_the_same_outputs(num_columns, spread, limits) -> None:
    with torch.device("meta"):
        theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_columns)
        theirs.topk_candidates, theirs.detections_per_img = limits
        detector = ssd300(num_columns - 1, candidates_per_class=limits[0], max_detections=limits[1])
    generator = torch.Generator().manual_seed(num_columns)
    # float64, so that no two scores are equal: torchvision leaves the order of equal ones to chance.
    class_logits = torch.randn(1, 8732, num_columns, generator=generator, dtype=torch.float64) * spread
    class_logits[..., 0] += 4 * (spread > 1)
    box_outputs = torch.randn(1, 8732, 4, generator=generator, dtype=torch.float64) * 0.7
    anchors = ssd300(1).anchor_grid([(side, side) for side in (38, 19, 10, 5, 3, 1)])
    outputs = {"cls_logits": class_logits, "bbox_regression": box_outputs}
    (expected,) = theirs.postprocess_detections(outputs, [box_convert(anchors.boxes, "cxcywh", "xyxy")], [(300, 300)])
    found = detector.detect(Predictions(background_last(class_logits), box_outputs, anchors))
    number = len(expected["scores"])
    assert number == limits[1] or 5 < number <= 2 * limits[0]
    assert_close(found.scores[0, :number].double(), expected["scores"], atol=1e-6, rtol=1e-6)
    assert found.labels[0].tolist() == [*(expected["labels"] - 1).tolist(), *[PADDING] * (limits[1] - number)]
    assert_close(found.boxes[0, :number].double(), expected["boxes"], atol=1e-3, rtol=1e-5)
