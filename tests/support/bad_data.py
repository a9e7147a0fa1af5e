"""Small good data sets for the table of bad input to spoil, and the two that must notice: parser and doctor."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from onestage.cli import main
from onestage.data.coco import parse_coco
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet

Content = dict[str, Any]
WIDTH, HEIGHT = 100, 80


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Path:
    """A picture of smooth noise that no other seed resembles. size: (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    ok, encoded = cv2.imencode(path.suffix if path.suffix in (".jpg", ".png") else ".png", image)
    assert ok
    path.write_bytes(encoded.tobytes())
    return path


def coco_content(num_images: int = 4) -> Content:
    """Images a0.jpg ... with two boxes each, of the classes cat (3) and dog (7)."""
    boxes = [[10, 20, 30, 40], [50.5, 10.5, 40, 30]]
    return {
        "images": [
            {"id": n + 1, "file_name": f"a{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(num_images)
        ],
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


def parse(file: Path, **options: Any) -> AnnotationSet:
    return parse_coco(file, file.with_suffix(""), **options)


def assert_refused(file: Path, *expected: str) -> None:
    """E: training stops with file, rule and remedy; doctor exits with 3 and says the same."""
    with pytest.raises(AnnotationError) as caught:
        parse(file)
    text = str(caught.value)
    assert str(file) in text or str(file.with_suffix("")) in text
    assert "\n" in text or "Unpack it" in text or "Convert it" in text  # a remedy follows
    code, report = doctor(file)
    assert code == 3
    (finding,) = [finding for finding in report["findings"] if finding["effect"] == "error"]
    assert finding["remedy"]
    for words in expected:
        assert words in text, text
        assert words in f"{finding['place']}: {finding['problem']}\n{finding['remedy']}"


def assert_left_out(file: Path, rule: str, num_boxes: int, *expected: str, num_items: int = 1) -> AnnotationSet:
    """S: training leaves out and counts; doctor exits with 3 and names place, rule and remedy."""
    annotations = parse(file)
    assert len(annotations.boxes) == num_boxes
    assert len(annotations.skipped) == num_items
    code, report = doctor(file)
    assert code == 3
    findings = found(report, rule)
    assert len(findings) == num_items
    for finding in findings:
        assert finding["effect"] == "skipped"
        assert str(file) in finding["place"]
        assert finding["remedy"]
        for words in expected:
            assert words in f"{finding['place']}: {finding['problem']}"
    return annotations


def assert_goes_on(file: Path, rule: str | None, num_boxes: int = 8) -> AnnotationSet:
    """C: nothing is left out; doctor exits with 0 and mentions it, if there is anything to mention."""
    annotations = parse(file)
    assert len(annotations.boxes) == num_boxes
    assert annotations.skipped == ()
    code, report = doctor(file)
    assert code == 0, report["findings"]
    if rule is not None:
        assert [finding["effect"] in ("warning", "note") for finding in found(report, rule)] == [True]
    return annotations


Spoil = Callable[[Content], Any]
