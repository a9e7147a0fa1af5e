"""SSD's default boxes: the tables of the paper and of its Caffe code, and their tiling over the feature maps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onestage.types import Anchors


class AnchorLevel(NamedTuple):
    """The default boxes tiled over one feature map (SSD section 2.2). Lengths in network-input pixels."""

    side: int  # the feature map has side x side cells
    stride: int  # between neighbouring anchor centres
    size: float  # s_k, side of the square anchor
    next_size: float  # s_(k+1); a second square has side sqrt(s_k * s_(k+1))
    aspect_ratios: tuple[float, ...]  # each r adds r:1 and 1:r

    @property
    def anchors_per_cell(self) -> int:
        """Return 2 squares and, for each aspect ratio, a wide and a tall box."""
        return 2 + 2 * len(self.aspect_ratios)


# Sizes of the 300 and 512 px tables: the Caffe code of the paper (examples/ssd/ssd_{pascal,coco}*.py) spaces s_k
# evenly from s_min (VOC 0.20 at 300, 0.15 at 512; COCO 0.15, 0.10) to 0.90 of the image in whole percent, goes one
# step beyond for the last next_size, and gives conv4_3 a size of its own below s_min.
SSD300_VOC = (
    AnchorLevel(side=38, stride=8, size=30, next_size=60, aspect_ratios=(2,)),  # conv4_3
    AnchorLevel(side=19, stride=16, size=60, next_size=111, aspect_ratios=(2, 3)),  # fc7
    AnchorLevel(side=10, stride=32, size=111, next_size=162, aspect_ratios=(2, 3)),
    AnchorLevel(side=5, stride=64, size=162, next_size=213, aspect_ratios=(2, 3)),
    AnchorLevel(side=3, stride=100, size=213, next_size=264, aspect_ratios=(2,)),
    AnchorLevel(side=1, stride=300, size=264, next_size=315, aspect_ratios=(2,)),
)
SSD300_COCO = (
    AnchorLevel(side=38, stride=8, size=21, next_size=45, aspect_ratios=(2,)),
    AnchorLevel(side=19, stride=16, size=45, next_size=99, aspect_ratios=(2, 3)),
    AnchorLevel(side=10, stride=32, size=99, next_size=153, aspect_ratios=(2, 3)),
    AnchorLevel(side=5, stride=64, size=153, next_size=207, aspect_ratios=(2, 3)),
    AnchorLevel(side=3, stride=100, size=207, next_size=261, aspect_ratios=(2,)),
    AnchorLevel(side=1, stride=300, size=261, next_size=315, aspect_ratios=(2,)),
)
SSD512_VOC = (
    AnchorLevel(side=64, stride=8, size=35.84, next_size=76.8, aspect_ratios=(2,)),
    AnchorLevel(side=32, stride=16, size=76.8, next_size=153.6, aspect_ratios=(2, 3)),
    AnchorLevel(side=16, stride=32, size=153.6, next_size=230.4, aspect_ratios=(2, 3)),
    AnchorLevel(side=8, stride=64, size=230.4, next_size=307.2, aspect_ratios=(2, 3)),
    AnchorLevel(side=4, stride=128, size=307.2, next_size=384.0, aspect_ratios=(2, 3)),
    AnchorLevel(side=2, stride=256, size=384.0, next_size=460.8, aspect_ratios=(2,)),
    AnchorLevel(side=1, stride=512, size=460.8, next_size=537.6, aspect_ratios=(2,)),
)
SSD512_COCO = (
    AnchorLevel(side=64, stride=8, size=20.48, next_size=51.2, aspect_ratios=(2,)),
    AnchorLevel(side=32, stride=16, size=51.2, next_size=133.12, aspect_ratios=(2, 3)),
    AnchorLevel(side=16, stride=32, size=133.12, next_size=215.04, aspect_ratios=(2, 3)),
    AnchorLevel(side=8, stride=64, size=215.04, next_size=296.96, aspect_ratios=(2, 3)),
    AnchorLevel(side=4, stride=128, size=296.96, next_size=378.88, aspect_ratios=(2, 3)),
    AnchorLevel(side=2, stride=256, size=378.88, next_size=460.8, aspect_ratios=(2,)),
    AnchorLevel(side=1, stride=512, size=460.8, next_size=542.72, aspect_ratios=(2,)),
)
SSD160 = (  # ours, by the same rule with s_min 0.20 and 0.10 below it
    AnchorLevel(side=20, stride=8, size=16, next_size=32, aspect_ratios=(2,)),
    AnchorLevel(side=10, stride=16, size=32, next_size=68.8, aspect_ratios=(2, 3)),
    AnchorLevel(side=5, stride=32, size=68.8, next_size=105.6, aspect_ratios=(2, 3)),
    AnchorLevel(side=3, stride=53, size=105.6, next_size=142.4, aspect_ratios=(2,)),
    AnchorLevel(side=1, stride=160, size=142.4, next_size=179.2, aspect_ratios=(2,)),
)


def anchors_of_cell(level: AnchorLevel) -> list[tuple[float, float]]:
    """Return the (width, height) of a cell's anchors: s_k, sqrt(s_k s_(k+1)), then r:1 and 1:r of each ratio.

    The order is torchvision's, so that its SSD heads load without a permutation.
    """
    geometric_mean = math.sqrt(level.size * level.next_size)
    anchors = [(level.size, level.size), (geometric_mean, geometric_mean)]
    for ratio in level.aspect_ratios:
        long, short = level.size * math.sqrt(ratio), level.size / math.sqrt(ratio)
        anchors += [(long, short), (short, long)]
    return anchors


def _tile(level: AnchorLevel, image_size: int) -> Tensor:
    """Return the anchors of one level, cxcywh px, [side * side * anchors_per_cell, 4]: rows, columns, anchors."""
    centres = (torch.arange(level.side, dtype=torch.float32) + 0.5) * level.stride
    sizes = torch.tensor(anchors_of_cell(level)).clamp(max=image_size)  # [n, 2]
    grid = (level.side, level.side, level.anchors_per_cell, 1)
    return torch.cat(
        [
            centres.view(1, -1, 1, 1).expand(grid),
            centres.view(-1, 1, 1, 1).expand(grid),
            sizes.expand(level.side, level.side, -1, -1),
        ],
        dim=-1,
    ).view(-1, 4)


def make_anchors(levels: Sequence[AnchorLevel], image_size: int) -> Anchors:
    """Tile the default boxes of all levels over a square image. SSD section 2.2 (arXiv:1512.02325).

    Widths and heights are cut to the image's side: no object is larger, so the cut box overlaps the largest objects
    better. torchvision does so too; the paper's Caffe code does not. It concerns two of SSD300's anchors.

    Args:
        levels: one row of a table above for each feature map, finest first.
        image_size: side of the network input, px.

    Returns:
        Boxes [A, 4] cxcywh, px, and the stride of each, [A]: level, row, column, anchor of the cell, last fastest.
    """
    boxes = torch.cat([_tile(level, image_size) for level in levels])
    strides = [torch.full((level.side**2 * level.anchors_per_cell,), float(level.stride)) for level in levels]
    return Anchors(boxes, torch.cat(strides))
