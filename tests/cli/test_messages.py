"""Messages about configuration files and the command line, as one line with the key."""

import pytest

from onestage.cli.messages import CONFIGS, check_config_file, files_first, find_config, split_option
from onestage.errors import ConfigError


def test_config_files_are_found_in_any_form_and_the_other_options_keep_their_order():
    words = ["--ckpt_path", "a.ckpt", "--config", "x.yaml", "--config=y.yaml", "-c", "z.yaml", "--data.fold", "-1"]
    assert files_first(words) == (["x.yaml", "y.yaml", "z.yaml"], ["--ckpt_path", "a.ckpt", "--data.fold", "-1"])
    assert split_option([*words, "--ckpt_path=b.ckpt", "--ckpt_path"], "--ckpt_path")[0] == ["a.ckpt", "b.ckpt"]


ALIASES = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
ALIAS_BOMB = "\n".join(["l0: &l0 [1, 2, 3]", *ALIASES]).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"model:\n\tx: 1\n", r":2:1: .*indent with spaces"),
        (b"trainer: {devices: 1}\ntrainer: {devices: 2}\n", r"bad.yaml:2:1: duplicate key 'trainer'"),
        (b"trainer: {callbacks: &a [*a]}\n", "through its aliases"),
        (ALIAS_BOMB, "values through its aliases"),
        (b"a: \xff\xfe", "is not UTF-8"),
        (b"a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_bad_config_file_is_reported_with_line_and_rule(tmp_path, content, expected):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        check_config_file(str(file))
    assert "bad.yaml" in str(caught.value)


def test_config_that_ships_is_found_by_name_in_any_folder_and_the_nearest_name_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for typed in ("shapes_ssd", "configs/shapes_ssd.yaml", "shapes_ssd.yaml"):
        assert files_first(["--config", typed]) == ([str(CONFIGS / "shapes_ssd.yaml")], [])
    assert find_config("compare/mining") == str(CONFIGS / "compare" / "mining.yaml")
    for typed in ("../pyproject", "nowhere", "x" * 5000, "compare", ""):
        assert find_config(typed) == typed
    (tmp_path / "shapes_ssd").write_text("")  # the user's own file comes first
    assert find_config("shapes_ssd") == "shapes_ssd"
    with pytest.raises(ConfigError, match=r"Shipped are: (.*, )?shapes_ssd, "):
        check_config_file("nowhere")
    (tmp_path / "voc_ssd300.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"Did you mean .*voc_ssd300\.yaml"):
        check_config_file(str(tmp_path / "voc_ssd30.yaml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        check_config_file(str(tmp_path))
