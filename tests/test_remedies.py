"""Every command, option, key, class and make target that a message or a page names exists and is accepted."""

import ast
import functools
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import onestage.data
import onestage.losses
import onestage.models
from onestage.cli import commands
from onestage.cli.main import COMMANDS, TRAINER
from onestage.cli.messages import CONFIGS, files_first
from onestage.cli.parser import DetectionParser, ParsingError
from onestage.cli.signature import command_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]
GROUPS = "data|model|trainer|ema|guard|best_checkpoint|last_checkpoint"
FILE = r"(?:md|json|ya?ml|safetensors|onnx|html|v2)\b"
VALUE = r"(?:{separator}(none|auto|null|true|false|-?[\d.]*\d)(?![\w-]))?"
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]*(?:\.[a-z]\w*)*)" + VALUE.format(separator="[ =]"))
DOTTED = rf"(?<![\w./-])((?:{GROUPS})\.(?!{FILE})[a-z]\w*(?:\.\w+)*)(?![\w*{{(])"
KEY = re.compile(DOTTED + VALUE.format(separator=": "))
COMMAND = re.compile(r"(?<!of )(?<!from )(?<![.\w/-])onestage ([a-z]\w*)")
CLASS = re.compile(r"(?<![\w.])(onestage(?:\.[a-z]\w*)+\.[A-Z]\w*)")
TARGET = re.compile(r"(?:`|: |^|, )make ([a-z][a-z-]*)", re.MULTILINE)
FOREIGN = {  # options of Docker, torchrun, SLURM, MLflow and pip
    "shm-size", "init", "stop-timeout", "nnodes", "nproc_per_node", "standalone", "rdzv_backend", "rdzv_endpoint",
    "signal", "nodes", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "requeue", "backend-store-uri", "upgrade",
}  # fmt: skip
ELSEWHERE = {
    *("debug", "version", "help", "print_config"),  # of every command
    "trainer.max_epoch",  # the README shows the answer to it
    "model.module.detector",  # in Python
    "data.num_classes",  # a link: counted in the annotations
    "logger",  # of a parser that builds the loggers
    *("best_checkpoint.filename", "best_checkpoint.save_last"),  # without the add-on reliability
}
UNKNOWN = ("unrecognized arguments", "is not accepted", "is not expected", "instantiatable class", "a subclass of")


def strings_of(path: Path) -> Iterator[str]:
    """Yield the string literals of a module, without docstrings; `{}` stands for each value of an f-string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, kinds) and is_documented(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def is_documented(node: Any) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr)


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Return the messages and pages with the names of their files."""
    found = [(path.name, text) for path in sorted((ROOT / "src").rglob("*.py")) for text in strings_of(path)]
    pages = [(path.name, path.read_text(encoding="utf-8")) for path in PAGES]
    return found + [(name, re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)) for name, text in pages]


def named(pattern: re.Pattern[str]) -> dict[Any, str]:
    """Return what messages and pages name -> a file that names it."""
    return {match: name for name, text in texts() for match in pattern.findall(text)}


class ParsedError(Exception):
    """Carries the parser of `fit` out of LightningCLI, before anything is built."""


@functools.cache
def parser_of(command: str) -> DetectionParser:
    def stop(_: object, parser: DetectionParser, words: list[str]) -> None:
        raise ParsedError(parser, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.DetectionCLI, "parse_arguments", stop)
        with pytest.raises(ParsedError) as stopped:
            commands.run_trainer_command([command])
    return stopped.value.args[0]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Return the keys of all commands of the trainer."""
    parsers = [(name, parser_of(name)) for name in ("fit", "predict", "losses")]
    return {action.dest for name, own in parsers for action in own._subcommands_action._name_parser_map[name]._actions}


def classes_with(argument: str) -> list[str]:
    """Return the public classes that take an argument."""
    packages = (onestage.data, onestage.losses, onestage.models)
    found = {f"{package.__name__}.{name}": getattr(package, name) for package in packages for name in package.__all__}
    libraries = {"torch.optim": ("AdamW",), "lightning.pytorch.loggers": ("MLFlowLogger", "CometLogger")}
    for module, names in libraries.items():
        found |= {f"{module}.{name}": getattr(import_module(module), name) for name in names}
    classes = {name: kind for name, kind in found.items() if inspect.isclass(kind) and not inspect.isabstract(kind)}
    return [name for name, kind in classes.items() if argument in inspect.signature(kind).parameters]


def class_words(key: str, known: set[str]) -> Iterator[list[str]]:
    """Yield choices of the classes that the parts of a key belong to."""
    parts = key.replace(".init_args", "").split(".")
    place = max((n for n in range(len(parts)) if ".".join(parts[:n]) in known), default=len(parts))
    choices: list[list[str]] = [[]]
    for n in range(place, len(parts)):
        classes = [f"--{'.'.join(parts[:n])}={name}" for name in classes_with(parts[n])]
        choices = [[*choice, word] for choice in choices for word in classes] or choices
    yield from ([], *choices)


def reason_to_refuse(parser: DetectionParser, known: set[str], key: str, value: str) -> str:
    """Return what the parser of `fit` says to a key, and to a value if there is one; empty if it is accepted."""
    key = key.removesuffix(".class_path")
    if key.replace(".init_args", "") in known and not value:
        return ""
    reason = ""
    for words in class_words(key, known):
        try:
            parser.parse_args(["fit", "--config", str(CONFIGS / "shapes_ssd.yaml"), *words, f"--{key}={value or 1}"])
        except ParsingError as error:
            reason = str(error)
            if value or any(word in reason for word in UNKNOWN):
                continue
        return ""
    return f"{key} {value}: {reason[-300:]}"


@pytest.mark.slow
def test_every_key_and_option_that_is_named_is_accepted(known):
    scripts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "scripts").glob("*.py"))
    of_functions = {
        name
        for command, (target, _) in COMMANDS.items()
        if target != TRAINER
        for action in command_parser(command, function_of(target))._actions
        for name in action.option_strings
    }
    options = {
        (name.removesuffix(".help"), value): place
        for (name, value), place in named(OPTION).items()
        if name not in FOREIGN and f"--{name}" not in of_functions and f'"--{name}"' not in scripts
    }
    keys = {key: place for key, place in (named(KEY) | options).items() if key[0] not in ELSEWHERE}
    assert len(keys) > 90
    refused = [
        f"{place}: {reason}"
        for key, place in keys.items()
        if (reason := reason_to_refuse(parser_of("fit"), known, *key))
    ]
    assert refused == []


def function_of(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def test_every_command_class_and_make_target_that_is_named_exists():
    assert {name: place for name, place in named(COMMAND).items() if name not in COMMANDS} == {}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = named(TARGET)
    assert {name: place for name, place in targets.items() if not re.search(rf"^{name}:", makefile, re.M)} == {}
    classes = named(CLASS)
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)  # some show how to write a class
    of_the_user = {name for name in classes if f"class {name.rpartition('.')[2]}(" in pages}
    assert {name: classes[name] for name in classes.keys() - of_the_user if not hasattr(*split_class(name))} == {}
    assert min(len(targets), len(classes)) > 5


def split_class(name: str) -> tuple[Any, str]:
    module, _, kind = name.rpartition(".")
    return import_module(module), kind


LINES = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in block.splitlines()
    if re.search(r"(^| )(-m )?onestage(\.cli)? ", line)
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_line_of_a_page_is_accepted_by_its_parser(page, line, tmp_path, monkeypatch):
    """Configuration files that another command writes are replaced; tests/test_docs.py runs what is short."""
    monkeypatch.chdir(tmp_path)
    Path("anchors.yaml").write_text("trainer: {max_epochs: 1}\n")
    words = shlex.split(line, comments=True)
    words = words[next(n for n, word in enumerate(words) if word in ("onestage", "onestage.cli")) + 1 :]
    command, options = words[0], words[1:]
    if COMMANDS[command][0] != TRAINER:
        command_parser(command, function_of(COMMANDS[command][0])).parse_args(options)
        return
    if {"--print_config"} & {*options} or any(option.endswith(".help") for option in options):
        return  # they end in the parser; tests/test_docs.py runs them
    if "--ckpt_path" in options:  # its configuration comes from the checkpoint
        place = options.index("--ckpt_path")
        options[place : place + 2] = ["--config", "shapes_ssd"]
    files, others = files_first(options)
    parser_of(command).parse_args([command, *(f"--config={file}" for file in files), *others])
