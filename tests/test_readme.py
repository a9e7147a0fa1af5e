"""Every command of the README is run, or, where it takes long or needs a GPU or data, parsed or dry-run."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from onestage.cli.main import COMMANDS as TABLE, main
from onestage.data.shapes import draw_shapes

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DATA_COMMANDS = {"doctor", "anchors", "convert"}
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]


def test_readme_has_only_commands_of_kinds_that_are_checked() -> None:
    assert len(COMMANDS) >= 10
    assert {command.split()[0] for command in COMMANDS} <= {"make", "onestage", "torchrun", "python"}
    used = {command.split()[1] for command in COMMANDS if command.startswith("onestage")}
    assert used <= TABLE.keys()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_commands_dry_run(command) -> None:
    words = shlex.split(command)
    done = subprocess.run([words[0], "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] in DATA_COMMANDS])
def test_data_commands_run_on_a_folder_called_mine(command, tmp_path, monkeypatch) -> None:
    draw_shapes(tmp_path / "mine", num_train=6, num_val=3, seed=0)
    shutil.rmtree(tmp_path / "mine" / "annotations")  # it is drawn in both formats; VOC's is left
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.search(r"--print_config|\.help ", command)])
def test_commands_that_print_keys_run(command, monkeypatch, capsys) -> None:
    """tests/test_remedies.py parses all others."""
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code in (0, None)
    assert re.search(r"class_path: onestage\.models\.|--model\.detector\.", capsys.readouterr().out)


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "yaml"])
def test_yaml_of_the_readme_overlays_a_shipped_experiment(block, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY)
    mine = tmp_path / "mine.yaml"
    mine.write_text(block)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/voc_ssd300.yaml", "--config", str(mine), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["source"]["init_args"]["path"] == "mine"
    assert printed["data"]["source"]["class_path"] == yaml.safe_load(block)["data"]["source"]["class_path"]
