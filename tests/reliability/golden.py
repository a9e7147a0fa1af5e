"""Write the checkpoint of a release, on which every later version is tested.

    python tests/reliability/golden.py       writes golden/VERSION.ckpt and golden/VERSION.json, at a release

The run stops in the middle of its second epoch, with an average of the weights. The JSON file holds the outputs of the
weights for a fixed image, and the final loss of the run without the stop.
"""

import csv
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import tiny_run
import torch
from tiny_training import TinyDetector, tiny_batch

import onestage
from onestage.data.scenes import SHAPE_NAMES
from onestage.data.shapes import draw_shapes
from onestage.models.heads import ExtraLayer
from onestage.models.vgg import VGG
from onestage.reliability.checkpoints import read_checkpoint

GOLDEN = Path(__file__).parent / "golden"
STOPPED_AT = 11  # of 16 steps


class GoldenDetector(TinyDetector):
    """A checkpoint of less than 200 KB. Do not change it: the checkpoints hold its weights."""

    extra_layers: ClassVar = (ExtraLayer(2, 4),)

    def make_backbone(self) -> VGG:
        return VGG((1, 1, 1, 1, 1), (4, 4, 4, 4, 4), fc_width=4, fc6_dilation=1, batch_norm=True)


def words(data: Path, runs: Path, *options: str) -> list[str]:
    detector = ("--model.detector.class_path", "golden.GoldenDetector")
    return tiny_run.words(data, runs, *detector, "--ema.decay", "0.9", *options)


def outputs(checkpoint: Path) -> list[float]:
    """The first class logits and box deltas for an image that no version draws differently."""
    detector = GoldenDetector(num_classes=len(SHAPE_NAMES)).eval()
    state = read_checkpoint(checkpoint)["state_dict"]
    own = {name.removeprefix("detector."): value for name, value in state.items() if name.startswith("detector.")}
    detector.load_state_dict(own)
    with torch.no_grad():
        predictions = detector(tiny_batch([0]).images)
    return [*predictions.class_logits[0, 0].tolist(), *predictions.box_outputs[0, 0].tolist()]


def final_loss(runs: Path) -> float:
    """Return the validation loss of the second epoch of the only run below a folder."""
    (metrics,) = runs.glob("tiny/version_*/metrics.csv")
    with metrics.open(newline="") as file:
        return next(float(row["val/loss"]) for row in csv.DictReader(file) if row["epoch"] == "1" and row["val/loss"])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the paths in the checkpoint become relative
        data, stopped, whole = Path("data"), Path("stopped"), Path("whole")
        draw_shapes(data, num_train=32, num_val=7, seed=0)
        assert tiny_run.onestage(*words(data, whole)) == 0
        tiny_run.break_at("step", STOPPED_AT, lambda: tiny_run.send(signal.SIGTERM))
        assert tiny_run.onestage(*words(data, stopped)) == 143
        (last,) = stopped.glob("tiny/version_*/checkpoints/last.ckpt")
        target = GOLDEN / f"{onestage.__version__}.ckpt"
        shutil.copy(last, target)
        expected = {"outputs": outputs(target), "final_loss": final_loss(whole)}
        target.with_suffix(".json").write_text(json.dumps(expected, indent=1) + "\n")
        print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    sys.modules["golden"] = sys.modules["__main__"]
    main()
