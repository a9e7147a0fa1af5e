"""Darknet's networks (arXiv:1612.08242, arXiv:1804.02767), their building blocks and their `.weights` files."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onestage.errors import CheckpointError, require
from onestage.files import atomic_write, printable
from onestage.models.detector import Backbone

PIXEL_MEAN, PIXEL_STD = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)  # RGB of 0..1


class ConvBlock(nn.Sequential):
    """Convolution, batch norm and leaky ReLU of slope 0.1."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, a=0.1, nonlinearity="leaky_relu")
        norm = nn.BatchNorm2d(out_channels, momentum=0.01)  # darknet keeps 0.99 of its running statistics
        super().__init__(OrderedDict(conv=conv, norm=norm, act=nn.LeakyReLU(0.1, inplace=True)))


class Residual(nn.Module):
    """Darknet-53's block: 1 x 1 to half of the channels, 3 x 3 back, and the sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvBlock(channels, channels // 2, 1), ConvBlock(channels // 2, channels))

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, channels, H, W]; the result has the same shape."""
        return torch.add(features, self.convs(features))


class Darknet(Backbone):
    """A sequence of stages. The last ones give the maps of the given strides, px; a map has stride x width channels."""

    def __init__(self, width: int, strides: tuple[int, ...]) -> None:
        place, is_valid = f"{type(self).__name__}: width", width >= 2 and width % 2 == 0
        require(is_valid, place, width, "a multiple of 2", "The paper's is 32.")
        super().__init__([stride * width for stride in strides], strides, PIXEL_MEAN, PIXEL_STD)
        self.stages = nn.ModuleList()

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the maps of normalised images [B, 3, H, W]."""
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[-len(self.strides) :]

    def freezable_stages(self) -> Sequence[Sequence[nn.Module]]:
        """Return the stages, each of which begins with a smaller map."""
        return [[stage] for stage in self.stages]


class Darknet19(Darknet):
    """Darknet-19 without its classifier: maps of strides 16 and 32. YOLOv2 table 6 (arXiv:1612.08242).

    Args:
        width: channels of the first layer, a multiple of 2; the last map has 32 times as many. The paper's is 32.
        weights: path of a darknet file of these layers, such as darknet19_448.conv.23; None: random.
    """

    def __init__(self, width: int = 32, weights: str | None = None) -> None:
        super().__init__(width, (16, 32))
        channels = 3
        for stage in ((1,), (2,), (4, 2, 4), (8, 4, 8), (16, 8, 16, 8, 16), (32, 16, 32, 16, 32)):
            blocks: list[nn.Module] = [] if channels == 3 else [nn.MaxPool2d(2)]
            for position, multiple in enumerate(stage):
                blocks.append(ConvBlock(channels, multiple * width, 1 if position % 2 else 3))
                channels = multiple * width
            self.stages.append(nn.Sequential(*blocks))
        if weights is not None:
            load_darknet(weights, "Darknet19.weights", list(block_tensors(self)))


class Darknet53(Darknet):
    """Darknet-53 without its classifier: maps of strides 8, 16 and 32. YOLOv3 table 1 (arXiv:1804.02767).

    Args:
        width: channels of the first layer, a multiple of 2; the last map has 32 times as many. The paper's is 32.
        depths: residual blocks of the five stages.
        weights: path of a darknet file of these layers, such as darknet53.conv.74; None: random.
    """

    def __init__(
        self, width: int = 32, depths: tuple[int, int, int, int, int] = (1, 2, 8, 8, 4), weights: str | None = None
    ) -> None:
        super().__init__(width, (8, 16, 32))
        self.stages.append(ConvBlock(3, width))
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            residuals = [Residual(2 * channels) for _ in range(depth)]
            self.stages.append(nn.Sequential(ConvBlock(channels, 2 * channels, stride=2), *residuals))
        if weights is not None:
            load_darknet(weights, "Darknet53.weights", list(block_tensors(self)))


class Passthrough(nn.Module):
    """YOLOv2's neck: the map of stride 16, reorganised, joins that of stride 32. Section 2, "Fine-Grained Features"."""

    def __init__(self, in_channels: Sequence[int]) -> None:
        super().__init__()
        fine, coarse = in_channels
        self.coarse = nn.Sequential(ConvBlock(coarse, coarse), ConvBlock(coarse, coarse))
        self.fine = ConvBlock(fine, fine // 8, 1)
        self.output = ConvBlock(fine // 2 + coarse, coarse)
        self.out_channels = (coarse,)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return one map [B, C, H, W] of stride 32."""
        fine, coarse = feature_maps
        return [self.output(torch.cat([reorganise(self.fine(fine)), self.coarse(coarse)], dim=1))]


class PyramidBranch(nn.Module):
    """The layers of one level of `DarknetPyramid`.

    channels: of the backbone's map and of the output. above: those that the next coarser level passes on; 0: no level.
    """

    def __init__(self, channels: int, above: int) -> None:
        super().__init__()
        half = channels // 2
        self.lateral = ConvBlock(above, half, 1) if above else None
        sizes = (channels + (half if above else 0), half, channels, half, channels, half)
        self.body = nn.Sequential(*[ConvBlock(sizes[n], sizes[n + 1], 3 if n % 2 else 1) for n in range(5)])
        self.output = ConvBlock(half, channels)

    def forward(self, features: Tensor, above: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what goes on to the next finer level, [B, C_l / 2, H, W], and the output, [B, C_l, H, W]."""
        if self.lateral is not None and above is not None:
            above = F.interpolate(self.lateral(above), scale_factor=2.0, mode="nearest")
            features = torch.cat([above, features], dim=1)
        features = self.body(features)
        return features, self.output(features)


class DarknetPyramid(nn.Module):
    """YOLOv3's neck: five convolutions for each map, which also receives the next coarser one. Section 2.3.

    The levels stand in the order of darknet's files, coarsest first.
    """

    def __init__(self, in_channels: Sequence[int]) -> None:
        super().__init__()
        coarsest_first = list(reversed(in_channels))
        passed_on = [0, *(channels // 2 for channels in coarsest_first)]
        self.levels = nn.ModuleList(map(PyramidBranch, coarsest_first, passed_on))
        self.out_channels = tuple(in_channels)

    def forward(self, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Return a map [B, C_l, H_l, W_l] for each of the given ones, finest first."""
        above, outputs = None, []
        for level, features in zip(self.levels, reversed(feature_maps), strict=True):
            above, output = level(features, above)
            outputs.append(output)
        return outputs[::-1]


def reorganise(features: Tensor) -> Tensor:
    """Return darknet's reorg: [B, C, H, W] to [B, 4C, H / 2, W / 2].

    Not `pixel_unshuffle`: reorg_cpu of darknet's blas.c first reads the memory as [C / 4, 2H, 2W]. Published weights
    need exactly this order.
    """
    batch, channels, height, width = features.shape
    blocks = features.reshape(batch, channels // 4, height, 2, width, 2).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(batch, 4 * channels, height // 2, width // 2)


def block_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of all blocks in the order of darknet's files: bias, scale, mean, variance, weight."""
    for block in module.modules():
        if isinstance(block, ConvBlock):
            names = ("norm.bias", "norm.weight", "norm.running_mean", "norm.running_var", "conv.weight")
            state = block.state_dict()
            yield from (state[name] for name in names)


@torch.no_grad()
def load_darknet(value: str, key: str, tensors: Sequence[Tensor]) -> int:
    """Fill tensors from a `.weights` file of darknet; return its number of images seen in training.

    The file has three int32 (major, minor, revision), the number of images (uint64 from version 0.2 on, else uint32),
    then little-endian float32 numbers and nothing else (load_weights of darknet's parser.c). CheckpointError if it
    cannot be read or does not hold exactly these tensors.

    value: path of the file. key: of the configuration, for messages. tensors: in the file's order, changed in place.
    """
    remedy = f"Set {key} to a darknet file of this network and these classes, or to null."
    place = f"{key}: {printable(value)}"
    needed = sum(tensor.numel() for tensor in tensors)
    try:
        header = np.fromfile(value, "<i4", 3)
        if len(header) < 3 or not (0 <= header[0] < 1000 and 0 <= header[1] < 1000):
            raise CheckpointError(f"{place} must start with darknet's version, got {header.tolist()}.\n{remedy}")
        kind = "<u8" if 10 * header[0] + header[1] >= 2 else "<u4"
        size = Path(value).stat().st_size
        found = (size - 12 - np.dtype(kind).itemsize) / 4
        if found != needed:
            raise CheckpointError(f"{place} must hold {needed:,} numbers, got {found:,.10g}.\n{remedy}")
        seen = int(np.fromfile(value, kind, 1, offset=12)[0])
        numbers = torch.from_numpy(np.fromfile(value, "<f4", offset=12 + np.dtype(kind).itemsize))
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {error}.\n{remedy}") from error
    if not numbers.isfinite().all():
        raise CheckpointError(f"{place} must hold finite numbers, got NaN or infinity.\n{remedy}")
    for tensor, part in zip(tensors, torch.split(numbers, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
    return seen


def save_darknet(path: Path, version: tuple[int, int, int], seen: int, tensors: Sequence[Tensor]) -> None:
    """Write a `.weights` file; see `load_darknet`. ResourceError if it cannot be written."""
    numbers = torch.cat([tensor.detach().cpu().float().flatten() for tensor in tensors]).numpy().astype("<f4")
    kind = "<u8" if 10 * version[0] + version[1] >= 2 else "<u4"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        for part in (np.array(version, "<i4"), np.array([seen], kind), numbers):
            file.write(part.tobytes())
