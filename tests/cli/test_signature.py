from pathlib import Path
from typing import Literal

import pytest

from onestage.cli.signature import run_function
from onestage.errors import ConfigError

calls: list[dict[str, object]] = []


def paint(
    paths: list[Path],
    *,
    to: Literal["red", "blue"],
    names: list[str] | None = None,
    dry: bool = False,
    share: float = 0.5,
) -> int:
    """Paint files.

    Nothing is overwritten.

    Args:
        paths: files to paint;
            several are allowed.
        to: the colour.

    Raises:
        ConfigError: never.
    """
    calls.append({"paths": paths, "to": to, "names": names, "dry": dry, "share": share})
    return 3


def test_words_become_typed_arguments_and_the_result_is_the_exit_code():
    calls.clear()
    assert run_function("paint", paint, ["--dry", "a", "b", "--to", "red", "--names", "x", "y"]) == 3
    expected = {"paths": [Path("a"), Path("b")], "to": "red", "names": ["x", "y"], "dry": True, "share": 0.5}
    assert calls == [expected]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a", "--to", "green"], "--to: Expected a Literal"),
        (["--to", "red"], "the following arguments are required: paths"),
        (["a", "--to", "red", "--share", "half"], "--share: Expected a float. Got value: half"),
        (["a", "--to", "red", "--shar", "1"], "unrecognized arguments: --shar 1"),
    ],
)
def test_bad_words_end_in_one_message_with_the_reason(words, reason):
    with pytest.raises(ConfigError) as caught:
        run_function("paint", paint, words)
    assert reason in str(caught.value)
    assert str(caught.value).endswith("See: onestage paint --help")


def test_help_shows_the_docstring_and_the_argument_lines(capsys):
    with pytest.raises(SystemExit):
        run_function("paint", paint, ["--help"])
    printed = capsys.readouterr().out
    assert "Paint files.\n\nNothing is overwritten." in printed
    assert "files to paint; several are allowed." in printed
    assert "Raises" not in printed
