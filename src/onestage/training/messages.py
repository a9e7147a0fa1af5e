"""What to tell a user whose configuration or command line cannot be parsed: one line."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from onestage.errors import ConfigError

UNKNOWN_KEY = (
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"Key '(?P<key>[\w.]+)' is not expected"),
)
MAX_CONFIG_NODES = 100_000  # the largest configuration of this project has 200
CLASS_PATH = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def explain(message: str, command: str, options: Sequence[str], known_keys: Iterable[str]) -> str:
    """Shorten jsonargparse's message to the reason and name the place and the key that was probably meant.

    Args:
        message: as jsonargparse words it, with a paragraph for each type of a union.
        command: the subcommand.
        options: the words after it.
        known_keys: all keys of the command's parser.
    """
    reason = _reason(message)
    missing = re.search(r"arguments are required: (.*)", reason)
    if missing:
        keys = " and ".join(key.strip().removeprefix(f"{command}.") for key in missing[1].split(","))
        return (
            f"nothing says which {keys} to use. Give an experiment (--config configs/shapes_ssd.yaml), or for "
            "all commands but fit a checkpoint (--ckpt_path runs/.../checkpoints/best.ckpt)"
        )
    unknown = next((match["key"] for match in map(lambda rule: rule.search(reason), UNKNOWN_KEY) if match), None)
    if unknown is not None:
        meant = _meant(unknown, [*known_keys, *_constructor_arguments(options)])
        reason = f"there is no key {_written_as(unknown, options)}" + (f"; did you mean {meant}?" if meant else "")
    return f"{reason} (all keys: onestage {command} --help)"


def _meant(key: str, candidates: list[str]) -> str | None:
    """The known key that is spelt most alike: as a whole, then by its first or last part."""
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    roots = {candidate.partition(".")[0]: candidate.partition(".")[0] for candidate in candidates}
    for word, known in ((key, {name: name for name in candidates}), (last, leaves), (first, roots)):
        close = get_close_matches(word, known, n=1, cutoff=0.75)
        if close and known[close[0]] != word:
            return known[close[0]]
    return None


def _reason(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    key = re.search(r'Parser key "([\w.]+)"', lines[0])
    bullets = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if bullets:
        details = [line for line in bullets if "NoneType" not in line]
        following = lines[lines.index(f"- {details[0]}") + 1] if details and details[0].endswith(":") else ""
        details[:1] = [f"{details[0]} {following}".strip()] if details else []
        given = next((line for line in lines if line.startswith("Given value: ")), "")
        given = "" if "NestedArg" in given else given.replace("Given value: ", "; got ")
        text = " or ".join(dict.fromkeys(details)) + given
    else:
        text = " ".join(lines[1:] if key and len(lines) > 1 else lines)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"value of \1", text)
    return f"{key.group(1)}: {text}" if key else text


def _written_as(key: str, options: Sequence[str]) -> str:
    """The key as the user wrote it, where it stands on the command line."""
    for word in options:
        written = word.partition("=")[0]
        if written.startswith("--") and written.endswith(key):
            return written
    return key


def _constructor_arguments(options: Sequence[str]) -> Iterator[str]:
    """Argument names of every class that the given configuration files name."""
    for file in config_files(options):
        for class_path in _class_paths(yaml.safe_load(Path(file).read_text(encoding="utf-8"))):
            module, _, name = class_path.rpartition(".")
            try:
                yield from inspect.signature(getattr(import_module(module), name)).parameters
            except (ImportError, AttributeError, TypeError, ValueError):
                continue  # that it cannot be imported is for the parser to say


def _class_paths(node: Any) -> Iterator[str]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    if isinstance(node, dict) and CLASS_PATH.match(str(node.get("class_path", ""))):
        yield str(node["class_path"])
    for value in values:
        yield from _class_paths(value)


def config_files(options: Sequence[str]) -> list[str]:
    """The values of all --config options, in order."""
    return option_values(options, "--config", "-c")


def option_values(options: Sequence[str], *names: str) -> list[str]:
    """The values of an option given as `--name value` or `--name=value`, in order."""
    values = []
    for word, following in zip_longest(options, options[1:]):
        name, equals, value = word.partition("=")
        if name in names and (equals or following is not None):
            values.append(value if equals else str(following))
    return values


def files_first(options: Sequence[str]) -> list[str]:
    """Move every --config before the other options, which then override files wherever they stand.

    The parser lets a file override the options before it: a saved config.yaml, which has a value for every key, would
    silently take back a --ckpt_path typed in front of it.
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
    """YAML without the rule that of two equal keys the last one wins silently."""


def _mapping_without_duplicates(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands here twice", key_node.start_mark
            )
        seen.add(key)
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def check_config_file(file: str) -> None:
    """Read a configuration file once before the parser does, for messages with file and line.

    Raises:
        ConfigError: it is missing, unreadable, empty, no YAML, no mapping, or has a key twice.
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
            f"--config {file} becomes more than {MAX_CONFIG_NODES:,} values when its aliases are written out.\n"
            "Write the values themselves instead of nested & and * marks."
        )
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}, not keys and values"
        raise ConfigError(f"--config {file} {what}. See configs/shapes_ssd.yaml for one that works.")


def _expanded_size(node: object, known: dict[int, float]) -> float:
    """How many values a tree has with each alias counted every time; infinite if it holds itself."""
    children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
    if not children:
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known; whoever asks now is inside it
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in children)
    return known[id(node)]


def _similar_files(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    if close:
        return f" Did you mean {path.parent / close[0]}?"
    return f" There are: {', '.join(sorted(names)[:8])}" if names else " Paths are relative to the current folder."
