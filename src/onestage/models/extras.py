"""The layers behind the backbone that make SSD's smaller feature maps (arXiv:1512.02325, section 2.1)."""

from collections import OrderedDict
from typing import NamedTuple

from torch import nn


class ExtraLayer(NamedTuple):
    """A 1 x 1 convolution that reduces the channels, then one that makes the next, smaller feature map."""

    reduced_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1


def extra_block(in_channels: int, layer: ExtraLayer) -> nn.Sequential:
    """Return the two convolutions of an extra layer; Xavier weights (SSD section 3)."""
    reduce = nn.Conv2d(in_channels, layer.reduced_channels, kernel_size=1)
    conv = nn.Conv2d(layer.reduced_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    for new in (reduce, conv):
        nn.init.xavier_uniform_(new.weight)
        nn.init.constant_(new.get_parameter("bias"), 0)
    # No batch norm: the last maps have 1 to 9 cells, too few values for its statistics.
    layers = {"reduce": reduce, "reduce_relu": nn.ReLU(inplace=True), "conv": conv, "conv_relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(layers))
