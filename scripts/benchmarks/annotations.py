"""Parsing annotations of the size of COCO train2017: seconds, memory, a second start, and memory of loader workers."""

import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

NUM_IMAGES, NUM_OBJECTS, NUM_CATEGORIES = 118_287, 860_001, 80  # as in train2017
QUICK_IMAGES, QUICK_OBJECTS = 1_000, 18_000  # just large enough for the cache
NUM_WORKERS = 4
SAMPLES_PER_WORKER = 64
LIMITS = {"first start, s": 25.0, "peak memory, MB": 3000.0, "second start, s": 2.0, "memory of a worker, MB": 60.0}

# Runs in a process of its own, so that its peak is that of one start. ru_maxrss counts kilobytes on Linux.
START = """
import json, resource, sys, time
from pathlib import Path
from onestage.data import COCO
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, cpu_start = time.perf_counter(), time.process_time()
annotations = COCO(sys.argv[1], train="train").read("train")
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak / 1e3, "imports_mb": before / 1e3,
                  "images": len(annotations), "objects": len(annotations.boxes),
                  "checksum": float(annotations.boxes.sum(dtype="float64"))}))
"""


def run(rounds: int, quick: bool) -> None:
    """Write the file, start twice in each round, and print the worst of each figure beside its limit."""
    with tempfile.TemporaryDirectory(prefix="onestage-annotations-") as name:
        root = Path(name)
        start = time.perf_counter()
        file = write_coco(root, *((QUICK_IMAGES, QUICK_OBJECTS) if quick else (NUM_IMAGES, NUM_OBJECTS)))
        print(f"{file.stat().st_size / 1e6:.0f} MB of JSON written in {time.perf_counter() - start:.0f} s")
        firsts, seconds = [], []
        for round_number in range(rounds):
            cache = root / f"cache{round_number}"
            firsts.append(start_once(root, cache))
            seconds.append(start_once(root, cache))
            if firsts[-1]["checksum"] != seconds[-1]["checksum"]:
                raise SystemExit("the cache gives other boxes than the file")
        print("the cache gives the same boxes as the file")
        first = firsts[0]
        print(
            f"{first['images']:.0f} images, {first['objects']:.0f} objects; imports take {first['imports_mb']:.0f} MB"
        )
        figures = {
            "first start, s": max(one["seconds"] for one in firsts),
            "first start, s of CPU": max(one["cpu_seconds"] for one in firsts),
            "peak memory, MB": max(one["peak_mb"] for one in firsts),
            "second start, s": max(one["seconds"] for one in seconds),
            "second start, s of CPU": max(one["cpu_seconds"] for one in seconds),
            "memory of a worker, MB": worker_megabytes(root),
        }
        for what, value in figures.items():
            limit = f"   at most {LIMITS[what]:g}" if what in LIMITS else "   whatever else the machine does"
            print(f"{what:<24}{value:>9.2f}{limit}")


def write_coco(root: Path, num_images: int, num_objects: int) -> Path:
    """Write annotations/instances_train.json, with outlines, and an empty file for each image; return the JSON file."""
    folder = root / "train"
    folder.mkdir()
    for number in range(num_images):
        (folder / f"{number:012d}.jpg").touch()
    file = root / "annotations" / "instances_train.json"
    file.parent.mkdir()
    with file.open("w", encoding="utf-8") as stream:
        stream.write('{"info": {"description": "drawn at random"}, "images": [')
        stream.writelines(separated(image_entries(num_images)))
        stream.write('], "annotations": [')
        stream.writelines(separated(object_entries(num_images, num_objects)))
        categories = [{"id": n, "name": f"class {n}"} for n in range(1, NUM_CATEGORIES + 1)]
        stream.write(f'], "categories": {json.dumps(categories)}}}')
    return file


def image_entries(num_images: int) -> Iterator[str]:
    """Yield one JSON object for each image, with the keys of COCO's own."""
    for number in range(num_images):
        yield (
            f'{{"license": 3, "file_name": "{number:012d}.jpg", "coco_url": "http://images.example/{number:012d}.jpg", '
            f'"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": {number + 1}}}'
        )


def object_entries(num_images: int, num_objects: int) -> Iterator[str]:
    """Yield one JSON object for each object; the outlines have 5 to 40 points, as COCO's have."""
    generator = random.Random(0)
    outlines = [
        ", ".join(f"{generator.uniform(0, 640):.2f}" for _ in range(2 * generator.randint(5, 40))) for _ in range(500)
    ]
    for number in range(num_objects):
        x, y = generator.uniform(0, 500), generator.uniform(0, 400)
        width, height = generator.uniform(2, 640 - x), generator.uniform(2, 480 - y)
        entry = {
            "segmentation": [],
            "area": round(width * height * 0.6, 4),
            "iscrowd": 0,
            "image_id": generator.randrange(num_images) + 1,
            "bbox": [round(value, 2) for value in (x, y, width, height)],
            "category_id": generator.randrange(NUM_CATEGORIES) + 1,
            "id": number + 1,
        }
        yield json.dumps(entry).replace("[]", f"[[{outlines[number % 500]}]]", 1)


def separated(entries: Iterator[str]) -> Iterator[str]:
    """Yield the entries with commas between them."""
    for number, entry in enumerate(entries):
        yield f"{', ' if number else ''}{entry}"


def start_once(root: Path, cache: Path) -> dict[str, float]:
    """Read the training split in a new process."""
    from os import environ

    environment = {**environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", START, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def worker_megabytes(root: Path) -> float:
    """Return the memory that each of several forked workers has to itself after loading samples from all over."""
    import numpy as np
    from torch.utils.data import DataLoader

    from onestage.data import COCO, DetectionDataset, SeededTransform, Stretch, collate
    from onestage.data.cache import ReadImage

    class GrayImages:
        """Stands for the decoder: what it takes is the same with any annotations."""

        def read(self, index: int) -> ReadImage:
            """Return a gray image, after touching every array as a sample would."""
            arrays = (annotations.image_paths, annotations.sizes, annotations.boxes, annotations.labels)
            assert all(len(array[index % 7 :: 7]) for array in arrays)
            _ = str(annotations.image_paths[index]), float(annotations.boxes.sum()), int(annotations.labels.sum())
            return ReadImage(np.zeros((480, 640, 3), dtype=np.uint8), (480, 640))

    annotations = COCO(root, train="train").read("train")
    transform = SeededTransform([], Stretch(300))
    dataset = DetectionDataset(annotations, transform, images=GrayImages())
    order = np.random.default_rng(0).permutation(len(annotations))[: NUM_WORKERS * SAMPLES_PER_WORKER].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more workers than cores: it is their memory that counts
        loader = DataLoader(
            dataset,
            batch_size=8,
            sampler=order,
            num_workers=NUM_WORKERS,
            collate_fn=collate,
            multiprocessing_context="fork",
            persistent_workers=True,
        )
        for _ in loader:
            pass
    workers = loader._iterator._workers  # type: ignore[union-attr]
    return max(private_megabytes(worker.pid) for worker in workers)


def private_megabytes(process: int) -> float:
    """Return what a process does not share with any other (its USS), from Linux's own account."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))]
    return sum(kilobytes) / 1e3
