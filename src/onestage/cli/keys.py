"""Keys of the trainer commands, read from source files: their help and a mistyped key need no import of torch."""

import ast
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec, resolve_name
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from onestage.cli.messages import MODULES_OF_CLASSES, explain, files_first
from onestage.errors import ConfigError

CLASSES = {
    "model": "onestage.training.module.DetectionModule",
    "data": "onestage.data.datamodule.DetectionDataModule",
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
}
OWN_TRAINER = "onestage.training.trainer.DetectionTrainer"
OF_LIGHTNING = {"help", "config", "print_config", "seed_everything", "ckpt_path", *CLASSES}  # Lightning's command line
COMMON = {
    "max_epochs": "epochs to train",
    "max_steps": "limit in optimizer steps; -1: none",
    "check_val_every_n_epoch": "epochs between two validations",
    "log_every_n_steps": "optimizer steps between two rows of metrics.csv",
    "accelerator": "cpu, gpu, mps, or auto",
    "devices": "number of devices, a process each; auto: all",
    "precision": "32-true, bf16-mixed, 16-mixed; auto: the faster one of the device",
    "accumulate_grad_batches": "batches per optimizer step",
    "gradient_clip_val": "largest norm of the gradients",
    "logger": "added to the run's own files: WandbLogger, MLFlowLogger, CometLogger, ... (docs/loggers.md)",
    "callbacks": "Lightning's callbacks, such as EarlyStopping",
}
Key = tuple[str, str]  # default and description


def help_page(command: str) -> str:
    """Return the project's own keys by group, one line each, and the names of Lightning's."""
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    groups = dict(read_groups())
    trainer = groups.pop("trainer")
    if command != "fit":
        checkpoint = {"ckpt_path": ("PATH", "the checkpoint; it holds model and data, so --config is not needed")}
        method = _arguments(OWN_TRAINER, command)
        own = {name: key for name, key in method.items() if name not in ("model", "datamodule", "ckpt_path")}
        groups[""] = checkpoint | own | groups[""]
    lines = [
        f"usage: onestage {command} [--config FILE ...] [--KEY VALUE ...]",
        "",
        "FILE is YAML or a shipped name such as shapes_ssd. Later files override earlier ones, keys override files.",
    ]
    shared = _settings(["--config", "configs/trainer.yaml"]).get("trainer") or {}  # which every command reads first
    stated = {name: json.dumps(value).strip('"') for name, value in shared.items()}
    common = {name: (stated.get(name, trainer[name][0]), text) for name, text in COMMON.items() if name in trainer}
    for group, keys in {**groups, "trainer": common}.items():
        lines += ["", f"{group or 'run'}:"]
        prefix = f"{group}." if group else ""
        for name, (default, text) in keys.items():
            described = textwrap.wrap(text, width - 39, max_lines=2, placeholder=" ...") or [""]
            lines.append(f"{f'  --{prefix}{name} {default}':<38} {described[0]}".rstrip())
            lines += [" " * 39 + line for line in described[1:]]
    others = ", ".join(name for name in trainer if name not in COMMON)
    lines += textwrap.wrap(f"and of Lightning's Trainer: {others}", width, initial_indent="  ", subsequent_indent="  ")
    lines += [
        "",
        f"all of the trainer, with types:  onestage {command} --help all",
        f"the keys of a class:             onestage {command} --model.detector.help onestage.models.SSD300",
        f"                                 onestage {command} --data.source.help onestage.data.COCO",
    ]
    return "\n".join(lines)


def require_known_keys(command: str, options: Sequence[str]) -> None:
    """Raise ConfigError for a key, typed or in a --config file, that is neither one of the commands nor of its class.

    Classes are read, not imported; the keys of one that has no source, or takes any argument, are left to the parser.
    """
    groups = read_groups()
    known = OF_LIGHTNING | {f"{group}.{name}" if group else name for group, keys in groups.items() for name in keys}
    known |= {*_arguments(OWN_TRAINER, command), *filter(None, groups)}
    opaque = {group for group, keys in groups.items() if group and not keys}  # of a library's class
    settings = _settings(options)
    for group, value in settings.items():
        has_keys = isinstance(value, dict) and group not in opaque | (known - groups.keys())
        inner = value if has_keys else ()
        for key in [f"{group}.{name}" for name in inner] or [group]:
            if key not in known:
                raise ConfigError(explain(f"unrecognized arguments: --{key}", command, options, sorted(known)))
    for key, others in _foreign_keys(settings):
        raise ConfigError(explain(f"unrecognized arguments: --{key}", command, options, others))


def _settings(options: Sequence[str]) -> dict[str, Any]:
    """Return what the --config files and the options say together, as far as they can be read."""
    settings: dict[str, Any] = {}
    for file in files_first(options)[0]:
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # the parser says why
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            _merge(settings, content if isinstance(content, dict) else {})
    for word, following in zip_longest(options, options[1:], fillvalue=""):
        key, equals, text = word[2:].partition("=")
        if word.startswith("--") and not key.endswith(".help"):
            value: Any = text if equals else "" if following.startswith("--") else following
            with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # the parser says why
                value = yaml.safe_load(value) if value.startswith("{") else value
                if key in CLASSES and isinstance(value, str):  # the file of a group
                    value = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            for name in reversed(key.removesuffix("+").split(".")):
                value = {name: value}
            _merge(settings, value)
    return settings


def _merge(settings: dict[str, Any], update: dict[str, Any]) -> None:
    """Merge with the arguments of a class beside its class_path; another class begins without those of the former."""
    if update.get("class_path", settings.get("class_path")) != settings.get("class_path"):
        settings.clear()
    for name, value in update.items():
        if name == "init_args" and isinstance(value, dict):
            _merge(settings, value)
        elif isinstance(value, dict):
            former = settings.get(name)
            named = {"class_path": former} if former and isinstance(former, str) else {}
            settings[name] = former if isinstance(former, dict) else named
            _merge(settings[name], value)
        else:
            settings[name] = value


def _foreign_keys(settings: dict[str, Any], place: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each argument that its class does not take, with those that it takes."""
    path = str(settings.get("class_path"))
    found = [_method(name, "__init__") for name in (path, *(f"{module}.{path}" for module in MODULES_OF_CLASSES))]
    method = next((method for _, method in filter(None, found)), None)
    taken = [] if method is None or method.args.vararg or method.args.kwarg else list(_keys_of(method))
    for name, value in settings.items():
        if taken and name not in (*taken, "class_path", "dict_kwargs"):
            yield f"{place}{name}", [f"{place}{other}" for other in taken]
        elif isinstance(value, dict):
            yield from _foreign_keys(value, f"{place}{name}.")


@cache
def read_groups() -> dict[str, dict[str, Key]]:
    """Return the keys of each group, in order; group "" has those of no class."""
    modules = ["onestage.cli.parser", "onestage.cli.commands"]
    add_ons: Sequence[str] = next(
        ast.literal_eval(node.value)
        for node in _nodes(modules[1])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN_ADD_ONS"
    )
    modules.append(next(iter(add_ons), "onestage.training.run:RunAddOn").partition(":")[0])
    groups: dict[str, dict[str, Key]] = {"": {}, **{group: _arguments(path) for group, path in CLASSES.items()}}
    groups["trainer"] |= _arguments(OWN_TRAINER)
    calls = [(module, node) for module in modules for node in _nodes(module) if isinstance(node, ast.Call)]
    for module, call in calls:
        name = getattr(call.func, "attr", "")
        words = [argument.value if isinstance(argument, ast.Constant) else argument for argument in call.args]
        values = {word.arg: word.value for word in call.keywords}
        if name == "add_argument" and "help" in values:
            groups[""][str(words[0])[2:]] = (_shown(values["default"]), str(ast.literal_eval(values["help"])))
        elif name == "add_lightning_class_args":
            groups[str(words[1])] = _arguments(f"{module}.{ast.unparse(call.args[0])}")
        elif name == "link_arguments" and str(words[1]).count(".") == 1:  # set by another key
            group, _, linked = str(words[1]).partition(".")
            groups[group].pop(linked, None)
    return groups


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return what stands before the sections, and the entries of `Args` by name."""
    description = re.split(r"^(?:Args|Returns|Raises):\s*$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    section = re.search(r"^Args:\s*\n((?:[ ]+.*\n?|\n)*)", text, flags=re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?:^ {6,}.*\n?)*)", section[1] if section else "", flags=re.MULTILINE)
    return description, {name: re.sub(r"\s+", " ", entry).strip() for name, entry in entries}


def _arguments(path: str, function: str = "__init__") -> dict[str, Key]:
    """Return the arguments of a class's method by name; none if its source is not where its name says."""
    found = _method(path, function)
    if found is None:
        return {}
    texts: dict[str, str] = {}
    for node in found:
        texts |= parse_docstring(ast.get_docstring(node) or "")[1]
    return {name: (_shown(default), texts.get(name, "")) for name, default in _keys_of(found[1]).items()}


def _keys_of(method: ast.FunctionDef) -> dict[str, ast.expr | None]:
    """Return the default of each argument, without self."""
    plain, named = method.args.args[1:], method.args.kwonlyargs
    defaults = [*[None] * (len(plain) - len(method.args.defaults)), *method.args.defaults, *method.args.kw_defaults]
    return {argument.arg: default for argument, default in zip([*plain, *named], defaults, strict=True)}


def _method(path: str, function: str) -> tuple[ast.ClassDef, ast.FunctionDef] | None:
    """Return the class of a dotted name and its own or inherited method; None where no source tells."""
    owner = _class(path)
    if owner is None:
        return None
    module, node = owner
    if methods := [entry for entry in node.body if isinstance(entry, ast.FunctionDef) and entry.name == function]:
        return node, methods[-1]  # the others are overloads
    bases = [f"{module}.{ast.unparse(base)}" for base in node.bases if not node.decorator_list]
    return next((found for base in bases if (found := _method(base, function))), None)


def _class(path: str) -> tuple[str, ast.ClassDef] | None:
    """Return the module and the source of the class that a dotted name means, also where a package re-exports it."""
    module, _, name = path.rpartition(".")
    for node in _nodes(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    imports = [node for node in _nodes(module) if isinstance(node, ast.ImportFrom)]
    for imported, origin in ((node, alias) for node in imports for alias in node.names):
        if name == (origin.asname or origin.name):
            source = _source_of(module)
            package = module if source is not None and source.stem == "__init__" else module.rpartition(".")[0]
            return _class(f"{resolve_name('.' * imported.level + (imported.module or ''), package)}.{origin.name}")
    return None


def _shown(default: ast.expr | None) -> str:
    """Return a default as it is written in YAML, "" for none or one that is no constant."""
    if not isinstance(default, ast.Constant):
        return ""
    return {"None": "null", "True": "true", "False": "false"}.get(str(default.value), str(default.value))


def _source_of(module: str) -> Path | None:
    package, *parts = module.split(".")
    places: list[Path] = []
    with suppress(ValueError):  # no name; or a script, which has no spec
        if spec := find_spec(package):  # of a package without a dot, which is found and not imported
            folders = spec.submodule_search_locations
            places = [Path(each).joinpath(*parts) for each in folders or ()] or [Path(str(spec.origin)).with_suffix("")]
    names = [(place / "__init__.pyi", place / "__init__.py", place.with_suffix(".py")) for place in places]
    return next((file for files in names for file in files if file.is_file()), None)


@cache
def _nodes(module: str) -> list[ast.AST]:
    """Return all nodes of the source of a module; none if it has none."""
    source = _source_of(module)
    return list(ast.walk(ast.parse(source.read_text(encoding="utf-8")))) if source is not None else []
