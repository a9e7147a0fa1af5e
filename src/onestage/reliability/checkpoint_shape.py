"""What a checkpoint must hold to be one, checked as soon as it is read: nobody after that meets a surprise."""

import reprlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

MAX_DEPTH = 50  # of lists and keys in each other; `fit` writes 10
MAX_VALUES = 1_000_000  # beside the tensors; 100,000 classes have 200,000
POSITION = ("epoch", "batches", "seed", "batch_size", "world_size", "num_images")  # of a loader in its epoch
OPTIMIZER = ("epoch_loop.automatic_optimization.optim_progress", "optimizer")
PROGRESS = (
    ("epoch_progress",), ("epoch_loop.batch_progress",), ("epoch_loop.scheduler_progress",),
    (*OPTIMIZER, "step"), (*OPTIMIZER, "zero_grad"),
)  # fmt: skip
MISSING = object()


class Rule(NamedTuple):
    """What stands at a place."""

    place: tuple[str, ...]
    wanted: str  # in words
    holds: Callable[[Any], bool]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list | tuple) and all(type(one) is kind for one in value)


def _is_keyed(kind: type, value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and isinstance(one, kind) for key, one in value.items())


def _is_progress(value: object) -> bool:
    counts = [value.get(part) for part in ("total", "current")] if isinstance(value, dict) else [None]
    return all(
        isinstance(one, dict) and all(_is_count(one.get(key)) for key in ("ready", "completed")) for one in counts
    )


def _are_optimizers(value: Any) -> bool:
    return (
        bool(value)
        and _is_list_of(dict, value)
        and all(
            isinstance(state.get("state"), dict)
            and _is_list_of(dict, state.get("param_groups"))
            and all(isinstance(group.get("params"), list) for group in state["param_groups"])
            for state in value
        )
    )


def _is_lightning(value: object) -> bool:
    try:
        return isinstance(value, str) and Version(value).major >= 2
    except InvalidVersion:
        return False


def _are_callbacks(value: Any) -> bool:
    needed = {"best_model_path", "best_model_score"}
    return _is_keyed(dict, value) and all(
        needed <= state.keys() for name, state in value.items() if name.startswith("BestCheckpoint")
    )


def _is_position(value: object) -> bool:
    if value == {}:  # between two epochs there need not be one
        return True
    if not isinstance(value, dict) or not all(_is_count(value.get(key)) for key in POSITION):
        return False
    return bool(0 < value["batch_size"] * value["world_size"] <= value["num_images"])


OURS = (
    Rule(("state_dict",), "tensors by their names", lambda value: _is_keyed(Tensor, value)),
    Rule(("global_step",), "a number of steps", _is_count),
    Rule(("onestage", "detector"), "the name of a class", lambda value: isinstance(value, str)),
    Rule(("onestage", "image_size"), "a number of pixels", _is_count),
    Rule(("onestage", "class_names"), "a list of names", lambda value: _is_list_of(str, value)),
    Rule(("onestage", "category_ids"), "a list of whole numbers", lambda value: _is_list_of(int, value)),
)
WHERE_GIVEN = (
    Rule(("onestage", "config"), "keys and values", lambda value: value is None or isinstance(value, dict)),
    Rule(("onestage", "versions"), "versions by the names of packages", lambda value: _is_keyed(str, value)),
    Rule(("current_model_state",), "tensors by their names", lambda value: _is_keyed(Tensor, value)),
)
OF_TRAINING = (
    Rule(("epoch",), "the number of an epoch", _is_count),
    Rule(("optimizer_states",), "states of optimizers", _are_optimizers),
    Rule(("lr_schedulers",), "states of schedules", lambda value: bool(value) and _is_list_of(dict, value)),
    Rule(("callbacks",), "states of callbacks by their names", _are_callbacks),
    Rule(("pytorch-lightning_version",), "a version from 2 on", _is_lightning),
    *(Rule(("loops", "fit_loop", *keys), "counts, `total` and `current`", _is_progress) for keys in PROGRESS),
)


def shape_problem(checkpoint: dict[str, Any]) -> str | None:
    """Say at which place a checkpoint holds what no checkpoint of this project does, or None.

    One with the state of an optimizer must be whole enough to go on training from.
    """
    if not _is_plain(checkpoint.get("onestage")):
        return "has something else than plain values by keys as `onestage`, or too many of them"
    swollen = _first_swollen(checkpoint)
    if swollen is not None:
        return swollen
    rules = [*OURS, *(rule for rule in WHERE_GIVEN if _at(checkpoint, rule.place) is not MISSING)]
    if "optimizer_states" in checkpoint:
        rules += [*OF_TRAINING, *_positions(checkpoint)]
    for rule in rules:
        value = _at(checkpoint, rule.place)
        if value is MISSING or not rule.holds(value):
            what = "nothing" if value is MISSING else reprlib.repr(value)
            return f"has {what} as `{'.'.join(rule.place)}`, where {rule.wanted} must stand"
    return None


def _first_swollen(checkpoint: dict[str, Any]) -> str | None:
    """Find a tensor that is larger than what is stored of it, before anything of its size is allocated."""
    waiting: list[tuple[str, Any]] = list(checkpoint.items())
    seen = 0
    while waiting:
        place, node = waiting.pop()
        seen += 1
        if seen > MAX_VALUES:
            return f"has more than {MAX_VALUES:,} values"
        if isinstance(node, dict):
            waiting += [(f"{place}.{key}"[-200:], value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            waiting += [(f"{place}.{index}"[-200:], value) for index, value in enumerate(node)]
        elif isinstance(node, Tensor):
            if node.layout != torch.strided or node.device.type != "cpu" or node.is_quantized:
                return f"has a tensor as `{place}` that is not simply its values one after the other"
            size, stored = node.numel() * node.element_size(), node.untyped_storage().nbytes()
            if size > stored:
                return f"has a tensor of {size:,} bytes as `{place}`, of which {stored:,} are stored, again and again"
    return None


def _positions(checkpoint: dict[str, Any]) -> Iterator[Rule]:
    """The position of a data module of ours; one of the user's own keeps what it likes."""
    name = str(_at(checkpoint, ("onestage", "config", "data", "class_path")))
    key = name.rpartition(".")[2]
    if name.startswith("onestage.") and key in checkpoint:
        yield Rule((key,), f"the position in an epoch ({', '.join(POSITION)})", _is_position)


def _at(checkpoint: dict[str, Any], place: tuple[str, ...]) -> Any:
    node: Any = checkpoint
    for key in place:
        if not isinstance(node, dict) or key not in node:
            return MISSING
        node = node[key]
    return node


def _is_plain(root: object) -> bool:
    """Whether a tree by keys holds numbers, text and nothing else; also not itself, at any depth."""
    waiting, seen = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            return False
        if isinstance(node, dict) and all(isinstance(key, str | int) for key in node):
            waiting += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list | tuple):
            waiting += [(value, depth + 1) for value in node]
        elif not isinstance(node, str | int | float | None):
            return False
    return isinstance(root, dict)
