"""Keys that are read from the source are those of the parser."""

import re

import pytest

from onestage.cli.keys import help_page, read_groups, require_known_keys
from onestage.cli.main import main
from onestage.errors import ConfigError


@pytest.mark.parametrize("command", ["fit", "losses"])
def test_every_key_of_the_parser_is_known_and_every_known_key_is_one(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help", "all"])
    parsed = set(re.findall(r"^  (?:-\w, )?--([\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(parsed) > 100
    require_known_keys(command, [f"--{key}" for key in parsed])
    known = {f"{group}.{name}" if group else name for group, keys in read_groups().items() for name in keys}
    assert known <= parsed


def test_help_is_short_and_begins_with_the_keys_of_the_project(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["fit", "--config", "shapes_ssd", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 120
    page = "\n".join(lines)
    assert page.index("--data.batch_size 32") < page.index("--trainer.max_epochs null")
    starts = [number for number, line in enumerate(lines) if re.fullmatch(r"[a-z_]+:", line)]
    assert max(end - start for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)) <= 30
    assert "--split val" in help_page("losses") and "--ckpt_path PATH" in help_page("validate")


@pytest.mark.parametrize(
    "word", ["--trainer.max_epoch", "--trainr.max_epochs", "--data.batchsize=4", "--runs-dir", "--model.detectr.width"]
)
def test_mistyped_key_is_refused_with_the_nearest(word):
    with pytest.raises(ConfigError, match=rf"^unknown key {word.partition('=')[0]}; did you mean [\w.]+\?"):
        require_known_keys("fit", ["--config", "shapes_ssd", word, "3"])


def test_keys_of_classes_are_left_to_the_parser():
    words = ["--data.source.path=x", "--model.detector.init_args.prior", "0.5", "--trainer.callbacks+=Timer"]
    require_known_keys(
        "fit", [*words, "--trainer.logger.save_dir", "x", "--data.source.help", "-1", "--seed_everything=1"]
    )
