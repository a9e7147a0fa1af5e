"""Layers behind the backbone: SSD's extra feature maps and prediction heads."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
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
    """SSD's neck: append a smaller feature map for each layer (arXiv:1512.02325, section 2.1)."""

    def __init__(self, in_channels: Sequence[int], layers: Sequence[ExtraLayer]) -> None:
        super().__init__()
        self.out_channels = list(in_channels)
        for layer in layers:
            self.append(self.make_block(self.out_channels[-1], layer))
            self.out_channels.append(layer.out_channels)

    def make_block(self, in_channels: int, layer: ExtraLayer) -> nn.Module:
        """Return the layer that makes the next map."""
        reduce = nn.Conv2d(in_channels, layer.reduced_channels, kernel_size=1)
        conv = nn.Conv2d(layer.reduced_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        # No batch norm: the last maps have 1 to 9 cells, too few values for its statistics.
        block = OrderedDict(reduce=reduce, reduce_relu=nn.ReLU(True), conv=conv, conv_relu=nn.ReLU(True))
        return initialise(nn.Sequential(block), nn.init.xavier_uniform_)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the given maps [B, C, H, W] and one more for each layer."""
        feature_maps = list(feature_maps)
        for layer in self:
            feature_maps.append(layer(feature_maps[-1]))
        return feature_maps


class AnchorHead(nn.Module):
    """Predict `num_outputs` numbers for every anchor with one convolution per level (SSD section 2.1).

    in_channels, anchors_per_cell: of each level, [L]. kernel_size: odd; 3 in SSD, 1 in YOLO.
    """

    def __init__(
        self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_outputs: int, kernel_size: int = 3
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        sizes = zip(in_channels, anchors_per_cell, strict=True)
        padding = kernel_size // 2
        convs = (nn.Conv2d(c, n * num_outputs, kernel_size, padding=padding) for c, n in sizes)
        self.levels = nn.ModuleList(initialise(conv, nn.init.xavier_uniform_) for conv in convs)

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Return [B, A, num_outputs] float32 of maps [B, C_l, H_l, W_l], in the order of `AnchorGrid`."""
        outputs = [level(features) for level, features in zip(self.levels, feature_maps, strict=True)]
        return by_anchor(outputs, self.num_outputs)

    def start_at_prior(self, prior_bias: Tensor) -> None:
        """Set weights to N(0, 0.01^2) and biases to `prior_bias`, [num_outputs]. RetinaNet section 4.1."""
        for level in self.levels:
            start_at(level[-1] if isinstance(level, nn.Sequential) else level, prior_bias)


def by_anchor(maps: Sequence[Tensor], num_outputs: int) -> Tensor:
    """Return [B, A, num_outputs] float32 of output maps [B, anchors per cell * num_outputs, H_l, W_l]."""
    cells = (features.permute(0, 2, 3, 1) for features in maps)
    # Not one reshape, which cannot infer the number of anchors of a batch without images.
    rows = [torch.unflatten(features, -1, (-1, num_outputs)).flatten(1, 3) for features in cells]
    return torch.cat(rows, dim=1).float()  # bf16 has 8 significant bits: near 300 px it resolves only 2 px


@torch.no_grad()
def start_at(conv: nn.Module, bias: Tensor) -> None:
    """Set the weights of a convolution to N(0, 0.01^2) and its biases to repetitions of `bias`."""
    nn.init.normal_(conv.get_parameter("weight"), std=0.01)
    biases = conv.get_parameter("bias")
    biases.copy_(bias.repeat(len(biases) // len(bias)))


def initialise(module: nn.Module, set_weights: Callable[[Tensor], object]) -> nn.Module:
    """Set the weights of all convolutions by a function of `torch.nn.init`, and their biases to 0; return the module.

    SSD's new layers have Xavier weights (section 3).
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            set_weights(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
    return module
