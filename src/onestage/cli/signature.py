"""Command lines made from the signatures and docstrings of functions."""

import inspect
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from onestage.cli.keys import parse_docstring
from onestage.errors import ConfigError

CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the line breaks of the description; print defaults."""


class CommandParser(ArgumentParser):
    """A parser that raises ConfigError instead of printing its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise with the reason in one line."""
        text = re.sub(r'Parser key "(\w+)":\s*', r"--\1: ", message).replace("typing.", "")
        text = " ".join(CLASS.sub(r"\1", text).split())
        raise ConfigError(f"{self.prog}: {text}.\nSee: {self.prog} --help") from ex

    def format_help(self, *arguments: Any) -> str:
        """Return the help; types by their plain names."""
        return CLASS.sub(r"\1", super().format_help(*arguments))


def run_function(command: str, function: Callable[..., int], words: Sequence[str]) -> int:
    """Call a function with arguments from the command line; return its exit code. ConfigError if they do not fit.

    Positional-or-keyword parameters without a default become positionals, keyword-only ones become options, booleans
    become --flag and --no_flag, and lists take several values. The docstring is the help.
    """
    return function(**vars(command_parser(command, function).parse_args(list(words))))


def command_parser(command: str, function: Callable[..., int]) -> CommandParser:
    """Return the parser of a command, made from a function's signature and docstring."""
    description, help_by_name = parse_docstring(inspect.getdoc(function) or "")
    parser = CommandParser(
        prog=f"onestage {command}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        is_required = parameter.default is inspect.Parameter.empty
        is_positional = is_required and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        settings: dict[str, Any] = {"help": help_by_name.get(name, ""), "type": hints[name]}
        for option in (hints[name], *get_args(hints[name])):
            if get_origin(option) is list:  # list[T], or list[T] | None
                settings |= {"nargs": "+", "type": get_args(option)[0], "action": "extend"}  # also of repeated options
        if hints[name] is bool:  # no value: the next word may be a positional
            del settings["type"]
            settings["action"] = ActionYesNo(yes_prefix="", no_prefix="no_")
        if not is_required:
            settings["default"] = parameter.default
        elif not is_positional:
            settings["required"] = True
        parser.add_argument(name if is_positional else f"--{name}", **settings)
    return parser
