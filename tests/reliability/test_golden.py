"""Checkpoints of every release can be read, resumed and shared by this version."""

import json
import re
import shutil
from pathlib import Path

import golden
import pytest
import yaml
from tiny_run import onestage

from onestage import __version__
from onestage.reliability.checkpoints import read_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:Checkpoint directory")]
CHECKPOINTS = sorted(golden.GOLDEN.glob("*.ckpt"))
each_release = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[path.stem for path in CHECKPOINTS])


def test_this_version_has_its_checkpoint_and_all_are_small():
    assert re.split(r"\.dev|\+", __version__)[0] in {path.stem for path in CHECKPOINTS}
    assert max(path.stat().st_size for path in CHECKPOINTS) < 200_000


@each_release
def test_weights_of_a_release_give_the_same_outputs(checkpoint):
    expected = json.loads(checkpoint.with_suffix(".json").read_text())["outputs"]
    assert golden.outputs(checkpoint) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@each_release
def test_run_of_a_release_is_resumed_to_the_same_loss(checkpoint, drawn, tmp_path):
    """To 1 %: the processor and torch may be others than then."""
    saved = read_checkpoint(checkpoint)
    assert saved["global_step"] == golden.STOPPED_AT
    recipe = saved["onestage"]["config"]  # of then: configs/shapes_ssd.yaml may change
    parts = {"model": recipe["model"], "data": {"train_transforms": recipe["data"]["train_transforms"]}}
    (tmp_path / "of_then.yaml").write_text(yaml.safe_dump(parts))
    words = golden.words(drawn, tmp_path, "--resume", str(checkpoint), "--config", str(tmp_path / "of_then.yaml"))
    assert onestage(*words) == 0
    expected = json.loads(checkpoint.with_suffix(".json").read_text())["final_loss"]
    assert golden.final_loss(tmp_path) == pytest.approx(expected, rel=1e-2)
    (last,) = tmp_path.glob("tiny/version_*/checkpoints/last.ckpt")
    assert read_checkpoint(last)["global_step"] == 16


@pytest.mark.slow
@each_release
def test_checkpoint_of_a_release_is_evaluated_and_exported(checkpoint, drawn, tmp_path, capsys):
    copy = Path(shutil.copy(checkpoint, tmp_path / "of_then.ckpt"))
    words = golden.words(drawn, tmp_path)
    options = [*words[1 : words.index("--trainer.max_epochs")], "--runs_dir", str(tmp_path / "runs")]
    detector = ("--model.detector.class_path", "golden.GoldenDetector")
    assert onestage("validate", *options, *detector, "--ckpt_path", str(copy)) == 0
    assert onestage("export", "--ckpt_path", str(copy), "--output", str(tmp_path / "shared")) == 0
    assert "it names golden.GoldenDetector" in capsys.readouterr().out
    shared = tmp_path / "shared" / "model.safetensors"
    assert onestage("validate", *options, *detector, "--ckpt_path", str(shared)) == 0
