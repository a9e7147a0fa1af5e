"""Writes small YOLO data sets for tests: 40 x 20 pixel images, so that fractions are easy to work out."""

from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 20
DATA_YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_image(path: Path, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_yolo(root: Path, labels: dict[str, str | bytes | None], *, split: str = "train") -> Path:
    """Write images/<split>/<name>.png and its labels (None: no file); return data.yaml."""
    for seed, (name, text) in enumerate(labels.items()):
        write_image(root / "images" / split / f"{name}.png", seed)
        label = root / "labels" / split / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_bytes(text.encode() if isinstance(text, str) else text)
    (root / "data.yaml").write_text(DATA_YAML)
    return root / "data.yaml"
