"""Keys that are read from the source are those of the parser."""

import re
import subprocess
import sys

import pytest

from onestage.cli.keys import help_page, read_groups, require_known_keys
from onestage.cli.main import main
from onestage.cli.messages import shipped_configs
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
    ("word", "meant"),
    [
        ("--trainer.max_epoch", "trainer.max_epochs"),
        ("--runs-dir", "runs_dir"),
        ("--model.detector.init_args.box_los", "model.detector.box_loss"),  # inherited from SSD
        ("--model.detector.classification_loss.init_args.gama", "model.detector.classification_loss.gamma"),
        ("--model.optimizer.init_args.weight-decay", "model.optimizer.weight_decay"),  # a class of a library
        ("--data.source.init_args.max_object", "data.source.max_objects"),
        ("--trainer.logger=CSVLogger --trainer.logger.nam", "trainer.logger.name"),
        ("--trainer.callbacks=EarlyStopping --trainer.callbacks.monitr", "trainer.callbacks.monitor"),
        ("--model.detector=YOLOv3 --model.detector.ignore_io", "model.detector.ignore_iou"),
    ],
)
def test_mistyped_key_is_refused_with_the_nearest_before_anything_is_imported(word, meant):
    typed = word.split()[-1].partition("=")[0]
    words = ["--config", "shapes_ssd", *word.split(), "3"]
    with pytest.raises(ConfigError, match=rf"^unknown key {typed}; did you mean {meant}\?"):
        require_known_keys("fit", words)
    code = "import sys; from onestage.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    if word == "--model.detector.init_args.box_los":
        assert subprocess.run([sys.executable, "-c", code, "fit", *words], stderr=subprocess.DEVNULL).returncode == 0


def test_mistyped_key_of_a_class_in_a_file_is_refused(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model: {detector: {init_args: {classification_loss: {init_args: {alpa: 0.5}}}}}", "utf-8")
    with pytest.raises(ConfigError, match=r"^unknown key model\.detector\.classification_loss\.alpa; did you mean"):
        require_known_keys("fit", ["--config", "shapes_ssd", f"--config={overlay}"])
    require_known_keys("fit", ["--config", str(overlay)])  # the class is not known here
    overlay.write_text("{image_size: 64, val_fractio: 0.1}", "utf-8")
    with pytest.raises(ConfigError, match=r"^unknown key data\.val_fractio; did you mean data\.val_fraction"):
        require_known_keys("fit", ["--config", "shapes_ssd", "--data", str(overlay), "--data.batch_size", "4"])
    overlay.write_text("image_size: 64", "utf-8")
    require_known_keys("fit", ["--config", "shapes_ssd", "--data", str(overlay), "--data.batch_size", "4"])


UNREAD = [  # classes of the user, whose keys are left to the parser
    *("--data.source.path=x", "--model.detector.init_args.priors", "0.5", "--trainer.callbacks+=Timer"),
    *("--model.detector", "not.here.Detector", "--model.detector.of_a_library", "1"),
    *("--model.optimizer", "__main__.Mine", "--model.optimizer.lr", "1"),  # of a script
    *("--trainer.logger.save_dir", "x", "--data.source.help", "-1", "--seed_everything=1"),
]
ANOTHER = ["--model.detector.prior", "0.1", "--model.detector", "YOLOv3", "--model.detector.ignore_iou", "0.5"]
WHOLE = ["--data.source={class_path: YOLO, init_args: {path: x}}", "--data.source.path", "y"]


@pytest.mark.parametrize("words", [*(["--config", name, *ANOTHER] for name in shipped_configs()), UNREAD, WHOLE])
def test_keys_of_shipped_configs_of_another_class_and_of_unread_classes_are_accepted(words):
    require_known_keys("fit", words)
