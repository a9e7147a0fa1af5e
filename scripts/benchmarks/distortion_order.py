"""What it costs in mAP to distort colours after the resize, where that is cheaper, instead of before it.

Trains the small SSD on drawn shapes twice for each seed, by `onestage fit`: the same images in the same order with the
same geometry and the same drawn colours; only the place of the distortion differs. A round is a seed. Of six images
five are shrunk, so distorted after the resize where that is allowed; as many are of COCO's by SSD300's whole recipe.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUM_TRAIN, NUM_VAL, NUM_EPOCHS = 600, 201, 8
METRICS = ("mAP", "AP50")


def run(rounds: int, quick: bool) -> None:
    """Train, and print the difference for each seed."""
    differences: dict[str, list[float]] = {name: [] for name in METRICS}
    num_train, num_val, num_epochs = (16, 3, 1) if quick else (NUM_TRAIN, NUM_VAL, NUM_EPOCHS)
    print(f"SSD160 on {num_train} drawn images, {num_epochs} epochs, evaluated on {num_val}; mAP and AP50 in points")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(rounds):
            first, last = (
                _train(Path(folder), seed, num_train, num_val, num_epochs, distort_first=choice)
                for choice in (True, False)
            )
            for name in METRICS:
                differences[name].append(last[name] - first[name])
            rows = (f"{name} {first[name]:.1f} before, {last[name]:.1f} where fewer pixels are" for name in METRICS)
            print(f"seed {seed}: " + "; ".join(rows), flush=True)
    for name, values in differences.items():
        spread = f", from {min(values):+.1f} to {max(values):+.1f}" if len(values) > 1 else ""
        print(f"difference in {name}, mean of {len(values)} seeds: {statistics.mean(values):+.1f}{spread}")
    print("asserted: both orders trained to the end; the difference between seeds is the yardstick for that of orders")


def _train(
    folder: Path, seed: int, num_train: int, num_val: int, num_epochs: int, *, distort_first: bool
) -> dict[str, float]:
    """Return the metrics of the last weights' run, in points."""
    name = f"seed{seed}_{'before' if distort_first else 'cheaper'}"
    settings = {
        "runs_dir": folder / "runs",
        "experiment": name,
        "seed_everything": seed,
        "data.source.path": folder / "shapes",
        "data.num_train": num_train,
        "data.num_val": num_val,
        "data.num_workers": 0,
        "data.train_transforms": json.dumps([_recipe(distort_first)]),
        "trainer.max_epochs": num_epochs,
        "trainer.check_val_every_n_epoch": num_epochs,
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    program = "import sys; from onestage.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "fit", "--config", str(ROOT / "configs" / "shapes_ssd.yaml"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = sorted((folder / "runs").rglob(f"{name}/**/results.json"))
    assert done.returncode == 0 and results, f"onestage fit ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    metrics = json.loads(results[-1].read_text(encoding="utf-8"))["metrics"]
    return {key: 100 * metrics[key] for key in METRICS}


def _recipe(distort_first: bool) -> dict[str, object]:
    """Return the shipped experiment's mild recipe, with every image distorted, so that an effect would show."""
    return {
        "class_path": "onestage.data.SSDAugmentation",
        "init_args": {
            "image_size": 160,
            "distort_first": distort_first,
            "zoom_out": {"class_path": "onestage.data.SSDZoomOut", "init_args": {"p": 0.0}},
            "crop": {"class_path": "onestage.data.SSDMinIoUCrop", "init_args": {"p": 0.5, "scale": [0.6, 1.0]}},
        },
    }
