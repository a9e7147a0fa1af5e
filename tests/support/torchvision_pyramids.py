"""torchvision's detectors on a ResNet-18 with an FPN, with random statistics and scores of all sizes."""

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from onestage.types import Detections


def pyramid(p6_channels: int = 256) -> BackboneWithFPN:
    settings = {"norm_layer": nn.BatchNorm2d, "returned_layers": [2, 3, 4]}
    extra = LastLevelP6P7(p6_channels, 256)
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, extra_blocks=extra, **settings
    )


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give a RetinaNet or FCOS other statistics than 0 and 1, and logits and distances of order 1."""
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
