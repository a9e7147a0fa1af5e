"""Errors of the configuration and the command line in one line: three rewrites of jsonargparse's messages."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from onestage.errors import ConfigError
from onestage.files import is_path, read_text

CONFIGS = (Path(__file__).parents[1] / "configs").resolve()  # also in an installed package
MAX_CONFIG_NODES = 100_000  # the largest configuration of this project has 200
MODULES_OF_CLASSES = (  # whose public classes a misspelt name can mean
    "onestage.models", "onestage.losses", "onestage.data", "lightning.pytorch.loggers", "lightning.pytorch.callbacks",
    "torch.optim",
)  # fmt: skip
UNKNOWN_KEY = re.compile(r"(?:Option '|accept option '|unrecognized arguments: --|Key ')([\w.-]+)")
UNKNOWN_CLASS = re.compile(
    r"given class_path '([\w.]+)':\s+(?:module '[\w.]+' has no attribute|No module named|No [\w.]+ attribute)"
    r"|callable class: module '[\w.]+' has no attribute '\w+'\. Got value: ([\w.]+)"
    r"|^(?!.*Expected a <class '(?:int|float)'>).*dot import path string: (\w+)",
    re.DOTALL,
)
MISSING = re.compile(r"^the following arguments are required: (.*?)\.?$", re.MULTILINE)
FAILED_LINK = re.compile(r"Call to compute_fn of link .* failed: (?P<reason>.*)", re.DOTALL)  # the reason is ours


def explain(message: str, command: str, options: Sequence[str], known_keys: Iterable[str]) -> str:
    """Return the reason of a parsing error, with the key as typed and the one that was probably meant.

    Unknown keys and classes, missing ones and wrong types are rewritten; other messages are jsonargparse's own.

    message: jsonargparse's, with a paragraph for each type of a union. options: the words after the command.
    """
    hint = f"(all keys: onestage {command} --help)"
    if link := FAILED_LINK.search(message):
        return f"{link['reason'].strip()} {hint}"
    missing = MISSING.search(message)
    if missing or "onestage.types.Detector is abstract" in message:
        names = missing[1].replace(f"{command}.", "") if missing else "model.detector"
        return (
            f"{names}: missing. Give an experiment, --config shapes_ssd, or for all commands but fit a checkpoint, "
            f"--ckpt_path runs/.../checkpoints/best.ckpt.\n"
            f"Experiments: {', '.join(shipped_configs())}, or your own file."
        )
    if unknown := UNKNOWN_KEY.search(message):
        meant = _nearest_key(unknown[1], known_keys)
        guess = f"; did you mean {meant}?" if meant else ""
        return f"unknown key {_as_typed(unknown[1], options)}{guess} {hint}"
    keys = re.findall(r"Parser key \"([\w.]+)\"|NestedArg\(key='([\w.]+)'", message)
    names = [first or second for first, second in keys]
    typed = _as_typed(names[-1], options).removeprefix("--") if names else ""
    key = typed if "." in typed else ".".join(dict.fromkeys(names))
    if unknown := UNKNOWN_CLASS.search(message):
        name = next(filter(None, unknown.groups()))
        return f"{key}: unknown class {name}{_nearest_class(name)} {hint}"
    place = f"{key}: " if key else ""
    return f"{place}{_wrong_type(message)} {hint}"


def _as_typed(key: str, options: Sequence[str]) -> str:
    """Return the key as the user typed it, if it stands on the command line."""
    typed = (word.partition("=")[0].removesuffix("+") for word in options)
    same = [word for word in typed if f"{word}.".replace(".init_args.", ".").endswith((f"-{key}.", f".{key}."))]
    return next(iter(same), key)


def _nearest_key(key: str, known_keys: Iterable[str]) -> str:
    """Return the known key with the most similar spelling, as a whole or in its last part, or ""."""
    known = list(known_keys)
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in known}
    close = get_close_matches(key, known, 1, 0.75)
    close = close or [leaves[leaf] for leaf in get_close_matches(key.rpartition(".")[2], leaves, 1, 0.75)]
    return close[0] if close and close[0] != key else ""


def _nearest_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    modules = [sys.modules.get(known) for known in ([module] if module else MODULES_OF_CLASSES)]
    names = [public for known in modules for public in getattr(known, "__all__", ()) if public[0].isupper()]
    close = get_close_matches(name, names, 3, 0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _wrong_type(message: str) -> str:
    """Return the lines that concern the value, without the other types of a union."""
    lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines() if line.strip()]
    given = next((line for line in lines if re.match(r"Given value: (?!\[?(?:NestedArg|Namespace|\{))", line)), "")
    types = [line for line in lines if line.startswith("Expected a") and not re.search("NoneType|path", line)]
    details = [line for line in lines if line.startswith(("the following", "Not of type"))] or types
    text = " or ".join(dict.fromkeys(details)) or " ".join(lines[1:] or lines)
    text += "" if "Got value" in text else given.replace("Given value: ", ", got ")
    text = re.sub(r"Expected an? (?:typing\.)?(?:<class '(?:\w+\.)*(\w+)'>)?", r"must be \1", text)
    return text.replace(". Got value: ", ", got ").replace("must be float, got", "must be a finite number, got")


def refusal(error: BaseException) -> str:
    """Return the message of the constructor that rejected a value, out of jsonargparse's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines()]
    rules = [line.removeprefix("- ") for line in lines if " must be " in line]
    causes = [line[2:] for line in lines if re.match("- (?!Expected|Not a|a )", line)]  # of a union
    return next(iter(rules), f"the configuration cannot be built: {next(iter(causes), str(error))}")


def split_option(options: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Return the values of an option given as `--name value` or `--name=value`, and the other words, in order."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="values", nargs="?", action="append", default=[])
    known, others = parser.parse_known_args(list(options))
    return [value for value in known.values if value is not None], others


def files_first(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files of all --config, those that ship found by their names, and the other options.

    The parser lets a file override the options before it: a saved config.yaml has a value for every key and would
    silently reset a --ckpt_path typed before it. So files come first.
    """
    files, others = split_option(options, "-c", "--config")
    return [find_config(file) for file in files], others


def find_config(value: str) -> str:
    """Return the path of a configuration: a file, or one that ships with the package, such as shapes_ssd."""
    shipped = (CONFIGS / value.removeprefix("configs/"), CONFIGS / f"{value}.yaml")
    found = [path for path in shipped if is_path(value) and path.is_file() and path.resolve().is_relative_to(CONFIGS)]
    return str(found[0]) if found and not Path(value).is_file() else value


class StrictLoader(yaml.SafeLoader):
    """YAML that rejects duplicate keys instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, or raise ConstructorError."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return dict(super().construct_mapping(node, deep))


def shipped_configs() -> list[str]:
    """Return the names of the experiments that ship with the package, for --config."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "trainer")


def check_config_file(file: str) -> None:
    """Check a configuration file before it is parsed, for messages with file and line.

    ConfigError if it is missing, unreadable, empty, no YAML mapping, or has a duplicate key.
    """
    path = Path(file)
    others = [*path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    names = {other.name: str(other) for other in others} | {name: name for name in shipped_configs()}
    close = get_close_matches(path.name, names, n=1)
    remedy = f"Did you mean {names[close[0]]}?" if close else f"Shipped are: {', '.join(shipped_configs())}."
    text = read_text(path, ConfigError, "a configuration in YAML", remedy)
    try:
        content = yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{place}: {error.problem}. Correct this line; indent with spaces.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: is not YAML: {str(error).splitlines()[0]}") from error
    if _expanded_size(content, {}) > MAX_CONFIG_NODES:
        problem = f"expands to more than {MAX_CONFIG_NODES:,} values through its aliases"
        raise ConfigError(f"{file}: {problem}.\nWrite the values themselves instead of nested & and * marks.")
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}, not keys and values"
        raise ConfigError(f"{file}: {what}. See {CONFIGS}/shapes_ssd.yaml for one that works.")


def _expanded_size(node: object, known: dict[int, float]) -> float:
    """Return the number of values with aliases expanded; infinite if a value contains itself."""
    children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    if not children:
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # a lookup before the line below comes from inside this node
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]
