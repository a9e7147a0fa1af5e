"""Reading, checking and dividing of large data sets, each in a process of its own."""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

SIZES = {  # name -> classes, boxes, images
    "20,000 categories": (20_000, 40_000, 1_000),
    "1,000,000 boxes in one class": (1, 1_000_000, 10_000),
    "100,000 images": (80, 700_000, 100_000),
}
MAX_LINKS = 1000  # to one file


def run(rounds: int, quick: bool) -> None:
    """Print seconds and memory of `onestage doctor --no_near_copies` and of a training's start, for each size."""
    print(f"\n{'':<30}   doctor, s   start of fit, s   memory at most, GB (seconds of the processor)")
    for name, sizes in SIZES.items():
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
                file = write_set(Path(folder), *(max(size // 1000, 1) for size in sizes) if quick else sizes)
                doctor_seconds, fit_seconds, peak = pool.apply(measure, (file,))
            print(f"{name:<30}   {doctor_seconds:>9.1f}   {fit_seconds:>15.1f}   {peak / 1e9:>19.2f}")
    print("every set was read and checked")


def write_set(folder: Path, num_classes: int, num_boxes: int, num_images: int) -> Path:
    """Write a COCO file with two boxes beside each other at most, and links to a few drawn images."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir()
    for number in range(num_images):
        target = folder / "train" / f"{number}.jpg"
        if number % MAX_LINKS == 0:
            first = target
            cv2.imwrite(str(first), random.integers(0, 256, (48, 64, 3), np.uint8))
        else:
            os.link(first, target)
    left, width = random.uniform(0, 50, num_boxes).round(2).tolist(), random.uniform(2, 14, num_boxes).round(2).tolist()
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 48, "width": 64} for n in range(num_images)],
        "annotations": [
            {"id": n + 1, "image_id": n % num_images, "category_id": n % num_classes + 1, "iscrowd": 0}
            | {"bbox": [left[n], left[n] / 2, width[n], 20], "area": width[n] * 20}
            for n in range(num_boxes)
        ],
        "categories": [{"id": n + 1, "name": f"class {n}"} for n in range(num_classes)],
    }
    file = folder / "instances_train.json"
    file.write_text(json.dumps(content))
    return file


def measure(file: Path) -> tuple[float, float, float]:
    """Return the processor's seconds of doctor, seconds of a training's start, and the most bytes of memory."""
    from onestage.cli import main
    from onestage.data import DetectionDataModule
    from onestage.errors import ConfigError

    start = time.process_time()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        main(["doctor", str(file), "--no_near_copies", "--json"])
    middle = time.process_time()
    try:
        DetectionDataModule(path=file, image_size=64).setup("fit")
    except ConfigError as reason:  # few images, which are links to one file, stay together
        if "copies stay together" not in str(reason):
            raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return middle - start, time.process_time() - middle, peak
