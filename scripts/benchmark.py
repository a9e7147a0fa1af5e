#!/usr/bin/env python
"""Time a part of the package beside the usual alternative, and check that both give the same result.

    python scripts/benchmark.py step      a training step of SSD300, and torchvision's ssd300_vgg16
    python scripts/benchmark.py loss      the focal loss of a batch, and torchvision's sigmoid_focal_loss
    python scripts/benchmark.py data      SSD's augmentation, with and without decoding, and torchvision's v2 transforms
    python scripts/benchmark.py loader    images per second of the loader's workers, and of a training step of SSD300
    python scripts/benchmark.py detect    from outputs to detections, and torchvision's postprocess_detections
    python scripts/benchmark.py map       COCO evaluation, and pycocotools and torchmetrics
    python scripts/benchmark.py doctor    many classes, boxes and images: seconds, and gigabytes at most
    python scripts/benchmark.py save      writing and reading a checkpoint, and Lightning's
    python scripts/benchmark.py models    parameters, FLOPs and images per second of every model in configs/

All contestants alternate in one process (A B, B A, ...): compare ratios, not times.
"""

import argparse
from importlib import import_module
from pathlib import Path

PARTS = {  # name -> (module, default number of rounds)
    "step": ("step", 5),
    "loss": ("losses", 7),
    "data": ("augmentation", 5),
    "loader": ("loader", 5),
    "detect": ("detection", 9),
    "map": ("mean_average_precision", 3),
    "doctor": ("large_sets", 1),
    "save": ("saving", 7),
    "models": ("models", 3),
}
WITH_IMAGES = ("data", "loader")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    defaults = ", ".join(f"{part} {rounds}" for part, (_, rounds) in PARTS.items())
    parser.add_argument("--rounds", type=int, help=f"timings of each contestant; default: {defaults}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to check that it runs")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="JPEG files for data and loader; default: drawn")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores, one for data")
    arguments = parser.parse_args()
    module, rounds = PARTS[arguments.part]
    if arguments.rounds is not None:
        rounds = arguments.rounds
    elif arguments.quick:
        rounds = 1
    if rounds < 1:
        parser.error(f"--rounds must be >= 1, got {rounds}")
    if arguments.images and arguments.part not in WITH_IMAGES:
        parser.error(f"--images is read by {' and '.join(WITH_IMAGES)} only")

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    benchmark = import_module(f"benchmarks.{module}")
    print(f"torch {torch.__version__}, {'GPU' if torch.cuda.is_available() else 'no GPU'}")
    images = {"images": arguments.images} if arguments.images else {}
    benchmark.run(rounds=rounds, quick=arguments.quick, **images)


if __name__ == "__main__":
    main()
