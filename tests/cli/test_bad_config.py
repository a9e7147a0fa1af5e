"""Configurations and command lines that cannot be: each stops with code 2 before anything is trained or written."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_line import run

from onestage.cli.messages import check_config_file
from onestage.errors import ConfigError
from onestage.reliability.checkpoints import BestCheckpoint
from onestage.training.module import DetectionModule


def complaint(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Run a command that must refuse; return what it says."""
    capsys.readouterr()
    ended = run(*words)
    text = capsys.readouterr().err
    assert ended == code, text
    assert "Traceback" not in text
    return text[text.index("error: ") :]


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (["--model.optimizer.learing_rate", "1"], "--model.optimizer.learing_rate"),
        (["--trainer.max_epoch", "1"], "trainer.max_epochs"),
        (["--data.bach_size", "1"], "batch_size"),
        (["--resum", "auto"], "resume"),
        (["--last_checkpoint.every_n_step", "1"], "every_n_steps"),
    ],
)
def test_row_60_a_misspelt_key_is_named_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, options: list[str], meant: str
) -> None:
    text = complaint(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path / "runs"))
    assert meant in text
    assert len(text.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.optimizer.lr", "-1"], "learning rate"),
        (["--model.optimizer.lr", "fast"], "lr"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--data.batch_size", "many"], "batch_size"),
        (["--data.num_workers", "-1"], "num_workers"),
        (["--model.detector.score_threshold", "2"], "score_threshold"),
        (["--last_checkpoint.every_n_steps", "-1"], "last_checkpoint.every_n_steps is -1"),
        (["--ema.decay", "1"], "ema.decay"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches must be >= 1"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be >= 0"),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "Set trainer.strategy: ddp"),
        (["--model.loss_weights.box", ".nan"], "model.loss_weights.box must be finite and >= 0, got nan."),
        (["--model.loss_weights.boxes", "1"], "model.loss_weights: a key must be a loss term of SSD160"),
        (["--data.batch_size", "four"], "error: --data.batch_size: Expected a int. Got value: four"),
        (["--data.cache", "disc"], "error: --data.cache: Expected a value of 'none', 'disk', 'ram'. Got value: disc"),
        (["--seed_everything=-1"], "error: seed_everything is -1; it must be a whole number"),
        (["--seed_everything", "4294967296"], "error: seed_everything is 4294967296; it must be a whole number"),
        (["--seed_everything", "true"], "error: seed_everything is True; it must be a whole number"),
    ],
)
def test_row_61_a_value_of_the_wrong_type_or_range_stops_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, options: list[str], named: str
) -> None:
    text = complaint(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path / "runs"))
    assert named in text
    assert list((tmp_path / "runs").rglob("*.ckpt")) == []


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["fit", "--data.source.path", "mine"], "data"),
        (["predict", "--data.predict_dir=photos"], "data"),
        (["fit", "--model.detector.prior", "0.1"], "model.detector"),
    ],
)
def test_a_key_of_a_class_that_nothing_names_asks_for_the_class(
    capsys: pytest.CaptureFixture[str], words: list[str], key: str
) -> None:
    assert complaint(capsys, *words).startswith(f"error: nothing says which {key} to use. Give an experiment")


LOSS = "model.detector.init_args.classification_loss"
EFFECTIVE = "{class_path: onestage.losses.EffectiveNumberWeights, init_args: {beta: 2}}"
BAD_LOSSES = [
    (
        [f"--{LOSS}.init_args.alpha", "2"],
        f"{LOSS}.init_args.alpha is 2.0; the weight of positives lies in 0..1.\n"
        "RetinaNet's is alpha: 0.25; alpha: null weighs positives and negatives alike",
    ),
    (
        [f"--{LOSS}.init_args.class_weights", EFFECTIVE],  # not the first type of its union
        f"{LOSS}.init_args.class_weights.init_args.beta is 2.0; it must be in 0..1, without 1.\n"
        "The paper's are 0.9, 0.99, 0.999 and 0.9999",
    ),
    (
        [f"--{LOSS}.init_args.class_weights", "[1,2,3,4,5,-1]"],
        f"{LOSS}.init_args.class_weights is [1.0, 2.0, 3.0, 4.0, 5.0, -1.0]; each must be a number >= 0, and one of "
        "them more than 0.\nTo have them computed: class_weights: {class_path: onestage.losses.EffectiveNumberWeights}",
    ),
    (
        [f"--{LOSS}.init_args.class_weights", "[1,2,3,4,5,.nan]"],
        f"--{LOSS}.init_args.class_weights: nan is no finite number or Not a valid subclass of ClassWeights; got "
        "[1.0, 2.0, 3.0, 4.0, 5.0, 'nan'] (all keys: onestage fit --help)",
    ),
    (
        [f"--{LOSS}", "onestage.losses.FocalLoss"],
        "classification_loss: there is no class onestage.losses.FocalLoss; there are AutomatedFocalLoss, "
        "MinedCrossEntropy, OHEMCrossEntropy, QualityFocalLoss, SigmoidCrossEntropy, SigmoidFocalLoss, "
        "SoftmaxCrossEntropy, SoftmaxFocalLoss, VarifocalLoss (all keys: onestage fit --help)",
    ),
    (
        ["--model.detector.box_loss", "onestage.losses.IoU"],
        "box_loss: there is no class onestage.losses.IoU; there are CIoULoss, DIoULoss, GIoULoss, L1Loss, SmoothL1Loss "
        "(all keys: onestage fit --help)",
    ),
    (
        ["--model.detector.box_loss", "onestage.losses.SmoothL1Loss", "--model.detector.box_loss.init_args.beta", "-1"],
        "model.detector.init_args.box_loss.init_args.beta is -1.0; it must be a number, at least 0.\n"
        "SSD's is beta: 1.0",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_LOSSES)
def test_row_61_of_a_loss_that_cannot_be_the_reason_comes_alone_with_its_key(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, options: list[str], message: str
) -> None:
    text = complaint(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path / "runs"))
    assert text == f"error: {message}\n"
    assert not (tmp_path / "runs").exists()


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    with pytest.raises(SystemExit):
        run("fit", *words, "--print_config")
    return dict(yaml.safe_load(capsys.readouterr().out))


def test_row_62_a_number_that_yaml_takes_for_a_word_is_a_number(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("trainer: {gradient_clip_val: 1e-4}\n")
    assert printed_config(capsys, *fast_options, "--config", str(file))["trainer"]["gradient_clip_val"] == 1e-4


def test_row_62_a_class_called_no_has_to_be_quoted(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("data: {init_args: {class_names: [no, dog], category_ids: [1, 2]}}\n")
    text = complaint(capsys, "fit", *fast_options, "--config", str(file), "--runs_dir", str(tmp_path / "runs"))
    assert "class_names" in text


def alias_bomb() -> str:
    levels = [f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, 12)]
    return "\n".join(["l0: &l0 [1, 2, 3]", *levels])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("seed_everything: 1\nseed_everything: 2\n", ":2:1: the key 'seed_everything' stands here twice"),
        ("trainer:\n\tmax_epochs: 1\n", ":2:1"),
        (alias_bomb(), "values when its aliases are written out"),
        ("a: &a [*a]\n", "recursive"),
        ("model: [\n", ":2:1"),
        ("", "is empty"),
        ("- 1\n", "holds a list"),
        ("a: !!python/object/apply:os.system ['touch canary']\n", "could not determine a constructor"),
    ],
)
def test_row_62_a_file_that_is_no_configuration_is_named_with_its_line(
    tmp_path: Path, content: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as stopped:
        check_config_file(str(file))
    assert named in str(stopped.value)
    assert str(file) in str(stopped.value)
    assert not (tmp_path / "canary").exists()


def test_row_63_classes_that_are_not_those_of_the_annotations_are_refused_with_both_lists(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    options = ["--data.class_names=[cat,dog]", "--data.category_ids=[1,2]", "--runs_dir", str(tmp_path)]
    text = complaint(capsys, "fit", *fast_options, *options, code=3)
    assert "dog" in text
    assert "circle" in text


def test_row_63_the_number_of_classes_is_the_datas_to_say(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    options = ["--model.detector.num_classes", "3", "--runs_dir", str(tmp_path)]
    assert "num_classes" in complaint(capsys, "fit", *fast_options, *options)


PAYLOADS = [
    ("--model.optimizer", "os.system"),
    ("--model.optimizer", "subprocess.run"),
    ("--model.optimizer", "builtins.exec"),
    ("--model.optimizer", "torch.hub.load"),
    ("--model.optimizer", "torch.load"),
    ("--model.optimizer", "torch.serialization.load"),
    ("--model.optimizer", "pathlib.Path.write_text"),
    ("--model.detector", "os.system"),
    ("--model.detector", "pickle.loads"),
    ("--data", "shutil.rmtree"),
    ("--data.train_transforms", '[{"class_path": "os.system", "init_args": {"command": "touch canary"}}]'),
    ("--trainer.callbacks", '[{"class_path": "subprocess.Popen", "init_args": {"args": "touch canary"}}]'),
    ("--trainer.logger", '{"class_path": "os.system", "init_args": {"command": "touch canary"}}'),
]


@pytest.mark.parametrize(("key", "payload"), PAYLOADS)
def test_row_64_a_configuration_that_names_a_way_to_run_commands_is_refused(
    capsys: pytest.CaptureFixture[str],
    fast_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    payload: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: (tmp_path / "canary").touch())
    complaint(capsys, "fit", *fast_options, key, payload, "--runs_dir", str(tmp_path / "runs"))
    assert not (tmp_path / "canary").exists()


def test_row_64_a_detector_of_the_users_own_module_is_still_welcome(
    fast_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text("from onestage.models import SSD160\nclass Mine(SSD160):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--model.detector", "my_models.Mine", "--trainer.fast_dev_run", "true", "--runs_dir", str(tmp_path)]
    assert run("fit", *fast_options, *options) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--resume", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--resume", "auto", "--ckpt_path", "nowhere.ckpt"], "say two things"),
        (["--trainer.precision", "half"], "trainer.precision"),
        pytest.param(
            ["--trainer.accelerator", "cuda", "--trainer.devices", "4"],
            "CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_row_65_what_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, options: list[str], named: str
) -> None:
    assert named in complaint(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path / "runs"))


def test_row_65_a_metric_that_no_validation_logs_is_named_before_an_epoch_is_trained(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DetectionModule, "training_step", lambda *_: pytest.fail("trained"))
    options = ["--best_checkpoint.monitor", "val/map", "--runs_dir", str(tmp_path / "runs")]
    text = complaint(capsys, "fit", *fast_options, *options)
    assert "best_checkpoint.monitor is val/map, which the validation does not log" in text
    assert ", val/mAP," in text
    assert "val/loss" in text


@pytest.mark.parametrize("monitor", ["val/AP50", "train/loss", "val/my_own"])
def test_row_65_a_metric_of_the_validation_or_of_the_users_own_is_not_refused(monitor: str) -> None:
    trainer = SimpleNamespace(callback_metrics={"val/AP50": 0.0, "val/my_own": 0.0, "lr": 0.0})
    BestCheckpoint(monitor).on_sanity_check_end(trainer, None)


def test_row_66_a_run_folder_that_is_a_file_is_named(
    capsys: pytest.CaptureFixture[str], fast_options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "runs").touch()
    text = complaint(capsys, "fit", *fast_options, "--runs_dir", str(tmp_path / "runs"))
    assert f"the run folder {tmp_path / 'runs'}" in text
    assert "--runs_dir" in text


def test_row_66_resuming_with_another_configuration_begins_a_new_run_and_says_why(
    trained: Path, fast_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = trained.parents[1]
    options = ["--resume", "auto", "--model.loss_weights.box", "0.5", "--trainer.limit_train_batches", "1"]
    assert run("fit", *fast_options, *options, "--runs_dir", str(runs)) == 0
    said = capsys.readouterr().err
    assert f"not {trained}, because it had model.loss_weights.box 0.2, now 0.5" in said
    assert {path.name for path in trained.parent.iterdir()} == {"version_0", "version_1"}
    shutil.rmtree(trained.parent / "version_1")
