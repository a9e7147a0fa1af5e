"""Keys and configuration files: known without the parser, or refused in one line that names them."""

import re
import subprocess
import sys

import pytest

from onestage.cli.keys import help_page, read_groups, require_known_keys
from onestage.cli.main import main
from onestage.cli.messages import CONFIGS, check_config_file, files_first, find_config, shipped_configs, split_option
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
    assert len(lines) < 150
    page = "\n".join(lines)
    assert page.index("--data.batch_size 32") < page.index("--trainer.max_epochs null")
    starts = [number for number, line in enumerate(lines) if re.fullmatch(r"[a-z_]+:", line)]
    assert max(end - start for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)) <= 50
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
