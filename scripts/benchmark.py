#!/usr/bin/env python
"""Time a part of the package beside the obvious alternative, and check that both give the same result.

    python scripts/benchmark.py step      a training step of SSD300, and torchvision's ssd300_vgg16
    python scripts/benchmark.py loss      the focal loss of a batch, and torchvision's sigmoid_focal_loss
    python scripts/benchmark.py data      SSD's augmentation, with and without decoding, and torchvision's v2 transforms
    python scripts/benchmark.py loader    images per second of the loader's workers, and of a training step of SSD300
    python scripts/benchmark.py order     mAP with colours distorted before the resize, and where fewer pixels are
    python scripts/benchmark.py detect    from outputs to detections, and torchvision's postprocess_detections
    python scripts/benchmark.py map       COCO evaluation, and pycocotools and torchmetrics
    python scripts/benchmark.py gather    the same evaluation shared by two processes, and of one
    python scripts/benchmark.py annotations   reading annotations of COCO train's size: seconds and memory
    python scripts/benchmark.py save      writing and reading a checkpoint, and Lightning's
    python scripts/benchmark.py soak      2,000 steps of a tiny model: does memory grow? Not timed
    python scripts/benchmark.py ops       what a step asks of a device outside its convolutions, counted, not timed

All contestants run in one process and in turn (A B, B A, ...), so compare ratios, not times.
"""

import argparse
from importlib import import_module
from pathlib import Path

ROUNDS = {
    "step": 5,
    "loss": 7,
    "data": 5,
    "loader": 5,
    "order": 2,
    "detect": 9,
    "map": 3,
    "gather": 3,
    "annotations": 1,
    "save": 7,
    "soak": 1,
    "ops": 1,
}

MODULES = {
    "step": "step",
    "loss": "losses",
    "data": "augmentation",
    "loader": "loader",
    "order": "distortion_order",
    "detect": "detection",
    "map": "mean_average_precision",
    "gather": "gathering",
    "annotations": "annotations",
    "save": "saving",
    "soak": "soak",
    "ops": "operations",
}
WITH_IMAGES = ("data", "loader")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="how often each contestant is timed; by part: " + _defaults())
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: does it run at all?")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEG files for data and loader, not drawn ones")
    parser.add_argument("--threads", type=int, help="of torch; by default all cores, and one for data")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS[arguments.part])
    if rounds < 1:
        parser.error(f"--rounds is {rounds}; it must be at least 1")

    if arguments.images and arguments.part not in WITH_IMAGES:
        parser.error(f"--images is read by {' and '.join(WITH_IMAGES)} only")

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    benchmark = import_module(f"benchmarks.{MODULES[arguments.part]}")
    device = "GPU" if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {device}")
    images = {"images": arguments.images} if arguments.images else {}
    benchmark.run(rounds=rounds, quick=arguments.quick, **images)


def _defaults() -> str:
    return ", ".join(f"{part} {rounds}" for part, rounds in ROUNDS.items())


if __name__ == "__main__":
    main()
