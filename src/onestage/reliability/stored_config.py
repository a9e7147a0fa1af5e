"""What the configuration inside a checkpoint may say: a checkpoint is a file from somewhere, and no program.

The parser takes a text for a class wherever it wants one: as a name, as YAML or JSON, or as the path of such a file.
What `fit` has stored needs none of that, as it names each class under `class_path`. So there are two walls: a text may
stand only where nothing but text can be meant, and what is parsed can import nothing that is not trusted.
"""

import contextlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain
from pathlib import PurePath
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings  # nothing public takes an entry out of the lists again
from lightning.pytorch import LightningDataModule

from onestage.cli.parser import DetectionParser, ParsingError
from onestage.training.module import DetectionModule
from onestage.types import JSONDict

# A configuration of the user's own may name anything: it is a program, as the user knows.
TRUSTED = ("onestage", "torch.optim", "torch.nn", "albumentations")
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
Types = tuple[Any, ...]
ANYTHING: Types = (Any,)  # the types of a value of which nothing is known
PLAIN = (str, int, float, bool, NoneType)
SEQUENCES: Types = (list, tuple, Sequence)
MAPPINGS: Types = (dict, Mapping)


class Refusal(NamedTuple):
    """A value that has no business in a checkpoint."""

    place: str
    value: object
    is_name: bool  # of a class that is not trusted, which may be the user's own

    def __str__(self) -> str:
        if self.is_name:
            return f"names {self.value!r} as {self.place}, which is not in {', '.join(TRUSTED)}"
        return f"has {self.value!r:.200} as {self.place}, which is nothing that `onestage fit` stores there"


def refusals(config: JSONDict) -> Iterator[Refusal]:
    """Look at every value of a `model` and `data` configuration. Of foreign code nothing is imported.

    Args:
        config: of plain values, not nested in itself.
    """
    yield from _refused(config["model"], (DetectionModule,), "model")
    yield from _refused(config["data"], (LightningDataModule,), "data")
    for place, node in (("model.detector", config["model"].get("detector")), ("data", config["data"])):
        if not isinstance(node, dict) or "class_path" not in node:
            yield Refusal(place, node, False)


def parsing_error(config: JSONDict) -> str | None:
    """Parse a configuration by itself, with imports of what is trusted only; say what is wrong with it, or None."""
    parser = DetectionParser(allow_abbrev=False)
    parser.add_lightning_class_args(DetectionModule, "model")
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.link_arguments("data.num_classes", "model.detector.init_args.num_classes", apply_on="instantiate")
    with _trusted_imports():
        try:
            parser.parse_object(config)
        except (ParsingError, ImportError, TypeError, ValueError, AttributeError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return " ".join(lines)[:400] or type(error).__name__
    return None


@contextlib.contextmanager
def _trusted_imports() -> Iterator[None]:
    """Let the parser import nothing else. What was allowed before is so again afterwards."""
    before = dict(parsing_settings)
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(TRUSTED))
        yield
    finally:
        parsing_settings.update(before)


def _refused(node: object, types: Types, place: str) -> Iterator[Refusal]:
    if isinstance(node, dict) and "class_path" in node:
        yield from _refused_class(node, place)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _refused(value, _types_of_value(types, str(key)), f"{place}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _refused(value, _types_of_elements(types), f"{place}.{index}")
    elif isinstance(node, str) and not _is_text_meant(node, types):
        yield Refusal(place, node, False)


def _refused_class(node: JSONDict, place: str) -> Iterator[Refusal]:
    name, arguments = node["class_path"], node.get("init_args") or {}
    trusted = isinstance(name, str) and IMPORT_PATH.fullmatch(name) and name.startswith(tuple(f"{p}." for p in TRUSTED))
    if not trusted:
        yield Refusal(f"{place}.class_path", name, True)
    if not isinstance(arguments, dict):
        yield Refusal(f"{place}.init_args", arguments, False)
        return
    types = _parameters(_imported(name)) if trusted else {}
    for key, value in arguments.items():
        inner = _refused(value, types.get(key, ANYTHING), f"{place}.{key}")
        # What arguments a class has that is not imported, nobody knows; its name is refused already.
        yield from inner if trusted else (one for one in inner if one.is_name)
    for key in node.keys() - {"class_path", "init_args"}:
        yield from _refused(node[key], ANYTHING, f"{place}.{key}")


def _imported(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        return None


def _parameters(factory: object) -> dict[str, Types]:
    """The types that each argument of a class can have. Those that cannot be told can have any."""
    try:
        signature = inspect.signature(factory)  # type: ignore[arg-type] # what cannot be called raises
    except (TypeError, ValueError):
        return {}
    known = {}
    for name, parameter in signature.parameters.items():
        # The annotation alone: one that cannot be resolved is no reason to know nothing of the others.
        holder = SimpleNamespace(__annotations__={name: parameter.annotation})
        if parameter.annotation is parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            continue
        with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
            known[name] = _alternatives(typing.get_type_hints(holder, _names_around(factory))[name])
    return known


def _names_around(factory: Any) -> dict[str, Any]:
    """Return the names that the annotations of a class or function were written with."""
    owner = next((one for one in getattr(factory, "__mro__", ()) if "__init__" in vars(one)), factory)
    return vars(import_module(owner.__module__))


def _alternatives(hint: Any) -> Types:
    if _origin(hint) in (Union, UnionType):
        return tuple(one for alternative in get_args(hint) for one in _alternatives(alternative))
    return (hint,)


def _origin(hint: Any) -> Any:  # for the type checker, which thinks that it could only be a ParamSpec
    return get_origin(hint)


def _types_of_elements(types: Types) -> Types:
    """The types that an element of a list can have."""
    hints = [hint for each in types if _origin(each) in SEQUENCES for hint in get_args(each) if hint is not ...]
    for each in types:
        if inspect.isclass(each) and hasattr(each, "_fields"):  # a named tuple, stored as a list
            hints += typing.get_type_hints(each).values()
    return tuple(one for hint in hints for one in _alternatives(hint)) or ANYTHING


def _types_of_value(types: Types, key: str) -> Types:
    """The types that a key of a mapping, or an argument of a class stored without its name, can have."""
    hints = [get_args(each)[1] for each in types if _origin(each) in MAPPINGS]
    known = [_parameters(each).get(key, ANYTHING) for each in types if inspect.isclass(each) and each is not NoneType]
    return tuple(one for hint in hints for one in _alternatives(hint)) + tuple(chain(*known)) or ANYTHING


def _is_text_meant(text: str, types: Types) -> bool:
    """Whether a text can mean nothing but itself: one of the words to choose from, or where no class could stand."""
    is_word = any(_origin(each) is Literal and text in get_args(each) for each in types)
    return is_word or all(_is_plain(each) for each in types)


def _is_plain(hint: Any) -> bool:
    origin = _origin(hint)
    if origin in (*SEQUENCES, *MAPPINGS):
        return all(_is_plain(one) for inner in get_args(hint) for one in _alternatives(inner))
    if origin is Literal or hint is ...:
        return True
    return inspect.isclass(hint) and (hint in PLAIN or issubclass(hint, PurePath))
