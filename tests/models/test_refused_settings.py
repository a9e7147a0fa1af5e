"""Every model and backbone refuses settings that do not fit, with the value, the rule and a remedy."""

from pathlib import Path

import pytest
import torch

from onestage import models
from onestage.boxes.anchors import AnchorShapes
from onestage.errors import ConfigError
from onestage.losses import ClassWeights, MinedCrossEntropy, ObjectSoftmaxLoss, QualityFocalLoss, SigmoidCrossEntropy

LEVELS = [AnchorShapes(stride, ((20.0, 10.0),)) for stride in (8, 16, 32)]
OFFSET_0 = LEVELS[2]._replace(offset=0.0)
WEIGHTED = SigmoidCrossEntropy(class_weights=ClassWeights([1.0] * 4))
OTHER_STRIDES = r"must be \(8, 16, 32\), got \(8, 16\)"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("VGG", {"strides": (16, 32)}, r"strides must be .*, or \(16, 32\) with stem_stride 2, got \(16, 32\)"),
        ("VGG", {"stem_stride": 4}, "stem_stride must be 1 or 2, got 4"),
        ("VGG", {"depths": (1, 1, 1, 1)}, "depths, widths must be five numbers each"),
        ("TorchvisionBackbone", {"name": "resnet19"}, "name must be a model of torchvision, got 'resnet19'"),
        (
            "TorchvisionBackbone",
            {"strides": (8, 64)},
            r"of resnet18 must be \[8, 64\] among others, got \[2, 4, 8, 16, ",
        ),
        ("TorchvisionBackbone", {"name": "squeezenet1_1"}, "got 'none'.\nSet name: resnet18"),
        ("TorchvisionBackbone", {"norm": "layer"}, "norm must be batch or frozen, got 'layer'"),
        ("FCOS", {"channels": 32}, "channels must be > 0, a multiple of 64, got 32"),
        ("FCOS", {"backbone": models.VGG}, OTHER_STRIDES),
        ("FCOS", {"pretrained": "x", "classification_loss": MinedCrossEntropy()}, "a loss with sigmoids, got 'MinedCr"),
        ("RetinaNet", {"backbone": models.VGG}, OTHER_STRIDES + r"\.\nSet strides"),
        ("RetinaNet", {"p6_from": "p7"}, "p6_from must be p5 or c5, got 'p7'"),
        ("RetinaNet", {"group_norm": True, "channels": 16}, "> 0, a multiple of 64 with group_norm, got 16"),
        ("RetinaNet", {"anchors": LEVELS[:1]}, "one level for each, got \\[8"),
        (
            "RetinaNet",
            {"pretrained": "torchvision_coco", "classification_loss": MinedCrossEntropy()},
            "got 'MinedCrossEntropy, group",
        ),
        ("SSD160", {"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ("SSD160", {"image_size": 300}, "image_size must be 160, got 300.\nSet data.image_size: 160"),
        ("SSD160", {"anchors": "kitti"}, "anchors must be one of voc, coco, got 'kitti'"),
        ("SSD160", {"anchors": [*models.SSD300.anchor_tables["voc"]]}, "anchors, strides must be .8, 16, 32, 53, 160."),
        ("SSD160", {"backbone_weights": "IMAGENET1K_FEATURES"}, "must be VGG16 without batch norm, got 'VGG'"),
        ("SSD160", {"pretrained": "torchvision_coco"}, "SSD300 or SSDLite320, coco, a softmax, got 'SSD160, voc"),
        ("YOLOv3", {"anchors": LEVELS[1:]}, r"YOLOv3: anchors, strides must be \(8, 16, 32\), one level"),
        ("YOLOv3", {"anchors": [*LEVELS[:2], OFFSET_0]}, "offsets must be 0.5"),
        ("YOLOv3", {"backbone": models.Darknet19}, r"strides of the backbone must be \(8, 16, 32\)"),
        ("YOLOv2", {"backbone": models.Darknet53}, r"strides of the backbone must be \(16, 32\) or \(8, 16\)"),
        ("YOLOv3", {"classification_loss": WEIGHTED}, "must be null"),
        ("YOLOv3", {"objectness_loss": WEIGHTED}, "class_weights of objectness_loss must be null"),
        ("YOLOv3", {"classification_loss": QualityFocalLoss()}, "must be a loss that does not use the IoU"),
        ("SSD160", {"classification_loss": ObjectSoftmaxLoss()}, "must be a loss with a background, got 'ObjectSoft"),
        ("FCOS", {"classification_loss": ObjectSoftmaxLoss()}, "must be a loss with a background, got 'ObjectSoft"),
        ("SSD128", {"anchors": [level._replace(offset=5.0) for level in LEVELS]}, "offset must be in .0, 1., got 5.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, settings, message) -> None:
    defaults = {"VGG": {}, "TorchvisionBackbone": {"name": "resnet18"}}.get(kind, {"num_classes": 4})
    with torch.device("meta"), pytest.raises(ConfigError, match=message):  # without millions of random numbers
        backbone = {"backbone": settings["backbone"]()} if "backbone" in settings else {}
        getattr(models, kind)(**(defaults | settings | backbone))


def test_darknet_file_is_not_written_without_the_weights_of_another_backbone(tmp_path: Path) -> None:
    with torch.device("meta"):
        detector = models.YOLOv3(1, backbone=models.TorchvisionBackbone("mobilenet_v3_small", strides=(8, 16, 32)))
    with pytest.raises(ConfigError, match="backbone of a darknet file must be Darknet's own, got 'Torchvision"):
        detector.save_darknet(tmp_path / "a.weights")
    assert list(tmp_path.iterdir()) == []
