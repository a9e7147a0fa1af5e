"""Small good data sets for tests to spoil, and the doctor's report on them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
from image_sets import smooth

from onestage.cli import main

Content = dict[str, Any]
WIDTH, HEIGHT = 100, 80
SIZE = {"width": WIDTH, "height": HEIGHT}


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """A picture of smooth noise that no other seed resembles. size: (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix if path.suffix in (".jpg", ".png") else ".png"
    path.write_bytes(cv2.imencode(suffix, smooth(*size, seed))[1].tobytes())
    return path


def coco_content(num_images: int = 4) -> Content:
    """Images a0.jpg ... with two boxes each, of the classes cat (3) and dog (7)."""
    boxes = [[10, 20, 30, 40], [50.5, 10.5, 40, 30]]
    return {
        "images": [{"id": n + 1, "file_name": f"a{n}.jpg", **SIZE} for n in range(num_images)],
        "annotations": [
            {"id": 2 * n + k + 1, "image_id": n + 1, "category_id": (3, 7)[k], "bbox": list(box),
             "area": box[2] * box[3], "iscrowd": 0}
            for n in range(num_images)
            for k, box in enumerate(boxes)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }  # fmt: skip


def write_coco(folder: Path, content: Any, name: str = "train") -> Path:
    """The file <name>.json and its images in <name>/."""
    images = content.get("images", []) if isinstance(content, dict) else []
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images if isinstance(images, list) else []):
        file_name = image.get("file_name") if isinstance(image, dict) else None
        if isinstance(file_name, str) and file_name.isascii() and file_name.isprintable() and ".." not in file_name:
            write_image(folder / name / file_name.lstrip("/"), seed=number + 100 * len(name))
    file = folder / f"{name}.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def doctor(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """Run `onestage doctor --json`; return the exit code and the report. A traceback would fail the test."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(["--debug", "doctor", *map(str, words), "--json"])
    report = json.loads(output.getvalue())
    assert report["exit_code"] == code
    return code, report


def found(report: dict[str, Any], rule: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["rule"] == rule]
