"""Errors of the configuration and the command line in one line: three rewrites of jsonargparse's messages."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from onestage.errors import ConfigError

MAX_CONFIG_NODES = 100_000  # the largest configuration of this project has 200
MODULES_OF_CLASSES = (  # whose public classes a short or misspelt name can mean
    "onestage.models", "onestage.losses", "onestage.data", "lightning.pytorch.loggers",
    "lightning.pytorch.callbacks", "torch.optim", "albumentations",
)  # fmt: skip
UNKNOWN_KEY = re.compile(
    r"Option '(?P<a>[\w.]+)' is not accepted|does not accept option '(?P<b>[\w.]+)'|"
    r"unrecognized arguments: --(?P<c>[\w.]+)|Key '(?P<d>[\w.]+)' is not expected"
)
UNKNOWN_CLASS = re.compile(
    r"Problem with given class_path '(?P<a>[\w.]+)':\s+(?:module '[\w.]+' has no attribute|No module named)|"
    r"Expected a dot import path string: (?P<b>\w+)"
)
MISSING = re.compile(r"arguments? (?:is|are) required: (?P<names>[\w., ]+?)(?:\n|\.?$|$)", re.MULTILINE)
FAILED_LINK = re.compile(r"Call to compute_fn of link .* failed: (?P<reason>.*)", re.DOTALL)  # the reason is ours
# Lines that say nothing about the value: the other types of a union, and the ways to write a class.
NOISE = re.compile(
    r"NoneType|^Parser key |^Does not validate|^Expected a path |^a class path|^a dict with|^Not a valid sub"
)
REFUSED = re.compile(r"(?:(?P<owner>\w+): )?(?P<argument>\w+) (?:must be|is) ")  # how our constructors begin
CLASS_PATH = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def explain(message: str, command: str, options: Sequence[str], known_keys: Iterable[str]) -> str:
    """Return the reason of a parsing error, with the key as typed and the one that was probably meant.

    Unknown keys, unknown classes and wrong types are rewritten; other messages are jsonargparse's own.

    Args:
        message: jsonargparse's message, which has a paragraph for each type of a union.
        command: the subcommand.
        options: the words after it.
        known_keys: all keys of the command's parser.
    """
    hint = f"(all keys: onestage {command} --help)"
    if link := FAILED_LINK.search(message):
        return f"{link['reason'].strip()} {hint}"
    key = _typed_key(message, options)
    place = f"{key}: " if key else ""
    if "onestage.types.Detector is abstract" in message or (not key and MISSING.search(message)):
        missing = MISSING.search(message)
        names = missing["names"].replace(f"{command}.", "") if missing else "model.detector"
        return (
            f"{names}: missing. Give an experiment (--config configs/shapes_ssd.yaml), or for all commands but fit a "
            "checkpoint (--ckpt_path runs/.../checkpoints/best.ckpt)"
        )
    if "Option 'class_path' is not accepted" in message:
        return (
            f"{place}the keys of a class stand under init_args: {{class_path: ..., init_args: {{key: value}}}} {hint}"
        )
    if unknown := UNKNOWN_KEY.search(message):
        name = next(filter(None, unknown.groups()))
        meant = _nearest_key(name, [*known_keys, *_constructor_arguments(options)])
        return f"unknown key {_as_typed(name, options)}" + (f"; did you mean {meant}?" if meant else "") + f" {hint}"
    if unknown := UNKNOWN_CLASS.search(message):
        name = next(filter(None, unknown.groups()))
        return f"{place}unknown class {name}{_existing_classes(name)} {hint}"
    if missing := MISSING.search(message):
        owner = re.findall(r"class_path='([\w.]+)'", message)
        names = missing["names"].strip()
        return f"{place}{owner[-1] if owner else 'the class'} needs {names}. Set {key}.{names.split(',')[0]} {hint}"
    return f"{place}{_wrong_type(message)} {hint}"


def _typed_key(message: str, options: Sequence[str]) -> str | None:
    """Return the key that a message is about, as typed on the command line if it stands there."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    if not keys or f'"{keys[0]}"' not in message.strip().splitlines()[0]:
        return None
    if len(keys) > 1 or "NestedArg" in message:  # the argument of an object: the innermost key was typed
        nested = re.findall(r"NestedArg\(key='([\w.]+)'", message)
        typed = _as_typed(f".{keys[-1] if len(keys) > 1 else nested[0]}", options)
        return typed if typed.startswith("--") else ".".join(keys)
    typed = _as_typed(f".{keys[0]}", options)
    return typed.removeprefix("--") if typed.startswith("--") else str(keys[0])


def _wrong_type(message: str) -> str:
    """Return the lines that concern the value, without the other types of a union."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    bullets = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    details = [line for line in bullets if not NOISE.search(line)] or [
        line for line in lines[1:] if line.startswith(("Expected", "Not of type"))
    ]
    given = next((line for line in lines if line.startswith("Given value: ")), "")
    is_object = re.match(r"Given value: (NestedArg|\[?Namespace|\[?\{)", given)
    text = " or ".join(dict.fromkeys(details)) if details else " ".join(lines[1:] or lines)
    text += "" if is_object or "Got value" in text else given.replace("Given value: ", ", got ")
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("collections.abc.Sequence", "list")
    text = re.sub(r"Expected a float\. Got value: ([+-]?(?:nan|inf))\b", r"must be a finite number, got \1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"value of \1", text)
    text = text.replace("Expected a", "must be a").replace(". Got value: ", ", got ")
    return re.sub(r"\ba (?=int\b|iterable)", "an ", text)


def refusal(error: Exception, settings: Any) -> str:
    """Return the message of a constructor that rejected a value, with the key of that value.

    Args:
        error: as jsonargparse raises it, with a paragraph for each type of a union.
        settings: the parsed configuration.
    """
    reason = next((str(cause) for cause in _causes(error) if isinstance(cause, ConfigError)), None)
    if reason is None:  # the value's type was not the first of its union
        bullets = re.finditer(r"^( *)- (.*(?:\n\1  (?! *- ).*)*)", str(error), re.MULTILINE)
        texts = [re.sub(r"\n +", "\n", bullet[2]) for bullet in bullets]
        reason = next((text for text in texts if REFUSED.match(text)), None)
    if reason is None:
        return f"the configuration cannot be built: {error}"
    refused = REFUSED.match(reason)
    keys = _keys_of(refused["owner"], refused["argument"], settings.as_dict()) if refused else iter(())
    key = next(keys, None)
    return reason if refused is None or key is None else f"{key} {reason[refused.end('argument') + 1 :]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _keys_of(owner: str | None, argument: str, node: Any, place: str = "") -> Iterator[str]:
    """Yield the keys under which a configuration gives an argument to the class `owner`, or to any class."""
    if not isinstance(node, dict):
        return
    arguments = node.get("init_args") or {}
    if argument in arguments and owner in (None, str(node.get("class_path")).rpartition(".")[2]):
        yield f"{place}init_args.{argument}"
    for key, value in node.items():
        yield from _keys_of(owner, argument, value, f"{place}{key}.")


def _nearest_key(key: str, candidates: list[str]) -> str | None:
    """Return the known key with the most similar spelling: as a whole, then by its last or first part."""
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    roots = {candidate.partition(".")[0]: candidate.partition(".")[0] for candidate in candidates}
    for word, known in ((key, {name: name for name in candidates}), (last, leaves), (first, roots)):
        close = get_close_matches(word, known, n=1, cutoff=0.75)
        if close and known[close[0]] != word:
            return known[close[0]]
    return None


def _existing_classes(class_path: str) -> str:
    """Suggest the class with the most similar name and, if it implements an interface, the others that do."""
    module_name, _, name = class_path.rpartition(".")
    classes: dict[str, type] = {}
    for module in map(sys.modules.get, [module_name] if module_name else MODULES_OF_CLASSES):
        members = {known: getattr(module, known, None) for known in getattr(module, "__all__", ())}
        classes |= {known: value for known, value in members.items() if inspect.isclass(value)}
    close = get_close_matches(name, classes, n=1, cutoff=0.4)
    if not close:
        return ""
    kinds = [kind for kind in classes[close[0]].__mro__ if inspect.isabstract(kind)]
    others = [known for known, value in classes.items() if kinds and issubclass(value, kinds[-1])]
    alternatives = [known for known in others if known != close[0] and not inspect.isabstract(classes[known])]
    return f"; did you mean {close[0]}?" + (f" There are also {', '.join(alternatives)}" if alternatives else "")


def _as_typed(key: str, options: Sequence[str]) -> str:
    """Return the key as the user typed it, if it stands on the command line."""
    for word in options:
        typed = word.partition("=")[0].removesuffix("+")
        if typed.startswith("--") and typed.endswith(key):
            return typed
    return key.removeprefix(".")


def _constructor_arguments(options: Sequence[str]) -> Iterator[str]:
    """Yield the argument names of every class that the given configuration files and options name."""
    given = [yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in config_files(options)]
    words = [word.rpartition("=")[2] for word in options]
    short_names = [f"{module}.{word}" for module in MODULES_OF_CLASSES for word in words if word.isidentifier()]
    paths = [*(path for content in given for path in _class_paths(content)), *filter(CLASS_PATH.match, words)]
    for class_path in [*paths, *short_names]:
        module, _, name = class_path.rpartition(".")
        try:
            yield from inspect.signature(getattr(import_module(module), name)).parameters
        except (ImportError, AttributeError, TypeError, ValueError):
            continue  # the parser reports classes that cannot be imported


def _class_paths(node: Any) -> Iterator[str]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    if isinstance(node, dict) and CLASS_PATH.match(str(node.get("class_path", ""))):
        yield str(node["class_path"])
    for value in values:
        yield from _class_paths(value)


def config_files(options: Sequence[str]) -> list[str]:
    """Return the values of all --config options, in order."""
    return option_values(options, "--config", "-c")


def option_values(options: Sequence[str], *names: str) -> list[str]:
    """Return the values of an option given as `--name value` or `--name=value`, in order."""
    values = []
    for word, following in zip_longest(options, options[1:]):
        name, equals, value = word.partition("=")
        if name in names and (equals or following is not None):
            values.append(value if equals else str(following))
    return values


def files_first(options: Sequence[str]) -> list[str]:
    """Move every --config before the other options, so that options always override files.

    The parser lets a file override the options before it: a saved config.yaml has a value for every key and would
    silently reset a --ckpt_path typed before it.
    """
    files: list[str] = []
    others: list[str] = []
    words = iter(options)
    for word in words:
        if word in ("--config", "-c"):
            files += [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            (files if word.startswith(("--config=", "-c=")) else others).append(word)
    return files + others


class StrictLoader(yaml.SafeLoader):
    """YAML that rejects duplicate keys instead of keeping the last one silently."""


def _mapping_without_duplicates(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        seen.add(key)
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def check_config_file(file: str) -> None:
    """Validate a configuration file before it is parsed, for messages with file and line.

    Raises:
        ConfigError: the file is missing, unreadable, empty, no YAML mapping, or has a duplicate key.
    """
    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"--config {file} {what}.{_similar_files(path)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=StrictLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{place}: {error.problem}. Correct this line; indent with spaces.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {file} is not YAML: {str(error).splitlines()[0]}") from error
    if _expanded_size(content, {}) > MAX_CONFIG_NODES:
        raise ConfigError(
            f"--config {file} expands to more than {MAX_CONFIG_NODES:,} values through its aliases.\n"
            "Write the values themselves instead of nested & and * marks."
        )
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}, not keys and values"
        raise ConfigError(f"--config {file} {what}. See configs/shapes_ssd.yaml for one that works.")


def _expanded_size(node: object, known: dict[int, float]) -> float:
    """Return the number of values with aliases expanded; infinite if a value contains itself."""
    children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    if not children:
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # a lookup before the line below comes from inside this node
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]


def _similar_files(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    if close:
        return f" Did you mean {path.parent / close[0]}?"
    return f" There are: {', '.join(sorted(names)[:8])}" if names else " Paths are relative to the current folder."
