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

import torch
from jsonargparse import ArgumentParser

from onestage.reliability.checkpoints import read_checkpoint, unusable
from onestage.training.loggers import first_line
from onestage.training.module import CHECKPOINT_KEY, DetectionModule
from onestage.types import Detector, JSONDict

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
LAST_NAME = re.compile(r"[^.]*[^.\d][^.]*")  # of a place; numbers count the items of a list
LIMITS = {
    "image_size": 8192, "batch_size": 4096, "num_train": 100_000, "num_val": 100_000, "draw_seed": 2**32,
    "tower_convs": 64, "depths": 64,
}  # fmt: skip
TRUST = "If you trust the file, give the run's own config.yaml with --config."
MAX_NUMBER = 1_000_000
MAX_ITEMS = 1000  # of a list
SPARE_BYTES = 256 << 20
MAX_CLASSES = 25_000  # the largest published detector has 9,418
PLAIN = (str, int, float, bool, NoneType)
SEQUENCES: tuple[Any, ...] = (list, tuple, Sequence)
MAPPINGS: tuple[Any, ...] = (dict, Mapping)
Types = tuple[Any, ...]
_origin: Any = get_origin  # mypy takes every hint for a ParamSpec
ANYTHING: Types = (Any,)


class Refusal(NamedTuple):
    """A value that a checkpoint may not hold."""

    place: str
    value: object
    is_foreign_class: bool = False  # it may be the user's own; the checkpoint is sound, but needs its config.yaml

    def __str__(self) -> str:
        if self.is_foreign_class:
            return f"names {self.value!r:.200} as {self.place}, which is not in {', '.join(TRUSTED)}"
        return f"has {self.value!r:.200} as {self.place}, which is nothing that `onestage fit` stores there"


def config_of(path: str | Path) -> JSONDict:
    """Return what evaluation needs of a checkpoint's configuration; CheckpointError if that may not be used."""
    checkpoint = read_checkpoint(path)
    saved = checkpoint[CHECKPOINT_KEY]
    config = evaluation_part(saved, path)
    for refusal in refusals(config):
        raise unusable(path, str(refusal), TRUST)
    _forget_weights(config["model"]["detector"])
    names = saved["class_names"]
    if len(names) > MAX_CLASSES or not all(name.isprintable() for name in names):
        raise unusable(path, f"has {len(names)} class names; at most {MAX_CLASSES} printable ones are used", TRUST)
    _require_weights_of_the_detector(path, config["model"]["detector"], saved, checkpoint["state_dict"])
    config["data"] |= {key: saved[key] for key in ("class_names", "category_ids")}
    return config


def _require_weights_of_the_detector(path: str | Path, node: JSONDict, saved: JSONDict, weights: JSONDict) -> None:
    """Refuse a detector that needs much more memory than the file has weights: 25,000 classes can need 14 GB.

    It is built on the device "meta", which allocates nothing.
    """
    given = {"num_classes": len(saved["class_names"]), "image_size": saved.get("image_size")}
    known = _parameters(_find_class(node.get("class_path")))
    arguments = {**(node.get("init_args") or {}), **{name: value for name, value in given.items() if name in known}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Detector, "detector")
    try:
        parsed = parser.parse_object({"detector": {**node, "init_args": arguments}})
        with torch.device("meta"):
            detector = parser.instantiate_classes(parsed).detector
    except Exception as error:  # any kind, from jsonargparse or the constructor
        raise unusable(path, f"has a detector that cannot be built: {first_line(error)[:200]}", TRUST) from error
    needed, stored = (sum(each.nbytes for each in tensors.values()) for tensors in (detector.state_dict(), weights))
    if needed > stored + SPARE_BYTES:
        problem = f"has a detector that needs {needed:,} bytes, and weights of {stored:,} bytes"
        raise unusable(path, problem, "`onestage fit` does not write such a file.")


def foreign_classes(path: str | Path) -> str | None:
    """Return why a checkpoint needs the user's config.yaml, or None."""
    found = list(refusals(evaluation_part(read_checkpoint(path)[CHECKPOINT_KEY], path)))
    for refusal in found:
        if not refusal.is_foreign_class:
            raise unusable(path, str(refusal), TRUST)
    names = sorted({str(refusal.value) for refusal in found})
    return f"it names {', '.join(names)}, not in {', '.join(TRUSTED)}" if names else None


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
    """Set every source of pretrained weights to None: the checkpoint has them. Class weights are numbers and stay."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key in ("weights", "backbone_weights", "pretrained") and isinstance(value, str):
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
    elif isinstance(node, list | tuple) and len(node) > MAX_ITEMS:
        yield Refusal(place, f"{len(node):,} items")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _check(value, _item_types(types, SEQUENCES), f"{place}.{index}")
    elif isinstance(node, str):
        is_word = any(_origin(each) is Literal and node in get_args(each) for each in types)
        if not is_word and not all(_is_plain(each) for each in types):  # the parser would read it as a class
            yield Refusal(place, node)
    elif isinstance(node, int) and abs(node) > LIMITS.get(LAST_NAME.findall(place)[-1], MAX_NUMBER):
        yield Refusal(place, node)


def _check_class(node: JSONDict, types: Types, place: str) -> Iterator[Refusal]:
    name, arguments = node["class_path"], node.get("init_args") or {}
    expected = tuple(each for each in types if inspect.isclass(each) and each not in PLAIN)
    found = _find_class(name)
    if found is None:
        is_foreign = isinstance(name, str) and bool(CLASS_PATH.fullmatch(name)) and not name.startswith(TRUSTED)
        yield Refusal(f"{place}.class_path", name, is_foreign)
        arguments = {}  # unknown without the class; its name is refused already
    elif not any(_is_kind(found, kind) for kind in expected):
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
    if isinstance(name, str) and CLASS_PATH.fullmatch(name) and name.startswith(tuple(f"{part}." for part in TRUSTED)):
        module, _, attribute = name.rpartition(".")
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
