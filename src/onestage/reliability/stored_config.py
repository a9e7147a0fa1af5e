"""Check the configuration inside a checkpoint, which is data and no program.

A value may name a class only where the constructor's annotation expects one, and only a subclass of that class in this
package. Everything else must be plain: numbers, booleans and, where text is expected, text. What only training needs is
not read: optimizer, schedule, augmentation, workers, caches.
"""

import contextlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from onestage.reliability.checkpoints import read_checkpoint, unusable
from onestage.training.module import CHECKPOINT_KEY, DetectionModule
from onestage.types import JSONDict

DATA_MODULE = "onestage.data.DetectionDataModule"
EVALUATION_KEYS = {
    "model": ("detector", "loss_weights"),
    "data": (
        "source", "path", "image_size", "resize", "batch_size", "val_fraction", "num_folds", "fold",
        "max_bad_fraction", "on_error",
    ),
}  # fmt: skip
TRUSTED = ("onestage.models", "onestage.losses", "onestage.boxes", "onestage.data")
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
TRUST = "If you trust the file, give the run's own config.yaml with --config."
PLAIN = (str, int, float, bool, NoneType)
SEQUENCES: tuple[Any, ...] = (list, tuple, Sequence)
MAPPINGS: tuple[Any, ...] = (dict, Mapping)
Types = tuple[Any, ...]
ANYTHING: Types = (Any,)


class Refusal(NamedTuple):
    """A value that a checkpoint may not hold."""

    place: str
    value: object

    def __str__(self) -> str:
        return f"has {self.value!r:.200} as {self.place}; plain values and classes of {', '.join(TRUSTED)} are read"


def config_of(path: str | Path) -> JSONDict:
    """Return what evaluation needs of a checkpoint's configuration.

    Raises:
        CheckpointError: the checkpoint is unreadable, or its configuration is malformed or holds a forbidden value.
    """
    saved = read_checkpoint(path)[CHECKPOINT_KEY]
    config = evaluation_part(saved, path)
    for refusal in refusals(config):
        raise unusable(path, str(refusal), TRUST)
    _forget_weights(config["model"]["detector"])
    if not all(name.isprintable() for name in saved["class_names"]):
        raise unusable(path, "has class names with control characters", TRUST)
    config["data"] |= {key: saved[key] for key in ("class_names", "category_ids")}
    return config


def evaluation_part(saved: JSONDict, path: str | Path) -> JSONDict:
    """Return what evaluation and sharing need of a stored configuration."""
    config = saved.get("config") or {}
    if not all(isinstance(config.get(group), dict) for group in EVALUATION_KEYS):
        raise unusable(path, "holds no configuration", "Give the run's config.yaml with --config.")
    return {
        group: {key: config[group][key] for key in keys if key in config[group]}
        for group, keys in EVALUATION_KEYS.items()
    }


def _forget_weights(node: Any) -> None:
    """Set every source of pretrained weights to None: the checkpoint has them."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in ("weights", "backbone_weights", "pretrained"):
            node[key] = None
        _forget_weights(value)


def refusals(config: JSONDict) -> Iterator[Refusal]:
    """Yield the forbidden values of a configuration; import only from TRUSTED."""
    for group, owner in (("model", DetectionModule), ("data", _find_class(DATA_MODULE))):
        yield from _check_arguments(config[group], owner, group)
    if not isinstance(config["model"].get("detector"), dict):
        yield Refusal("model.detector", config["model"].get("detector"))


def _check(node: object, types: Types, place: str) -> Iterator[Refusal]:
    if isinstance(node, dict) and "class_path" in node:
        yield from _check_class(node, types, place)
    elif isinstance(node, dict):
        owner = next((each for each in types if inspect.isclass(each) and each not in (*PLAIN, *MAPPINGS)), None)
        if any(_origin(each) in MAPPINGS for each in types):
            for key, value in node.items():
                yield from _check(value, _item_types(types, MAPPINGS), f"{place}.{key}")
        elif owner is not None and not inspect.isabstract(owner):
            yield from _check_arguments(node, owner, place)
        else:
            yield Refusal(place, node)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _check(value, _item_types(types, SEQUENCES), f"{place}.{index}")
    elif isinstance(node, str):
        is_word = any(_origin(each) is Literal and node in get_args(each) for each in types)
        if not is_word and not all(_is_plain(each) for each in types):  # the parser would read it as a class
            yield Refusal(place, node)


def _check_class(node: JSONDict, types: Types, place: str) -> Iterator[Refusal]:
    name, arguments = node["class_path"], node.get("init_args") or {}
    expected = tuple(each for each in types if inspect.isclass(each) and each not in PLAIN)
    found = _find_class(name)
    if found is None or not any(_is_kind(found, kind) for kind in expected):
        yield Refusal(f"{place}.class_path", name)
    elif isinstance(arguments, dict):
        yield from _check_arguments(arguments, found, f"{place}.init_args")
    else:
        yield Refusal(f"{place}.init_args", arguments)
    for key in node.keys() - {"class_path", "init_args"}:
        yield Refusal(f"{place}.{key}", node[key])


def _check_arguments(arguments: JSONDict, owner: Any, place: str) -> Iterator[Refusal]:
    parameters = _parameters(owner)
    for key, value in arguments.items():
        if key in parameters:
            yield from _check(value, parameters[key], f"{place}.{key}")
        else:
            yield Refusal(f"{place}.{key}", value)


def _find_class(name: object) -> Any:
    """Return the class of a dotted name inside TRUSTED, or None."""
    if not isinstance(name, str) or not CLASS_PATH.fullmatch(name):
        return None
    module, _, attribute = name.rpartition(".")
    if not any(module == trusted or module.startswith(f"{trusted}.") for trusted in TRUSTED):
        return None
    with contextlib.suppress(ImportError, AttributeError):
        found = getattr(import_module(module), attribute)
        return found if inspect.isclass(found) else None
    return None


def _is_kind(found: type, expected: type) -> bool:
    try:
        return issubclass(found, expected)
    except TypeError:  # a Protocol with attributes
        return all(hasattr(found, name) for name, value in vars(expected).items() if inspect.isfunction(value))


def _parameters(owner: Any) -> dict[str, Types]:
    """Return the types of the arguments of a class, and of its parents in this package."""
    hints = typing.get_type_hints(owner) if hasattr(owner, "_fields") else {}  # a named tuple
    for parent in reversed(owner.__mro__):
        if "__init__" in vars(parent) and parent.__module__.startswith("onestage."):
            hints |= typing.get_type_hints(parent.__init__)
    return {name: _alternatives(hint) for name, hint in hints.items() if name != "return"}


def _alternatives(hint: Any) -> Types:
    if _origin(hint) in (Union, UnionType):
        return tuple(each for alternative in get_args(hint) for each in _alternatives(alternative))
    return (hint,)


def _origin(hint: Any) -> Any:  # for mypy, which takes every hint for a ParamSpec
    return get_origin(hint)


def _item_types(types: Types, containers: Types) -> Types:
    """Return the types of an element of a list, or of a value of a mapping."""
    hints: list[Any] = []
    for each in types:
        if _origin(each) in containers:
            hints += [hint for hint in get_args(each)[containers is MAPPINGS :] if hint is not ...]
        elif containers is SEQUENCES and hasattr(each, "_fields"):  # a named tuple, stored as a list
            hints += typing.get_type_hints(each).values()
    return tuple(each for hint in hints for each in _alternatives(hint)) or ANYTHING


def _is_plain(hint: Any) -> bool:
    """Return whether a hint allows numbers and text only."""
    origin = _origin(hint)
    if origin in (*SEQUENCES, *MAPPINGS):
        return all(_is_plain(each) for inner in get_args(hint) for each in _alternatives(inner))
    if origin is Literal or hint is ...:
        return True
    return inspect.isclass(hint) and (hint in PLAIN or issubclass(hint, PurePath))
