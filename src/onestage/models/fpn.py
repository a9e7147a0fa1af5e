"""Feature pyramid network (arXiv:1612.03144), with the two coarse levels of RetinaNet."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from onestage.errors import require
from onestage.models.backbone import Backbone, TorchvisionBackbone

STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7, px


class FPN(nn.Module):
    """RetinaNet's neck: P3 to P5 from three maps of a backbone, P6 and P7 by strided convolutions (section 4).

    Args:
        in_channels: channels of the backbone's maps, C3 to C5, finest first.
        channels: of every level.
        p6_from: the map that P6 is computed from: "p5" (torchvision, detectron2's later models) or "c5" (the paper).
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, p6_from: Literal["p5", "c5"] = "p5") -> None:
        super().__init__()
        self.p6_from = p6_from
        self.laterals = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.smoothing = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps [B, channels, H_l, W_l] of all levels, finest first, from those of the backbone."""
        merged = [lateral(features) for lateral, features in zip(self.laterals, feature_maps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):  # top-down
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[-2:])
        levels = [smooth(features) for smooth, features in zip(self.smoothing, merged, strict=True)]
        levels.append(self.p6(feature_maps[-1] if self.p6_from == "c5" else levels[-1]))
        return [*levels, self.p7(levels[-1].relu())]


def pyramid_backbone(name: str, backbone: Backbone | None) -> Backbone:
    """Return a ResNet-50 with random weights, or the given backbone; ConfigError if it has other maps than C3 to C5."""
    backbone = backbone or TorchvisionBackbone("resnet50", STRIDES[:3])
    remedy = "Set strides: [8, 16, 32] in the init_args of the backbone."
    place, fits = f"{name}: strides of the backbone", backbone.strides == STRIDES[:3]
    require(fits, place, backbone.strides, "(8, 16, 32)", remedy)
    return backbone
