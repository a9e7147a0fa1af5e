"""Writes the embedded data set: drawn scenes as JPEG files, with COCO JSON and VOC XML of the same splits."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import cv2

from onestage.data.coco import parse_coco
from onestage.data.scenes import SHAPE_NAMES, Scene, draw_scene
from onestage.data.source import Source, Split
from onestage.data.voc import parse_voc
from onestage.errors import ConfigError, DataError
from onestage.files import printable
from onestage.types import AnnotationSet, JSONDict

__all__ = ["SHAPE_CATEGORY_IDS", "SHAPE_NAMES", "Shapes", "draw_shapes"]

SHAPE_CATEGORY_IDS = (1, 3, 4, 7, 9, 12)  # with gaps, as in COCO, so that a mixed-up mapping shows
JPEG_QUALITY = 92
SETTINGS_FILE = "shapes.json"  # lies in a finished folder only, and says what was drawn
DRAWING_VERSION = 1  # raise it when scenes.py draws other pictures, and folders of the older kind are drawn anew
ABANDONED_SECONDS = 3600.0  # a drawing takes less than a minute


class Shapes(Source):
    """The embedded data set: images of shapes, drawn into `path` once, then read as COCO or VOC files.

    Args:
        path: the folder to draw into.
        num_train: number of training images, >= 1.
        num_val: number of validation images, >= 1; an odd number exercises uneven sharing among processes.
        draw_seed: seed of the drawings, >= 0.
        format: which of the two annotation formats is read.
    """

    format = "shapes"

    def __init__(
        self,
        path: str | Path = "data/shapes",
        *,
        num_train: int = 1000,
        num_val: int = 201,
        draw_seed: int = 0,
        format: Literal["coco", "voc"] = "coco",
    ) -> None:
        self.path = Path(path)
        self.num_train = num_train
        self.num_val = num_val
        self.draw_seed = draw_seed
        self._annotation_format = format

    @property
    def splits(self) -> tuple[Split, ...]:
        """Always train and val."""
        return ("train", "val")

    def prepare(self) -> None:
        """Draw the images, unless the folder holds exactly these."""
        draw_shapes(self.path, num_train=self.num_train, num_val=self.num_val, seed=self.draw_seed)

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read what was drawn for a split."""
        if self._annotation_format == "voc":
            return parse_voc(self.path, [split], class_names=class_names, max_bad_fraction=max_bad_fraction)
        file, images = self.path / "annotations" / f"instances_{split}.json", self.path / "JPEGImages"
        return parse_coco(file, images, class_names=class_names, max_bad_fraction=max_bad_fraction)

    def describe(self, split: Split) -> str:
        """Return the folder and the number of images."""
        return f"{printable(self.path)} ({self.num_train if split == 'train' else self.num_val} drawn images)"

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """The six shapes; known before anything is drawn."""
        is_coco = self._annotation_format == "coco"
        return SHAPE_NAMES, SHAPE_CATEGORY_IDS if is_coco else tuple(range(1, len(SHAPE_NAMES) + 1))


def draw_shapes(folder: Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Draw the data set into `folder`, unless it is there already. The same arguments give the same files.

    The folder gets JPEGImages/000001.jpg ..., annotations/instances_{train,val}.json (file names relative to
    JPEGImages, category ids with gaps), Annotations/*.xml and ImageSets/Main/{train,val}.txt. It appears whole or not
    at all: an interrupted drawing starts again. One that was drawn with other settings is replaced.

    Args:
        folder: where; missing, empty, or drawn by this function.
        num_train: images of the split train, >= 1.
        num_val: images of the split val, >= 1.
        seed: >= 0.

    Raises:
        ConfigError: a number is out of range.
        DataError: `folder` holds something else, or cannot be written.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_val", num_val, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"data.{name} is {value}; it must be at least {least}.")
    settings = {"num_train": num_train, "num_val": num_val, "seed": seed, "version": DRAWING_VERSION}
    try:
        if _is_finished(folder, settings):
            return
        _require_ours(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        unfinished = Path(tempfile.mkdtemp(prefix=_temporary_prefix(folder), dir=folder.parent))
        try:
            _write_splits(unfinished, num_train, num_val, seed)
            (unfinished / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
            unfinished.chmod(0o755)  # mkdtemp allows the owner alone
            _put_in_place(unfinished, folder, settings)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as reason:
        place = printable(reason.filename or folder)
        problem = f"the drawn data set cannot be written: {reason.strerror or reason}"
        raise DataError(
            f"{place}: {problem}.\nGive a folder that can be written, with 100 MB free: data.root"
        ) from None


def _is_finished(folder: Path, settings: JSONDict) -> bool:
    """Tell whether the folder holds exactly what is asked for."""
    return _read_settings(folder) == settings and _count_images(folder) == settings["num_train"] + settings["num_val"]


def _read_settings(folder: Path) -> JSONDict | None:
    """Return what a finished folder was drawn with; None for any other folder."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "num_train" in settings else None


def _count_images(folder: Path) -> int:
    return sum(1 for _ in (folder / "JPEGImages").glob("*.jpg"))


def _require_ours(folder: Path) -> None:
    """Refuse to replace what this module did not draw."""
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and _read_settings(folder) is None:
        problem = f"is not empty and was not drawn here (it has no {SETTINGS_FILE}), so it is not replaced"
        raise DataError(f"{printable(folder)}: {problem}.\nGive another folder: data.root")


def _temporary_prefix(folder: Path) -> str:
    return f".{folder.name}.unfinished-"


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left behind. What is young may belong to a run that is drawing now."""
    for path in folder.parent.glob(f"{_temporary_prefix(folder)}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(unfinished: Path, folder: Path, settings: JSONDict) -> None:
    """Move the finished folder to its place; another process may have been faster."""
    if folder.exists() and any(folder.iterdir()):
        if _is_finished(folder, settings):
            return
        outdated = Path(tempfile.mkdtemp(prefix=_temporary_prefix(folder), dir=folder.parent))
        folder.replace(outdated)  # onto the empty folder just made, so that no other run can take the name
        shutil.rmtree(outdated, ignore_errors=True)
    try:
        unfinished.replace(folder)
    except OSError:
        if not _is_finished(folder, settings):
            raise


def _write_splits(folder: Path, num_train: int, num_val: int, seed: int) -> None:
    """Draw every scene, and write all files of both splits."""
    for name in ("JPEGImages", "Annotations", "annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)  # on some file systems two of these are one folder
    for split, indices in (("train", range(num_train)), ("val", range(num_train, num_train + num_val))):
        images: list[JSONDict] = []
        objects: list[JSONDict] = []
        for index in indices:
            scene = draw_scene(seed, index)
            image = _image_entry(index, scene)
            _write_jpeg(folder / "JPEGImages" / image["file_name"], scene)
            xml = _voc_xml(image, scene)
            (folder / "Annotations" / f"{index + 1:06d}.xml").write_text(xml, encoding="utf-8")
            images.append(image)
            objects += _object_entries(index, len(objects), scene)
        content = {"images": images, "annotations": objects, "categories": list(_category_entries())}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        stems = "".join(f"{index + 1:06d}\n" for index in indices)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(stems, encoding="utf-8")


def _write_jpeg(path: Path, scene: Scene) -> None:
    bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(encoded.tobytes())


def _category_entries() -> Iterator[JSONDict]:
    for category_id, name in zip(SHAPE_CATEGORY_IDS, SHAPE_NAMES, strict=True):
        yield {"id": category_id, "name": name, "supercategory": "shape"}


def _image_entry(index: int, scene: Scene) -> JSONDict:
    height, width = scene.image.shape[:2]
    return {"id": index + 1, "file_name": f"{index + 1:06d}.jpg", "height": height, "width": width}


def _object_entries(index: int, num_before: int, scene: Scene) -> list[JSONDict]:
    """Return COCO's annotations of one image: corner, width and height."""
    return [
        {
            "id": num_before + n,
            "image_id": index + 1,
            "category_id": SHAPE_CATEGORY_IDS[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": 0,
        }
        for n, ((x1, y1, x2, y2), label, area) in enumerate(
            zip(scene.boxes.tolist(), scene.labels.tolist(), scene.areas.tolist(), strict=True), start=1
        )
    ]


def _voc_xml(image: JSONDict, scene: Scene) -> str:
    """Return VOC's annotation of one image: pixel indices that count from 1, both ends inclusive."""
    height, width = image["height"], image["width"]
    lines = [
        "<annotation>",
        "  <folder>JPEGImages</folder>",
        f"  <filename>{image['file_name']}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
        is_truncated = x1 == 0 or y1 == 0 or x2 == width or y2 == height
        corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        lines += [
            "  <object>",
            f"    <name>{SHAPE_NAMES[label]}</name>",
            f"    <truncated>{int(is_truncated)}</truncated>",
            "    <difficult>0</difficult>",
            f"    <bndbox>{corners}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])
