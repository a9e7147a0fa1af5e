"""Anchor shapes and the grid that places them over feature maps."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onestage.errors import require
from onestage.types import Anchors


class AnchorShapes(NamedTuple):
    """The anchors of every cell of one feature map, in network-input pixels."""

    stride: float  # distance of neighbouring cells, px
    shapes: tuple[tuple[float, float], ...]  # (width, height) of each anchor of a cell, px
    offset: float = 0.5  # of the anchor centre within its cell, in [0, 1]


def ssd_shapes(size: float, next_size: float, aspect_ratios: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return the (width, height) of a cell's anchors: two squares, then r:1 and 1:r of each aspect ratio.

    SSD section 2.2 (arXiv:1512.02325); the order is torchvision's, so that its heads load without a permutation.
    size: s_k, side of the first square, px. next_size: s_(k+1); the second square has side sqrt(s_k s_(k+1)).
    """
    geometric_mean = math.sqrt(size * next_size)
    shapes = [(float(size), float(size)), (geometric_mean, geometric_mean)]
    for ratio in aspect_ratios:
        long, short = size * math.sqrt(ratio), size / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return tuple(shapes)


def pyramid_shapes(size: float) -> tuple[tuple[float, float], ...]:
    """Return the (width, height) of RetinaNet's nine anchors: three sizes at each of the ratios 1:2, 1:1 and 2:1.

    Section 4 (arXiv:1708.02002); the order, the whole sizes and the even sides are torchvision's, so that its heads
    load and its boxes are met. size: side of the smallest square, px; the others have 2^(1/3) and 2^(2/3) of it.
    """
    sides = (size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3)))
    pairs = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0) for side in sides]
    return tuple((max(2.0 * round(width / 2), 1.0), max(2.0 * round(height / 2), 1.0)) for width, height in pairs)


def named_levels(
    place: str, anchors: str | Sequence[AnchorShapes], tables: Mapping[str, Sequence[AnchorShapes]]
) -> Sequence[AnchorShapes]:
    """Return the levels of the table of that name, or the given ones. place: class and argument, for messages."""
    if not isinstance(anchors, str):
        return anchors
    require(anchors in tables, place, anchors, f"one of {', '.join(tables)}")
    return tables[anchors]


class AnchorGrid(nn.Module):
    """Anchors of feature maps of any size, cached by the sizes of the maps.

    Args:
        levels: shapes of each feature map, finest first, with strides, widths and heights > 0.
        max_side: upper limit of widths and heights, px; None: no limit. torchvision's SSD limits them to the image's
            side, because no object is larger; the Caffe code of the paper does not.
    """

    shapes: Tensor  # [sum of anchors per cell, 2] (width, height), px

    def __init__(self, levels: Sequence[AnchorShapes], max_side: float | None = None) -> None:
        super().__init__()
        limit = math.inf if max_side is None else max_side
        for stride, shapes, offset in levels:
            is_valid = len(shapes) > 0 and all(0 < length < math.inf for length in (stride, *chain(*shapes)))
            require(is_valid, "anchors", (stride, shapes), "a stride > 0 and at least one (width, height) > 0, px")
            require(0 <= offset <= 1, "anchors, offset", offset, "in [0, 1]")
        self.levels = tuple(
            AnchorShapes(float(stride), tuple((min(float(w), limit), min(float(h), limit)) for w, h in shapes), offset)
            for stride, shapes, offset in levels
        )
        table = torch.tensor([shape for level in self.levels for shape in level.shapes])
        self.register_buffer("shapes", table, persistent=False)
        self._cache: dict[object, Anchors] = {}

    def forward(self, grids: Sequence[tuple[int, int]]) -> Anchors:
        """Return the anchors of feature maps with these (rows, columns), one pair per level, on the module's device."""
        if torch.compiler.is_compiling():  # constants of the graph; a cache would hold tensors of one compiled call
            return self._place(grids)
        if (key := (tuple(grids), self.shapes.device)) not in self._cache:
            with torch.inference_mode(False):  # anchors that a validation step makes serve later training steps
                self._cache[key] = self._place(grids)
        return self._cache[key]

    def _place(self, grids: Sequence[tuple[int, int]]) -> Anchors:
        device, boxes, strides = self.shapes.device, [], []
        for level, (rows, columns) in zip(self.levels, grids, strict=True):
            # Not from the buffer, which a module in half precision has rounded.
            shapes = torch.tensor(level.shapes, dtype=torch.float32, device=device)
            y = (torch.arange(rows, dtype=torch.float32, device=device) + level.offset) * level.stride
            x = (torch.arange(columns, dtype=torch.float32, device=device) + level.offset) * level.stride
            size = (rows, columns, len(shapes), 1)
            centres = [x.view(1, -1, 1, 1).expand(size), y.view(-1, 1, 1, 1).expand(size)]
            boxes.append(torch.cat([*centres, shapes.expand(rows, columns, -1, -1)], dim=-1).view(-1, 4))
            strides.append(torch.full((len(boxes[-1]),), level.stride, dtype=torch.float32, device=device))
        return Anchors(torch.cat(boxes), torch.cat(strides), tuple(map(len, boxes)))
