from pathlib import Path

import lightning.pytorch.loggers  # noqa: F401 # its classes are suggested
import pytest

from onestage.cli.messages import check_config_file, explain, files_first, option_values
from onestage.errors import ConfigError

KEYS = ["trainer.max_epochs", "model.detector", "data"]


def test_unknown_key_is_quoted_as_typed_with_the_nearest_known_key() -> None:
    text = explain("unrecognized arguments: --trainer.max_epoch 1", "fit", ["--trainer.max_epoch", "1"], KEYS)
    assert text == "unknown key --trainer.max_epoch; did you mean trainer.max_epochs? (all keys: onestage fit --help)"


def test_unknown_constructor_argument_suggests_one_of_the_configured_classes(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {optimizer: {class_path: torch.optim.SGD}}")
    options = ["--config", str(config), "--model.optimizer.momentun=0.9"]
    assert "did you mean momentum?" in explain("Option 'momentun' is not accepted", "fit", options, KEYS)


def test_wrong_type_of_a_union_reports_the_expected_type_and_the_value() -> None:
    message = """Parser key "trainer.max_epochs":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x"""
    assert explain(message, "fit", [], KEYS).startswith("trainer.max_epochs: must be an int, got x (")


def test_key_beside_class_path_is_sent_to_init_args() -> None:
    text = explain("Parser key \"data\":\n  Errors:\n    - Option 'class_path' is not accepted", "fit", [], KEYS)
    assert text.startswith("data: the keys of a class stand under init_args: ")


def test_wrong_type_inside_a_class_reports_the_inner_key() -> None:
    message = """Parser key "data":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.datamodule.LightningDataModule'>, <class 'NoneType'>]
  Errors:
    - Parser key "batch_size":
        Expected a <class 'int'>. Got value: four
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'onestage.data.VOC', 'init_args': {'batch_size': 'four'}}"""
    assert explain(message, "fit", [], KEYS) == (
        "data.batch_size: must be an int, got four (all keys: onestage fit --help)"
    )


UNION_OF_LOGGERS = """Parser key "trainer.logger":
  - Expected a path but CSVLogge either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Errors:
    - Expected a dot import path string: CSVLogge
    - Expected a <class 'bool'>
  Given value: CSVLogge"""
LOGGER_WITHOUT_FOLDER = """Parser key "trainer.logger":
  Errors:
    - Problem with class: the following arguments are required: save_dir
    - Expected a <class 'bool'>
  Given value: Namespace(class_path='lightning.pytorch.loggers.CSVLogger', init_args=Namespace(save_dir=None))"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (UNION_OF_LOGGERS, "trainer.logger: unknown class CSVLogge; did you mean CSVLogger?"),
        (
            LOGGER_WITHOUT_FOLDER,
            "trainer.logger: lightning.pytorch.loggers.CSVLogger needs save_dir. Set trainer.logger.save_dir",
        ),
    ],
)
def test_lightning_loggers_get_the_same_rewrites_as_our_classes(message: str, expected: str) -> None:
    assert explain(message, "fit", [], KEYS).startswith(expected)


def test_option_values_reads_space_and_equals_forms() -> None:
    assert option_values(["--config", "a", "--x", "1", "--config=b"], "--config", "-c") == ["a", "b"]
    assert option_values(["--config"], "--config") == []


def test_files_first_moves_config_files_before_options() -> None:
    words = ["--ckpt_path", "a.ckpt", "--config", "x.yaml", "--config=y.yaml", "--seed_everything=1"]
    expected = ["--config", "x.yaml", "--config=y.yaml", "--ckpt_path", "a.ckpt", "--seed_everything=1"]
    assert files_first(words) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"just text", "holds a str"),
        (b"- 1\n", "holds a list"),
        (b"model:\n\tx: 1\n", r":2:1: .*indent with spaces"),
        (b"trainer: {devices: 1}\ntrainer: {devices: 2}\n", r"bad.yaml:2:1: duplicate key 'trainer'"),
        (b"a: [1, 2", r"bad.yaml:"),
        (b"a: \xff\xfe", "is not UTF-8"),
        (b"a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_bad_config_file_is_reported_with_line_and_rule(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        check_config_file(str(file))
    assert "bad.yaml" in str(caught.value)


def test_missing_config_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "voc_ssd300.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"Did you mean .*voc_ssd300\.yaml"):
        check_config_file(str(tmp_path / "voc_ssd30.yaml"))
    with pytest.raises(ConfigError, match="is a folder"):
        check_config_file(str(tmp_path))
