"""Keys of the trainer commands, read from source files: their help and a mistyped key need no import of torch."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from onestage.cli.messages import explain
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
    "max_steps": "or optimizer steps; -1: as many as the epochs have",
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
    common = {name: (trainer[name][0], text) for name, text in COMMON.items() if name in trainer}
    for group, keys in {**groups, "trainer": common}.items():
        lines += ["", f"{group or 'run'}:"]
        for name, (default, text) in keys.items():
            key = f"  --{f'{group}.' if group else ''}{name} {default}"
            lines.append(f"{key:<38} {textwrap.shorten(text, width - 39, placeholder=' ...')}".rstrip())
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
    """Raise ConfigError for an option that is neither a key nor inside one; the keys of classes are not known here."""
    groups = read_groups()
    known = OF_LIGHTNING | {f"{group}.{name}" if group else name for group, keys in groups.items() for name in keys}
    known |= set(_arguments(OWN_TRAINER, command))
    known |= {group for group in groups if group}
    opaque = {group for group, keys in groups.items() if group and not keys}  # of a library's class
    for word in options:
        key = word[2:].partition("=")[0].removesuffix("+")
        parents = {key[: dot.start()] for dot in re.finditer(r"\.", key)}
        is_inside = parents & (known - groups.keys() | opaque)
        if word.startswith("--") and key not in known and not is_inside and not key.endswith(".help"):
            raise ConfigError(explain(f"unrecognized arguments: --{key}", command, options, sorted(known)))


@cache
def read_groups() -> dict[str, dict[str, Key]]:
    """Return the keys of each group, in order; group "" has those of no class."""
    folder = Path(__file__).parent
    trees = [_parse(folder / "parser.py"), _parse(folder / "commands.py")]
    add_ons: Sequence[str] = next(
        ast.literal_eval(node.value)
        for node in trees[1].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN_ADD_ONS"
    )
    trees.append(_parse(_source_of(next(iter(add_ons), "onestage.training.run:RunAddOn").partition(":")[0])))
    groups: dict[str, dict[str, Key]] = {"": {}, **{group: _arguments(path) for group, path in CLASSES.items()}}
    groups["trainer"] |= _arguments(OWN_TRAINER)
    for tree in trees:
        origins = {
            alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for name, call in _calls(tree):
            words = [argument.value if isinstance(argument, ast.Constant) else argument for argument in call.args]
            values = {word.arg: word.value for word in call.keywords}
            if name == "add_argument" and "help" in values:
                groups[""][str(words[0])[2:]] = (_shown(values["default"]), str(ast.literal_eval(values["help"])))
            elif name == "add_lightning_class_args":
                groups[str(words[1])] = _arguments(origins[ast.unparse(call.args[0])])
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
    """Return the arguments of a method by name; none if its source is not where its name says."""
    module, _, name = path.rpartition(".")
    source = _source_of(module)
    if not source.is_file():
        return {}
    owners = [node for node in _parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    methods = [node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)]
    method = next((node for node in methods if node.name == function), None)
    if method is None:
        return {}
    texts: dict[str, str] = {}
    for node in (owners[0], method):
        texts |= parse_docstring(ast.get_docstring(node) or "")[1]
    plain = [None] * (len(method.args.args) - len(method.args.defaults)) + method.args.defaults
    pairs = [
        *zip(method.args.args, plain, strict=True),
        *zip(method.args.kwonlyargs, method.args.kw_defaults, strict=True),
    ]
    return {argument.arg: (_shown(default), texts.get(argument.arg, "")) for argument, default in pairs[1:]}


def _shown(default: ast.expr | None) -> str:
    """Return a default as it is written in YAML, "" for none or one that is no constant."""
    if not isinstance(default, ast.Constant):
        return ""
    return {"None": "null", "True": "true", "False": "false"}.get(str(default.value), str(default.value))


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node


def _source_of(module: str) -> Path:
    package, *parts = module.split(".")
    spec = find_spec(package)  # of a package without a dot, which is found and not imported
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders or [""]))).joinpath(*parts).with_suffix(".py")


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
