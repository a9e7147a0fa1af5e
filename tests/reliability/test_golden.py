"""Fault 19: checkpoints of every release can be read, resumed and shared by this version."""

import json
import re
import shutil
from pathlib import Path

import golden
import pytest
import torch
from tiny_run import onestage

from onestage import __version__
from onestage.reliability.checkpoints import read_checkpoint

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:Checkpoint directory")]
CHECKPOINTS = sorted(golden.GOLDEN.glob("*.ckpt"))
each_release = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[path.stem for path in CHECKPOINTS])


def test_f19_this_version_has_its_checkpoint_and_all_are_small() -> None:
    assert re.split(r"\.dev|\+", __version__)[0] in {path.stem for path in CHECKPOINTS}
    assert max(path.stat().st_size for path in CHECKPOINTS) < 200_000


@each_release
def test_f19_the_weights_of_a_release_answer_as_they_did(checkpoint: Path) -> None:
    expected = json.loads(checkpoint.with_suffix(".json").read_text())
    torch.testing.assert_close(
        torch.tensor(golden.answer(checkpoint)), torch.tensor(expected["answer"]), rtol=1e-3, atol=1e-4
    )


@each_release
def test_f19_a_run_of_a_release_is_resumed_in_its_place_and_ends_as_it_would_have_ended(
    checkpoint: Path, drawn: Path, tmp_path: Path
) -> None:
    """Not to the bit, as neither the processor nor torch has to be the one of then."""
    assert read_checkpoint(checkpoint)["global_step"] == golden.STOPPED_AT
    assert onestage(*golden.words(drawn, tmp_path, "--resume", str(checkpoint))) == 0
    expected = json.loads(checkpoint.with_suffix(".json").read_text())["final_loss"]
    assert golden.final_loss(tmp_path) == pytest.approx(expected, rel=1e-2)
    (last,) = tmp_path.glob("tiny/version_*/checkpoints/last.ckpt")
    assert read_checkpoint(last)["global_step"] == 16


@each_release
def test_f19_a_checkpoint_of_a_release_is_evaluated_and_exported(
    checkpoint: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copy(checkpoint, tmp_path / "of_then.ckpt"))
    words = golden.words(drawn, tmp_path)
    options = [*words[1 : words.index("--trainer.max_epochs")], "--runs_dir", str(tmp_path / "runs")]
    detector = ("--model.detector.class_path", "golden.GoldenDetector")
    assert onestage("validate", *options, *detector, "--ckpt_path", str(copy)) == 0
    assert onestage("export", "--ckpt_path", str(copy), "--output", str(tmp_path / "shared")) == 0
    assert "it names golden.GoldenDetector" in capsys.readouterr().out  # a class of one's own: others need it too
    shared = tmp_path / "shared" / "model.safetensors"
    assert onestage("validate", *options, *detector, "--ckpt_path", str(shared)) == 0


def test_an_optimizer_numbered_through_the_model_is_refused(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a strategy that splits weights. Read as numbers through our groups, momentum would go to other weights."""
    state = torch.load(CHECKPOINTS[0], weights_only=True)
    first, second = state["optimizer_states"][0]["param_groups"]
    numbers = first["params"] + second["params"]
    first["params"], second["params"] = numbers[::2], numbers[1::2]
    torch.save(state, tmp_path / "split.ckpt")
    assert onestage(*golden.words(drawn, tmp_path, "--resume", str(tmp_path / "split.ckpt"))) == 2
    assert "by a strategy with split weights" in capsys.readouterr().err
