"""SSD's layers behind the backbone: extra feature maps and 3 x 3 prediction heads."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ExtraLayer(NamedTuple):
    """A 1 x 1 convolution that reduces the channels, then one that makes the next, smaller feature map."""

    reduced_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1


class ExtraLayers(nn.ModuleList):
    """SSD's neck: append ever smaller feature maps (arXiv:1512.02325, section 2.1).

    Args:
        in_channels: channels of the backbone's maps.
        layers: one per appended map.
    """

    def __init__(self, in_channels: Sequence[int], layers: Sequence[ExtraLayer]) -> None:
        super().__init__()
        self.out_channels = list(in_channels)
        for layer in layers:
            reduce = nn.Conv2d(self.out_channels[-1], layer.reduced_channels, kernel_size=1)
            conv = nn.Conv2d(layer.reduced_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            # No batch norm: the last maps have 1 to 9 cells, too few values for its statistics.
            block = [("reduce", _xavier(reduce)), ("reduce_relu", nn.ReLU(inplace=True))]
            block += [("conv", _xavier(conv)), ("conv_relu", nn.ReLU(inplace=True))]
            self.append(nn.Sequential(OrderedDict(block)))
            self.out_channels.append(layer.out_channels)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the given maps [B, C, H, W] and one more for each layer."""
        feature_maps = list(feature_maps)
        for layer in self:
            feature_maps.append(layer(feature_maps[-1]))
        return feature_maps


class AnchorHead(nn.Module):
    """Predict `num_outputs` numbers for every anchor with one 3 x 3 convolution per level (SSD section 2.1).

    Args:
        in_channels: channels of each feature map, [L].
        anchors_per_cell: of each level, [L].
        num_outputs: numbers for each anchor.
    """

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        sizes = zip(in_channels, anchors_per_cell, strict=True)
        self.levels = nn.ModuleList(_xavier(nn.Conv2d(c, n * num_outputs, 3, padding=1)) for c, n in sizes)

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Return [B, A, num_outputs] float32 of maps [B, C_l, H_l, W_l], in the order of `AnchorGrid`."""
        outputs = [
            level(features).permute(0, 2, 3, 1).reshape(len(features), -1, self.num_outputs)
            for level, features in zip(self.levels, feature_maps, strict=True)
        ]
        return torch.cat(outputs, dim=1).float()  # bf16 has 8 significant bits: near 300 px it resolves only 2 px

    @torch.no_grad()
    def start_at_prior(self, prior_bias: Tensor) -> None:
        """Set weights to N(0, 0.01^2) and biases to `prior_bias`, [num_outputs]. RetinaNet section 4.1."""
        for level in self.levels:
            weight, bias = level.get_parameter("weight"), level.get_parameter("bias")
            nn.init.normal_(weight, std=0.01)
            bias.copy_(prior_bias.repeat(len(bias) // self.num_outputs))


def _xavier(conv: nn.Conv2d) -> nn.Module:
    """Initialise as all new layers of SSD (section 3): Xavier weights, biases of 0."""
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv
