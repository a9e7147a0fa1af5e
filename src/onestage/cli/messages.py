"""What to tell a user whose configuration or command line cannot be parsed: one line."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise, zip_longest
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
# Of a union, what says nothing about the value: its other types, and what classes can be written as.
NOISE = re.compile(r"NoneType|^Parser key |^Does not validate|^Expected a path |^a class path \(str\)|^a dict with")
FAILED_LINK = re.compile(r"Call to compute_fn of link .* failed: (?P<reason>.*)")  # which has said it in our words
UNKNOWN_CLASS = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s+(module '[\w.]+' has no attribute|No module named)"
)
REFUSED = re.compile(r"(?:(?P<owner>\w+): )?(?P<argument>\w+) is ")  # how our constructors begin
CLASS_PATH = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def explain(message: str, command: str, options: Sequence[str], known_keys: Iterable[str]) -> str:
    """Shorten jsonargparse's message to the reason and name the place and the key that was probably meant.

    Args:
        message: as jsonargparse words it, with a paragraph for each type of a union.
        command: the subcommand.
        options: the words after it.
        known_keys: all keys of the command's parser.
    """
    link = FAILED_LINK.search(message)
    reason = link["reason"] if link else _reason(message, options)
    unnamed = [key.removeprefix(f"{command}.") for key in _keys_without_class(reason, options)]
    if unnamed:
        return (
            f"nothing says which {' and '.join(unnamed)} to use. Give an experiment (--config configs/shapes_ssd.yaml)"
            ", or for all commands but fit a checkpoint (--ckpt_path runs/.../checkpoints/best.ckpt)"
        )
    unknown = next((match["key"] for match in map(lambda rule: rule.search(reason), UNKNOWN_KEY) if match), None)
    if "Option 'class_path' is not accepted" in reason:
        reason = "the keys of a class stand under init_args: {class_path: ..., init_args: {key: value}}"
    elif unknown is not None:
        meant = _meant(unknown, [*known_keys, *_constructor_arguments(options)])
        reason = f"there is no key {_written_as(unknown, options)}" + (f"; did you mean {meant}?" if meant else "")
    return f"{reason} (all keys: onestage {command} --help)"


def _keys_without_class(reason: str, options: Sequence[str]) -> list[str]:
    """The keys that take a class, of which no configuration or option names one."""
    missing = re.search(r"arguments are required: (.*)", reason)
    if missing:
        return [key.strip() for key in missing[1].split(",")]
    if "onestage.types.Detector is abstract" in reason:
        return ["model.detector"]
    is_of_data = any(option.startswith("--data.") for option in options)
    is_named = config_files(options) or any(re.match(r"--data(\.class_path)?(=|$)", option) for option in options)
    return ["data"] if "is not accepted" in reason and is_of_data and not is_named else []


def refusal(error: Exception, settings: Any) -> str:
    """Return what a constructor says of a value, alone and with the key that the value stands under.

    Args:
        error: as jsonargparse raises it: with a paragraph for each type of a union.
        settings: the parsed configuration.
    """
    reason = next((str(one) for one in _causes(error) if isinstance(one, ConfigError)), None)
    if reason is None:  # it was not the first type of its union
        bullets = re.finditer(r"^( *)- (.*(?:\n\1  (?! *- ).*)*)", str(error), re.MULTILINE)
        texts = [re.sub(r"\n +", "\n", bullet[2]) for bullet in bullets]
        reason = next((text for text in texts if REFUSED.match(text)), None)
    if reason is None:
        return f"the configuration cannot be built: {error}"
    refused = REFUSED.match(reason)
    keys = _keys_of(refused["owner"], refused["argument"], settings.as_dict()) if refused else iter(())
    key = next(keys, None)
    return reason if refused is None or key is None else f"{key} is {reason[refused.end() :]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _keys_of(owner: str | None, argument: str, node: Any, place: str = "") -> Iterator[str]:
    """Where a configuration has an argument: of the class of this name, or of any."""
    if not isinstance(node, dict):
        return
    arguments = node.get("init_args") or {}
    if argument in arguments and owner in (None, str(node.get("class_path")).rpartition(".")[2]):
        yield f"{place}init_args.{argument}"
    for key, value in node.items():
        yield from _keys_of(owner, argument, value, f"{place}{key}.")


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


def _reason(message: str, options: Sequence[str]) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    key = keys[0] if keys and f'"{keys[0]}"' in lines[0] else None
    if key and len(keys) > 1:  # an argument of an object: the inner key is the one that was typed
        written = _written_as(f".{keys[-1]}", options)
        key = written if written.startswith("--") else ".".join(keys)
    wrong_class = UNKNOWN_CLASS.search(message)
    # Of a key inside a class the next line says what is wrong with it.
    said = [after if line.startswith("- Parser key ") else line for line, after in pairwise([*lines, ""])]
    bullets = [line.removeprefix("- ") for line, own in zip(said, lines, strict=True) if own.startswith("- ")]
    if wrong_class:
        text = f"there is no class {wrong_class['path']}{_existing_classes(wrong_class['path'])}"
    elif bullets:
        details = [line for line in bullets if not NOISE.search(line)]
        following = lines[lines.index(f"- {details[0]}") + 1] if details and details[0].endswith(":") else ""
        details[:1] = [f"{details[0]} {following}".strip()] if details else []
        given = next((line for line in lines if line.startswith("Given value: ")), "")
        is_whole_class = given.startswith(("Given value: NestedArg", "Given value: {'class_path'"))
        given = "" if is_whole_class else given.replace("Given value: ", "; got ")
        text = " or ".join(dict.fromkeys(details)) + given
    else:
        text = " ".join(lines[1:] if key and len(lines) > 1 else lines)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("collections.abc.Sequence", "list")
    text = re.sub(r"Expected a float\. Got value: ([+-]?(?:nan|inf))\b", r"\1 is no finite number", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"value of \1", text)
    return f"{key}: {text}" if key else text


def _existing_classes(class_path: str) -> str:
    """Which classes of that module can have been meant: all of a kind, or the one spelt most alike."""
    module_name, _, name = class_path.rpartition(".")
    module = sys.modules.get(module_name)
    members = {known: getattr(module, known, None) for known in getattr(module, "__all__", ())}
    classes = {known: one for known, one in members.items() if inspect.isclass(one) and not inspect.isabstract(one)}
    close = get_close_matches(name, classes, n=1, cutoff=0.4)
    if not close:
        return ""
    kinds = [kind for kind in classes[close[0]].__mro__ if inspect.isabstract(kind)]
    if not kinds:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known for known, one in classes.items() if issubclass(one, kinds[-1]))}"


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
