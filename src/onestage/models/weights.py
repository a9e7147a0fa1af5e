"""Published weights: read, rename, load."""

import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, WeightsEnum, detection

from onestage.errors import CheckpointError, ConfigError

IMAGENET = "IMAGENET1K_FEATURES"  # torchvision's name of its copy of the Caffe VGG16, 59 MB
# The outputs of class heads, which belong to the classes; the layers before them do not. levels.N.1 is SSDLite's.
CLASS_OUTPUT = re.compile(r"class_head\.(output|levels\.\d+(\.1)?)\.(weight|bias)")
TORCHVISION_COCO = "torchvision_coco"  # torchvision's weights COCO_V1 of the same model, 136 to 146 MB

_INDICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # of the five stages in vgg16().features
_VGG16 = {  # our layer: torchvision's
    f"{'to_fc7' if stage == 5 else 'to_conv4'}.conv{stage}_{number}": f"features.{index}"
    for stage, indices in enumerate(_INDICES, start=1)
    for number, index in enumerate(indices, start=1)
}
_REDUCED_FC = {"to_fc7.fc6": "features.31", "to_fc7.fc7": "features.33"}  # in vgg16_reducedfc.pth of the Caffe code
_SSD300 = {
    **{f"backbone.{ours}": f"backbone.{theirs}" for ours, theirs in _VGG16.items() if "conv5" not in ours},
    **{f"backbone.to_fc7.conv5_{number}": f"backbone.extra.0.{2 * number - 1}" for number in (1, 2, 3)},
    **{f"backbone.to_fc7.{name}": f"backbone.extra.0.7.{index}" for name, index in (("fc6", 1), ("fc7", 3))},
    **{f"neck.{block}.reduce": f"backbone.extra.{block + 1}.0" for block in range(4)},
    **{f"neck.{block}.conv": f"backbone.extra.{block + 1}.2" for block in range(4)},
    **{f"class_head.levels.{level}": f"head.classification_head.module_list.{level}" for level in range(6)},
    **{f"box_head.levels.{level}": f"head.regression_head.module_list.{level}" for level in range(6)},
}
_OURS = {  # by torchvision's names of SSDLite320, RetinaNet and FCOS, those of its versions before 0.13 included
    r"^backbone\.features\.": "backbone.parts.",
    r"^backbone\.extra\.": "neck.",
    r"^head\.classification_head\.module_list\.": "class_head.levels.",
    r"^head\.regression_head\.module_list\.": "box_head.levels.",
    r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.": r"neck.laterals.\1.",
    r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.": r"neck.smoothing.\1.",
    r"^backbone\.fpn\.extra_blocks\.": "neck.",
    r"^head\.classification_head\.conv\.": "class_head.tower.",
    r"^head\.classification_head\.cls_logits\.": "class_head.output.",
    r"^head\.regression_head\.conv\.": "box_head.tower.",
    r"^head\.regression_head\.bbox_reg\.": "box_head.output.",
    r"^head\.regression_head\.bbox_ctrness\.": "box_head.centerness.",
}


def load_vgg16(backbone: nn.Module, value: str, scale: float) -> None:
    """Load conv1_1 to conv5_3 of a VGG16 without batch norm, and fc6 and fc7 where the file has them.

    Args:
        backbone: onestage's VGG16.
        value: IMAGENET1K_FEATURES, or the path of a state dict with the keys of torchvision's vgg16 or, as in the
            Caffe-derived vgg16_reducedfc.pth, without "features."; for RGB images of 0..255 less the mean.
        scale: divides the images of `backbone`; the published first layer is multiplied by it.
    """
    weights = read_weights("backbone_weights", value, {IMAGENET: VGG16_Weights.IMAGENET1K_FEATURES})
    weights = {f"features.{name.removeprefix('features.')}": tensor for name, tensor in weights.items()}
    layers = _VGG16 | (_REDUCED_FC if "features.31.weight" in weights else {})
    state = rename(weights, _parameters(layers), f"backbone_weights: {value}")
    state["to_conv4.conv1_1.weight"] = state["to_conv4.conv1_1.weight"] * scale
    load_tensors(backbone, state, f"backbone_weights: {value}")


def load_published(detector: Any, value: str) -> None:
    """Load torchvision's weights of a whole detector; its classes without the background become labels 0..K-1.

    COCO weights have a logit for each category id up to 90; for K = 80 the ids in use become the labels in order.

    ConfigError if they were trained on a number of classes that does not give K.

    detector: an `AnchorDetector` of the published network, with K logits for each anchor, or K + 1. value: see
    `Detector.published_state`; of each anchor's class outputs the first is the background.
    """
    place, num_classes = f"pretrained: {value}", detector.num_classes
    state = dict(detector.published_state("pretrained", value))
    for name in filter(CLASS_OUTPUT.fullmatch, state):
        num_columns = 4 * len(state[name]) // len(state[name.replace("class_head", "box_head")])
        columns = _columns(num_columns, num_classes, place)[: detector.classification_loss.num_logits(num_classes)]
        rows = state[name].view(-1, num_columns, *state[name].shape[1:])  # [anchors of the cell, columns, ...]
        state[name] = rows[:, columns].flatten(0, 1)
    load_tensors(detector, state, place)


def torchvision_ssd300(key: str, value: str, scale: float) -> dict[str, Tensor]:
    """Return the weights of torchvision's ssd300_vgg16 under our names; see `read_weights` and `load_vgg16`."""
    weights = read_weights(key, value, {TORCHVISION_COCO: detection.SSD300_VGG16_Weights.COCO_V1})
    keys = _parameters(_SSD300) | {"backbone.conv4_norm.weight": "backbone.scale_weight"}
    state = rename(weights, keys, f"{key}: {value}")
    state["backbone.to_conv4.conv1_1.weight"] = state["backbone.to_conv4.conv1_1.weight"] * scale
    return state


def torchvision_weights(
    detector: nn.Module, key: str, value: str, published: WeightsEnum, layers_per_conv: int = 1
) -> dict[str, Tensor]:
    """Return the weights of one of torchvision's detectors under our names; see `read_weights`.

    layers_per_conv: of towers that are flat lists of convolutions, ReLUs and perhaps norms.
    """

    def place(found: re.Match[str]) -> str:
        conv, layer = divmod(int(found[1]), layers_per_conv)
        return f"tower.{conv}.{layer}.{found[2]}"

    weights = {}
    for name, tensor in read_weights(key, value, {TORCHVISION_COCO: published}).items():
        for theirs, ours in _OURS.items():
            name = re.sub(theirs, ours, name)
        weights[re.sub(r"tower\.(\d+)\.(\w+)$", place, name)] = tensor
    wanted = (name for name in detector.state_dict() if name in weights or not name.endswith("num_batches_tracked"))
    keys = {name: name for name in wanted}
    return rename(weights, keys, f"{key}: {value}")


def _columns(num_columns: int, num_classes: int, place: str) -> list[int]:
    """Return the file's columns, background first, of labels 0..K-1 and of our background, the last."""
    if num_columns == num_classes + 1:
        return [*range(1, num_columns), 0]
    if (num_columns, num_classes) == (91, 80):
        names = detection.SSD300_VGG16_Weights.COCO_V1.meta["categories"]
        return [i for i, name in enumerate(names) if name not in ("__background__", "N/A")] + [0]
    remedy = f"To train on your classes set pretrained: null and give --init_from {place.partition(': ')[2]}"
    problem = f"{place} was trained on {num_columns - 1} classes, the data have {num_classes}; they must be the same"
    raise ConfigError(f"{problem} (or COCO's 80 for its 90 category ids).\n{remedy}")


def read_weights(key: str, value: str, published: Mapping[str, WeightsEnum]) -> Mapping[str, Tensor]:
    """Return a state dict, without running code from its file; CheckpointError if it cannot be fetched or read.

    key: of the configuration, for messages. value: a name in `published`, torchvision's weights by name, fetched once
    into torch's hub cache; or the path of a file.
    """
    remedy = f"Set {key} to one of: {', '.join([*published, 'the path of a state dict', 'null'])}."
    try:
        if value in published:
            content = published[value].get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        else:
            content = torch.load(value, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        problem = f"cannot be read as a state dict: {(str(error).splitlines() or [type(error).__name__])[0]}"
        if value in published:
            problem = f"cannot be fetched from {published[value].url}: {error}"
            remedy = f"Put the file into {torch.hub.get_dir()}/checkpoints by hand. {remedy}"
        raise CheckpointError(f"{key}: {value} {problem}\n{remedy}") from error
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{key}: {value} must hold tensors by name, got something else.\n{remedy}")
    return content


def rename(weights: Mapping[str, Tensor], keys: Mapping[str, str], place: str) -> dict[str, Tensor]:
    """Return tensors under our keys; CheckpointError if one is missing. keys: our key to the file's."""
    missing = [theirs for theirs in keys.values() if theirs not in weights]
    problem = f"lacks {len(missing)} of {len(keys)} tensors, {missing[:1]} first"
    _require_model(not missing, place, problem)
    return {ours: weights[theirs] for ours, theirs in keys.items()}


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], place: str) -> None:
    """Load tensors into a module and keep its others; CheckpointError if a shape differs."""
    own = module.state_dict()
    for key, tensor in state.items():
        problem = f"has {key} of shape {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        _require_model(tensor.shape == own[key].shape, place, problem)
    module.load_state_dict(state, strict=False)


def _require_model(holds_model: bool, place: str, problem: str) -> None:
    if not holds_model:
        remedy = f"Set {place.partition(':')[0]} to one of: a file of this model, null."
        raise CheckpointError(f"{place} {problem}; it holds another model.\n{remedy}")


def _parameters(layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in layers.items() for part in ("weight", "bias")}
