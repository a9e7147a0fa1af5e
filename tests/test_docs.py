"""The code in docs/ and the commands of the README run, and the tables there agree with the code.

Commands that take long or need a GPU or data are parsed (tests/test_remedies.py) or dry-run.
"""

import math
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import onestage.errors
from onestage.cli.main import COMMANDS as TABLE, main
from onestage.data import DetectionDataModule
from onestage.data.shapes import draw_shapes
from onestage.errors import AnnotationError, OnestageError
from onestage.types import BACKGROUND, IGNORE, Targets

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_example(page: str) -> types.ModuleType:
    source = blocks(page, "python")[0]
    module = types.ModuleType("example")
    exec(compile(source, page, "exec"), module.__dict__)
    return module


def test_the_loss_of_the_docs_is_the_cross_entropy_of_positives_and_background() -> None:
    loss = run_example("add_a_loss.md").PlainCrossEntropy()
    labels = torch.tensor([[0, BACKGROUND, IGNORE]])  # the ignored anchor costs nothing
    logits = torch.zeros(1, 3, loss.num_logits(4))
    assert loss(logits, labels).item() == pytest.approx(2 * 4 * math.log(2))
    logits = torch.tensor([[[20.0, -20.0]]])  # sure of class 0
    assert loss(logits, torch.tensor([[0]])).item() == pytest.approx(0, abs=1e-6)
    assert loss(logits, torch.tensor([[BACKGROUND]])).item() == pytest.approx(20)


def test_the_model_of_the_docs_has_an_anchor_for_every_output() -> None:
    detector = run_example("add_a_model.md").SSD96(num_classes=3)
    predictions = detector(torch.zeros(2, 3, 96, 96, dtype=torch.uint8))
    num_anchors = 12 * 12 * 4 + 6 * 6 * 6 + 3 * 3 * 4 + 4
    assert predictions.anchors.boxes.shape == (num_anchors, 4)
    assert predictions.class_logits.shape == (2, num_anchors, 3)
    targets = Targets(torch.tensor([[[20.0, 20, 60, 60]], [[0.0, 0, 0, 0]]]), torch.tensor([[1], [-1]]))
    assert all(term.isfinite() for term in detector.loss(predictions, targets).terms.values())
    assert detector.detect(predictions).boxes.shape[0] == 2


@pytest.mark.slow
def test_the_model_of_the_docs_trains_from_a_file_beside_the_data(tmp_path) -> None:
    (tmp_path / "my_models.py").write_text(blocks("add_a_model.md", "python")[0], encoding="utf-8")
    (config,) = (block for block in blocks("add_a_model.md", "yaml") if "my_models" in block)
    (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
    source = "{class_path: onestage.data.Shapes, init_args: {path: shapes, num_train: 16, num_val: 4}}"
    run = "runs/mine/version_0"
    small = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    for words in (
        ["fit", "--config", "mine.yaml", "--data.source", source, "--data.batch_size", "4", *small],
        ["validate", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/best.ckpt"],
        ["doctor", "shapes", "--detector", "my_models.SSD96"],
    ):
        command = [str(Path(sys.executable).with_name("onestage")), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def csv_folder(tmp_path: Path) -> Path:
    for gray, name in enumerate(("a.png", "b.png")):
        cv2.imwrite(str(tmp_path / name), np.full((40, 60, 3), gray, dtype=np.uint8))
    lines = "a.png,1,2,11,22,dog\nb.png,,,,,\na.png,5,5,9,9,cat\n"
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(lines, encoding="utf-8")
    return tmp_path


def test_source_of_the_docs_reads_boxes_and_empty_images_and_names_the_file_of_a_wrong_line(csv_folder) -> None:
    data = DetectionDataModule(run_example("add_a_dataset.md").CSV(csv_folder), image_size=64, batch_size=2)
    annotations = data.annotations("train")
    assert data.class_names == ["cat", "dog"]
    assert annotations.box_offsets.tolist() == [0, 2, 2]
    assert annotations.boxes.tolist() == [[1, 2, 11, 22], [5, 5, 9, 9]]
    assert annotations.labels.tolist() == [1, 0]
    assert data.read_image("train", 1).shape == (40, 60, 3)
    (csv_folder / "val.csv").write_text("a.png,1,2,x,22,dog\n", encoding="utf-8")
    with pytest.raises(AnnotationError, match=r"val\.csv: must have lines"):
        run_example("add_a_dataset.md").CSV(csv_folder).read("val")


def build_data(config: dict) -> DetectionDataModule:
    """Build a data module from the `data` section of a config, as the command line does."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data")
    return parser.instantiate(parser.parse_object(config)).data


def test_every_data_section_of_the_docs_is_accepted(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onestage.data.csv_files", run_example("add_a_dataset.md"))
    sections = [yaml.safe_load(text) for page in DOCS for text in blocks(page.name, "yaml")]
    sections = [section["data"] for section in sections if "data" in section]
    for section in sections:
        assert isinstance(build_data({"data": section}), DetectionDataModule)
    assert len(sections) >= 6


@pytest.mark.parametrize("page", [path.name for path in DOCS])
def test_every_config_of_the_docs_is_yaml_and_every_file_it_points_to_exists(page) -> None:
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    named = re.findall(r"`((?:src|tests|docs|configs|scripts)/[\w./]*\w/?)`", (ROOT / "docs" / page).read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    documented = {name: int(code) for name, code in re.findall(r"^\| `(\w+Error)` \| (\d+) \|", text, re.MULTILINE)}
    kinds = {name: kind for name, kind in vars(onestage.errors).items() if isinstance(kind, type)}
    kinds.pop(OnestageError.__name__)
    assert documented == {name: kind.exit_code for name, kind in kinds.items()}


COMMANDS = [line for block in blocks("../README.md", "bash") for line in block.splitlines() if line.strip()]
DATA_COMMANDS = {"doctor", "anchors", "convert"}


def test_readme_has_only_commands_of_kinds_that_are_checked() -> None:
    assert len(COMMANDS) >= 10
    assert {command.split()[0] for command in COMMANDS} <= {"make", "onestage", "torchrun", "python"}
    used = {command.split()[1] for command in COMMANDS if command.startswith("onestage")}
    assert used <= TABLE.keys()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_commands_dry_run(command) -> None:
    words = shlex.split(command)
    done = subprocess.run([words[0], "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] in DATA_COMMANDS])
def test_data_commands_run_on_a_folder_called_mine(command, tmp_path, monkeypatch) -> None:
    draw_shapes(tmp_path / "mine", num_train=6, num_val=3, seed=0)
    shutil.rmtree(tmp_path / "mine" / "annotations")  # it is drawn in both formats; VOC's is left
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.search(r"--print_config|\.help ", command)])
def test_commands_that_print_keys_run(command, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code in (0, None)
    assert re.search(r"class_path: onestage\.models\.|--model\.detector\.", capsys.readouterr().out)


@pytest.mark.parametrize("block", blocks("../README.md", "yaml"))
def test_yaml_of_the_readme_overlays_a_shipped_experiment(block, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    mine = tmp_path / "mine.yaml"
    mine.write_text(block)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/voc_ssd300.yaml", "--config", str(mine), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["source"]["init_args"]["path"] == "mine"
    assert printed["data"]["source"]["class_path"] == yaml.safe_load(block)["data"]["source"]["class_path"]
