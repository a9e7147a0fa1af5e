"""Published weights: the ImageNet VGG16 for the backbone, and torchvision's COCO weights for the whole SSD300."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestage.errors import CheckpointError, ConfigError
from onestage.models.vgg import PIXEL_SCALE, VGG, VGG16_DEPTHS

IMAGENET = "IMAGENET1K_FEATURES"  # torchvision's name of its copy of the Caffe weights, 59 MB
TORCHVISION_COCO = "torchvision_coco"  # torchvision's SSD300_VGG16_Weights.COCO_V1, 136 MB: 25.1 mAP on val2017

_CHOICES = {  # by configuration key
    "backbone_weights": f"{IMAGENET} (fetched once into torch's hub cache), the path of a file with a VGG16's state "
    "dict, or null (random weights)",
    "pretrained": f"{TORCHVISION_COCO} (fetched once into torch's hub cache), the path of a file with the state dict "
    "of torchvision's ssd300_vgg16, or null",
}
_VGG_CONVS = tuple(f"conv{stage}_{i}" for stage, depth in enumerate(VGG16_DEPTHS, 1) for i in range(1, depth + 1))
_VGG_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of _VGG_CONVS in torchvision's vgg16().features


def load_imagenet_weights(backbone: VGG, backbone_weights: str) -> None:
    """Load the convolutions conv1_1 to conv5_3, and fc6 and fc7 where the file has them.

    Args:
        backbone: a VGG16 without batch norm.
        backbone_weights: IMAGENET1K_FEATURES, or the path of a state dict for RGB images of 0..255 less PIXEL_MEAN, its
            keys those of torchvision's vgg16 or, as in the Caffe-derived vgg16_reducedfc.pth, without "features.".

    Raises:
        CheckpointError: if the weights cannot be fetched or read, or do not fit.
    """
    weights = _read("backbone_weights", backbone_weights)
    weights = {name.removeprefix("features."): value for name, value in weights.items()}
    indices = dict(zip(_VGG_CONVS, _VGG_INDICES, strict=True))
    if "31.weight" in weights:  # only vgg16_reducedfc.pth goes beyond conv5_3
        indices |= {"fc6": 31, "fc7": 33}
    name_map = {_vgg_module(name): str(index) for name, index in indices.items()}
    source = f"backbone_weights: {backbone_weights}"
    state = _renamed(weights, name_map, source)
    state["to_conv4.conv1_1.weight"] = state["to_conv4.conv1_1.weight"] * PIXEL_SCALE
    _load(backbone, backbone.state_dict() | state, source)


def load_torchvision_ssd300(detector: nn.Module, pretrained: str, num_classes: int) -> None:
    """Load torchvision's ssd300_vgg16, whose classes without the background become labels 0..K-1.

    Its COCO weights have a logit for each category id up to 90; for K = 80 the ids in use become the labels in order.

    Args:
        detector: an SSD300 with COCO's anchors and a softmax over K + 1 classes.
        pretrained: torchvision_coco, or the path of a state dict with the same keys.
        num_classes: K of the detector.

    Raises:
        CheckpointError: if the weights cannot be fetched or read, or are not those of an ssd300_vgg16.
        ConfigError: if they were trained on a number of classes that does not give K.
    """
    source = f"pretrained: {pretrained}"
    state = _renamed(_read("pretrained", pretrained), _ssd300_name_map(), source)
    state["backbone.to_conv4.conv1_1.weight"] = state["backbone.to_conv4.conv1_1.weight"] * PIXEL_SCALE

    num_anchors = len(state["box_head.levels.0.bias"]) // 4
    num_columns = len(state["class_head.levels.0.bias"]) // num_anchors
    columns = _columns(num_columns, num_classes, source)
    for name, value in state.items():
        if name.startswith("class_head."):  # [anchors of the cell * columns, ...]
            by_anchor = value.view(-1, num_columns, *value.shape[1:])
            state[name] = by_anchor[:, columns].flatten(0, 1)
    _load(detector, state, source)


def _columns(num_columns: int, num_classes: int, source: str) -> list[int]:
    """Return which of the file's columns, background first, are labels 0..K-1 and our background, the last."""
    if num_columns == num_classes + 1:
        return [*range(1, num_columns), 0]
    if (num_columns, num_classes) == (91, 80):
        from torchvision.models.detection import SSD300_VGG16_Weights

        names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
        return [i for i, name in enumerate(names) if name not in ("__background__", "N/A")] + [0]
    raise ConfigError(
        f"{source} was trained on {num_columns - 1} classes, the data have {num_classes}; they must be the same "
        "(or COCO's 80 for its 90 category ids).\n"
        f"To train on your classes start from the backbone: pretrained: null, backbone_weights: {IMAGENET}"
    )


def _vgg_module(name: str) -> str:
    """Return the name within VGG16 of a convolution of the paper."""
    return f"to_fc7.{name}" if name.startswith(("conv5", "fc")) else f"to_conv4.{name}"


def _ssd300_name_map() -> dict[str, str]:
    """Return torchvision's name of each parametrised module of ours."""
    names = {"conv5_1": "extra.0.1", "conv5_2": "extra.0.3", "conv5_3": "extra.0.5"}
    names |= {"fc6": "extra.0.7.1", "fc7": "extra.0.7.3"}
    for name, index in zip(_VGG_CONVS, _VGG_INDICES, strict=True):
        names.setdefault(name, f"features.{index}")
    name_map = {f"backbone.{_vgg_module(ours)}": f"backbone.{theirs}" for ours, theirs in names.items()}
    for block in range(4):
        name_map[f"neck.{block}.reduce"] = f"backbone.extra.{block + 1}.0"
        name_map[f"neck.{block}.conv"] = f"backbone.extra.{block + 1}.2"
    for level in range(6):
        name_map[f"class_head.levels.{level}"] = f"head.classification_head.module_list.{level}"
        name_map[f"box_head.levels.{level}"] = f"head.regression_head.module_list.{level}"
    return name_map


def _renamed(weights: Mapping[str, Tensor], name_map: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Return the weights and biases under our names; torchvision calls the weight of L2Norm `scale_weight`."""
    key_map = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in name_map.items() for part in ("weight", "bias")}
    if "class_head.levels.0" in name_map:
        key_map["backbone.conv4_norm.weight"] = "backbone.scale_weight"
    missing = [theirs for theirs in key_map.values() if theirs not in weights]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(key_map)} tensors, {missing[0]} first; it holds another model.\n"
            f"{_remedy(source.partition(':')[0])}"
        )
    return {ours: weights[theirs] for ours, theirs in key_map.items()}


def _load(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    own = module.state_dict()
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tuple(value.shape)}, this model needs {tuple(own[key].shape)}.\n"
                f"{_remedy(source.partition(':')[0])}"
            )
    module.load_state_dict(state)


def _remedy(key: str) -> str:
    return f"Set {key} to one of: {_CHOICES[key]}"


def _read(key: str, value: str) -> Mapping[str, Tensor]:
    """Return the state dict that a configuration key names."""
    if (key, value) in (("backbone_weights", IMAGENET), ("pretrained", TORCHVISION_COCO)):
        return _fetch(key, value)
    return _read_file(key, Path(value))


def _fetch(key: str, value: str) -> Mapping[str, Tensor]:
    """Return torchvision's published weights, from its cache or the network."""
    from torchvision.models import VGG16_Weights  # here, because few runs pay for this import
    from torchvision.models.detection import SSD300_VGG16_Weights

    weights: Any = SSD300_VGG16_Weights.COCO_V1 if value == TORCHVISION_COCO else VGG16_Weights.IMAGENET1K_FEATURES
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:  # no network is an OSError, a wrong hash a RuntimeError
        raise CheckpointError(
            f"{key}: {value} cannot be fetched from {weights.url}: {error}\n"
            f"Put the file into {torch.hub.get_dir()}/checkpoints by hand, or set {key} to one of: {_CHOICES[key]}"
        ) from error
    return state


def _read_file(key: str, path: Path) -> Mapping[str, Tensor]:
    """Read tensors by name from a file that torch.save wrote, without running code from it."""
    if not path.is_file():
        raise CheckpointError(f"{key}: {path} is not a file.\n{_remedy(key)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{key}: {path} cannot be read as a state dict: {reason}\n{_remedy(key)}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{key}: {path} holds something else than tensors by name.\n{_remedy(key)}")
    return content
