"""Backbones from torchvision's classification models."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from onestage.errors import require
from onestage.models.detector import Backbone, Pixel
from onestage.models.weights import load_tensors, read_weights, rename

IMAGENET_MEAN: Pixel = (0.485 * 255, 0.456 * 255, 0.406 * 255)  # RGB, of torchvision's classification weights
IMAGENET_STD: Pixel = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class TorchvisionBackbone(Backbone):
    """Feature extractor from a classification model of torchvision: the last block of each stride.

    Checked with resnet*, resnext50_32x4d, vgg*, mobilenet_v2, mobilenet_v3_*, efficientnet_b0, convnext_tiny,
    regnet_y_400mf, densenet121, shufflenet_v2_x1_0 and mnasnet1_0.

    Args:
        name: of the model, such as resnet18.
        strides: of the feature maps, px, finest first.
        weights: name of torchvision's weights, such as IMAGENET1K_V1, the path of a state dict, or None (random).
        norm: "batch"; "frozen" fixes the statistics and parameters of all batch norms, for small batches.
    """

    def __init__(
        self,
        name: str,
        strides: tuple[int, ...] = (8, 16),
        weights: str | None = None,
        norm: Literal["batch", "frozen"] = "batch",
    ) -> None:
        key, remedy = "TorchvisionBackbone", "Set name: resnet18."
        known = torchvision.models.list_models(torchvision.models)
        require(name in known, f"{key}: name", name, "a model of torchvision", remedy)
        require(norm in ("batch", "frozen"), f"{key}: norm", norm, "batch or frozen")
        device = torch.get_default_device()
        with torch.device("cpu"), _WeightsOn(device):  # regnet computes its widths with tensors, which "meta" cannot
            network = torchvision.models.get_model(name).to(device)
        blocks = _blocks_by_stride(network)
        problem, found = f"{key}: strides of the feature maps [B, C, H, W] of {name}", sorted(blocks) or "none"
        require(set(strides) <= blocks.keys(), problem, found, f"{sorted(strides)} among others", remedy)
        super().__init__([blocks[stride][-1][1] for stride in strides], strides, IMAGENET_MEAN, IMAGENET_STD)
        if norm == "frozen":
            _freeze_batch_norm(network)
        self._blocks = {stride: [block for block, _ in found] for stride, found in blocks.items()}
        self.body = create_feature_extractor(network, {blocks[stride][-1][0]: str(stride) for stride in strides})
        if weights is not None:
            key, published = f"{key}.weights", torchvision.models.get_model_weights(name)
            state = read_weights(key, weights, {entry.name: entry for entry in published})
            names = {name: name for name in self.body.state_dict() if not name.endswith("num_batches_tracked")}
            load_tensors(self.body, rename(state, names, f"{key}: {weights}"), f"{key}: {weights}")

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of normalised images, [B, 3, H, W] float."""
        return list(self.body(images).values())

    def freezable_stages(self) -> Sequence[Sequence[nn.Module]]:
        """Return the blocks up to stride 4, 8, 16 and so on."""
        modules, strides = dict(self.body.named_modules()), [4 << power for power in range(4)]
        names = [self._blocks[stride] for stride in strides if stride in self._blocks and stride <= max(self.strides)]
        return [[modules[name] for name in stage if name in modules] for stage in names]


class _WeightsOn(TorchFunctionMode):
    """Create weights and buffers on a device, and leave other tensors where they are: "meta" then costs no memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        settings = {"device": self.device} if func in (torch.empty, torch.ones, torch.zeros) else {}
        return func(*args, **{**(kwargs or {}), **settings})


def _blocks_by_stride(network: nn.Module) -> dict[int, list[tuple[str, int]]]:
    """Return, for each stride, names and channels of all blocks up to the last one of that stride.

    A block is a module whose name has at most two parts: `layer3.0.conv1` of a ResNet still has the stride of layer2.
    """
    network = copy.deepcopy(network).eval().to("meta")  # which computes nothing
    blocks: list[tuple[str, int]] = []
    by_stride: dict[int, list[tuple[str, int]]] = {}

    def note(block: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            blocks.append((block, output.shape[1]))
            stride = 192 // output.shape[2]
            if (output.shape[2] * stride, output.shape[3] * stride) == (192, 256):
                by_stride[stride] = list(blocks)

    for block, module in network.named_modules():
        if block and block.count(".") <= 1:
            module.register_forward_hook(lambda _, __, output, block=block: note(block, output))
    try:
        network(torch.zeros(1, 3, 192, 256, device="meta"))
    except (AssertionError, RuntimeError, ValueError):  # a model of one input size, such as vit_b_16
        return {}
    return by_stride


def _freeze_batch_norm(network: nn.Module) -> None:
    """Replace all batch norms by ones with fixed statistics."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(module.num_features, module.eps)
            fixed.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, fixed)
