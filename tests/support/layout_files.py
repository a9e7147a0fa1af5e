"""Small data sets in the layouts that tools write; every picture is unlike the others."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from bad_data import HEIGHT, WIDTH, coco_content, write_coco, write_image

XML = (
    f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size><object><name>NAME</name>"
    "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object></annotation>"
)
LABEL = "0 0.5 0.5 0.25 0.5\n"
_seeds = count(1000)


def picture(path: Path) -> Path:
    return write_image(path, seed=next(_seeds))


def voc_image(folder: Path, stem: str, name: str = "dog") -> None:
    picture(folder / "JPEGImages" / f"{stem}.jpg")
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{stem}.xml").write_text(XML.replace("NAME", name))


def voc_lists(folder: Path, **stems_by_list: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for name, stems in stems_by_list.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems.split()))


def voc_folder(root: Path, **stems_by_list: str) -> None:
    """Write one image for each stem of each list; dog_train repeats train's."""
    for stem in dict.fromkeys(" ".join(stems_by_list.values()).split()):
        voc_image(root, stem)
    voc_lists(root, **stems_by_list)


def coco_folder(root: Path, *names: str, num_images: int = 4, **changes: Any) -> None:
    """Write annotations/instances_<name>.json and the images in <name>/. changes: other values of the JSON's keys."""
    for name in names:
        file = write_coco(root, coco_content(num_images) | changes, name)
        (root / "annotations").mkdir(exist_ok=True)
        file.rename(root / "annotations" / f"instances_{name}.json")


def coco_with_a_sub_folder(root: Path, separator: str = "/", **values: Any) -> None:
    """Write a COCO folder whose first image lies in train/sub and has other values."""
    coco_folder(root, "train")
    (root / "train" / "sub").mkdir()
    (root / "train" / "a0.jpg").rename(root / "train" / "sub" / "a0.jpg")
    file = root / "annotations" / "instances_train.json"
    edit_json(file, "images", [0], file_name=f"sub{separator}a0.jpg", **values)


def edit_json(file: Path, table: str, rows: Sequence[int] | slice = slice(None), **values: Any) -> None:
    content = json.loads(file.read_text())
    entries = content[table][rows] if isinstance(rows, slice) else [content[table][row] for row in rows]
    for entry in entries:
        entry.update(values)
    file.write_text(json.dumps(content))


def write_yolo(root: Path, labels: dict[str, str | bytes | None], *, split: str = "train") -> Path:
    """Write images/<split>/<name>.png of 40 x 20 px and their labels (None: no file); return data.yaml."""
    for seed, (name, text) in enumerate(labels.items()):
        write_image(root / "images" / split / f"{name}.png", seed, (20, 40))
        label = root / "labels" / split / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_bytes(text.encode() if isinstance(text, str) else text)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return root / "data.yaml"


def yolo_images(root: Path, images: str, labels: str, stems: str = "a b c", text: str = LABEL) -> None:
    for stem in stems.split():
        picture(root / images / f"{stem}.jpg")
        (root / labels).mkdir(parents=True, exist_ok=True)
        (root / labels / f"{stem}.txt").write_text(text)
