"""Writes small YOLO data sets for tests: 40 x 20 pixel images, so that fractions are easy to work out."""

from pathlib import Path

from bad_data import write_image

SIZE = (20, 40)
DATA_YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_yolo(root: Path, labels: dict[str, str | bytes | None], *, split: str = "train") -> Path:
    """Write images/<split>/<name>.png and its labels (None: no file); return data.yaml."""
    for seed, (name, text) in enumerate(labels.items()):
        write_image(root / "images" / split / f"{name}.png", seed, SIZE)
        label = root / "labels" / split / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_bytes(text.encode() if isinstance(text, str) else text)
    (root / "data.yaml").write_text(DATA_YAML)
    return root / "data.yaml"
