"""Bad configurations and command lines: each stops with code 2 and one message before anything is trained."""

import pytest
import torch
import yaml
from command_line import message_of, run

from onestage.training.module import DetectionModule

LOSS = "model.detector.init_args.classification_loss"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "Did you mean: onestage fit"),
        (["fit"], "model.detector: missing. Give an experiment, --config shapes_ssd"),
        (["fit", "--trainer.max_epoch", "1"], "did you mean trainer.max_epochs"),
        (["fit", "--config", "nowhere.yaml"], "No such file"),
        (["predict", "--ckpt_path", "configs"], "is a folder"),
        (["validate", "--config", "shapes_ssd"], "--ckpt_path"),  # random weights
    ],
)
def test_unusable_command_line_ends_in_one_message(capsys, words, expected):
    text = message_of(capsys, *words)
    assert expected in text
    assert len(text.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--experiment", "../../x"], "experiment must be one folder name"),
        (["--experiment", "red\x1b[31m", "--resume", "auto"], "experiment must be one folder name"),
        (["--best_checkpoint.monitor", "val/map"], "best_checkpoint.monitor"),
        (["--best_checkpoint.monitor", "val/map"], "val/mAP"),  # what it may be
        (["--model.optimizer.lr", "-1"], "model.optimizer cannot be built: Invalid learning rate"),
        (["--data.batch_size", "four"], "data.batch_size: must be int, got four"),
        (["--trainer.logger", "CSVLogge"], "trainer.logger: unknown class CSVLogge; did you mean CSVLogger"),
        (["--data.image_size", "300"], "Set data.image_size: "),
        (["--trainer.default_root_dir", "x"], "trainer.default_root_dir must be null, got 'x'.\nSet runs_dir"),
        (["--trainer.barebones", "true"], "trainer.barebones must be false"),
        (["--trainer.callbacks", "EarlyStoping"], "unknown class EarlyStoping; did you mean EarlyStopping"),
        (["--trainer.callbacks+=EarlyStopping"], "monitor"),
        (["--model.optimizer", "torch.optim.Adm"], "unknown class torch.optim.Adm; did you mean Adam"),
        (["--model.optimizer.lr", "abc"], "must be a finite number, got abc"),
        (["--model.detector.score_threshold", "2"], "score_threshold must be in [0, 1), got 2.0"),
        (["--seed_everything", "true"], "seed_everything must be a whole number in [0, 4294967295], got True"),
        ([f"--{LOSS}", "onestage.losses.FocalLoss"], "unknown class onestage.losses.FocalLoss; did you mean"),
        (["--model.detector.num_classes", "3"], "num_classes"),
        (["--resume", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        pytest.param(
            ["--trainer.accelerator", "cuda", "--trainer.devices", "4"],
            "CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_unusable_value_is_named_and_nothing_trained(capsys, fast_options, tmp_path, monkeypatch, options, named):
    monkeypatch.setattr(DetectionModule, "training_step", lambda *_: pytest.fail("trained"))
    text = message_of(capsys, "fit", *fast_options, *options, "--runs_dir", str(tmp_path / "a" / "runs"))
    assert named in text
    assert "\x1b" not in text
    assert list(tmp_path.rglob("*.ckpt")) == []
    assert options[0] != "--experiment" or list(tmp_path.iterdir()) == []


def test_number_that_yaml_reads_as_text_is_converted(capsys, fast_options, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("trainer: {gradient_clip_val: 1e-4}\n")
    with pytest.raises(SystemExit):
        run("fit", *fast_options, "--config", str(file), "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["gradient_clip_val"] == 1e-4


def test_classes_other_than_those_of_the_annotations_are_rejected_with_both_lists(capsys, fast_options, tmp_path):
    options = ["--data.class_names=[cat,dog]", "--data.category_ids=[1,2]", "--runs_dir", str(tmp_path)]
    text = message_of(capsys, "fit", *fast_options, *options, code=3)
    assert "dog" in text
    assert "circle" in text
