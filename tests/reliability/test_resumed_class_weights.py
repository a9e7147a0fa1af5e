"""Class weights are configuration: a resumed run trains with those of its config.yaml, not with its checkpoint's."""

from pathlib import Path

import pytest
import tiny_run
import torch

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore:Checkpoint directory")]
LOSS = "--model.detector.init_args.classification_loss.init_args"
NAME = "detector.classification_loss.class_weights.values"
EFFECTIVE = "{class_path: onestage.losses.EffectiveNumberWeights, init_args: {beta: %s}}"


def weights_after(runs: Path, drawn: Path, weights: str, *options: str) -> tuple[Path, list[torch.Tensor]]:
    """The last checkpoint of a run, and the weights in it: beside the average of the network, and the raw ones."""
    words = tiny_run.words(drawn, runs, f"{LOSS}.class_weights", weights, "--ema.decay", "0.9", *options)
    assert tiny_run.onestage(*words) == 0
    (last,) = runs.glob("tiny/version_*/checkpoints/last.ckpt")
    state = torch.load(last, weights_only=True)
    return last, [state[key][NAME] for key in ("state_dict", "current_model_state")]


@pytest.mark.parametrize(
    ("first", "second", "weight_of_first_class"),
    [("[1,1,1,1,1,1]", "[9,9,9,9,9,9]", 9.0), (EFFECTIVE % 0.999, EFFECTIVE % 0.0, 1.0)],
)
def test_a_resumed_run_trains_with_the_configured_class_weights(
    drawn: Path, tmp_path: Path, first: str, second: str, weight_of_first_class: float
) -> None:
    last, before = weights_after(tmp_path / "first", drawn, first, "--trainer.max_epochs", "1")
    _, after = weights_after(tmp_path / "second", drawn, second, "--resume", str(last))
    for old, new in zip(before, after, strict=True):
        assert old[0] != weight_of_first_class
        assert (new == weight_of_first_class).all()


def test_a_checkpoint_with_another_number_of_class_weights_is_refused(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, _ = weights_after(tmp_path / "first", drawn, "[1,1,1,1,1,1]", "--trainer.max_epochs", "1")
    words = tiny_run.words(drawn, tmp_path / "second", f"{LOSS}.class_weights", "[9,9]", "--resume", str(last))
    assert tiny_run.onestage(*words) == 2
    assert "size mismatch for detector.classification_loss.class_weights.values" in capsys.readouterr().err
