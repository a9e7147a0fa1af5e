"""The embedded data set: scenes of shapes, drawn once into JPEG, COCO and VOC files."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from onestage.data.annotations import ImageColumns, ObjectColumns, build_annotation_set
from onestage.data.coco import parse_coco
from onestage.data.scenes import MAX_OBJECTS, SHAPE_NAMES, Scene, draw_scene
from onestage.data.source import Source, Split
from onestage.data.voc import parse_voc
from onestage.data.writers import WritableSplit, write_coco, write_voc
from onestage.errors import DataError, require
from onestage.files import as_path, atomic_folder, printable
from onestage.types import AnnotationSet, JSONDict

SHAPE_CATEGORY_IDS = (1, 3, 4, 7, 9, 12)  # with gaps, as in COCO, so that a wrong mapping shows
JPEG_QUALITY = 92
SETTINGS_FILE = "shapes.json"  # only in a finished folder; holds the settings of the drawing
DRAWING_VERSION = 2  # raise it when the files change; folders of an older version are drawn again


class Shapes(Source):
    """The embedded data set: images of shapes, drawn into `path` once, then read as COCO or VOC files.

    Args:
        path: the folder to draw into.
        num_train: number of training images, >= 1.
        num_val: number of validation images, >= 1; an odd number exercises uneven sharing among processes.
        draw_seed: seed of the drawings, >= 0.
        max_objects: most objects of a training image, >= 1; more of them teach more in each step. A validation image
            has at most 6 whatever it is.
        clutter: times the usual number of spots and strokes that are no object, in all images, >= 0.
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
        max_objects: int = MAX_OBJECTS,
        clutter: int = 1,
        format: Literal["coco", "voc"] = "coco",
    ) -> None:
        self.path = as_path(path)
        self._settings = {"num_train": num_train, "num_val": num_val, "seed": draw_seed}
        self._settings |= {"max_objects": max_objects, "clutter": clutter}
        self._annotation_format = format

    @property
    def splits(self) -> tuple[Split, ...]:
        """Always train and val."""
        return ("train", "val")

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The six shapes; known before anything is drawn."""
        is_coco = self._annotation_format == "coco"
        return SHAPE_NAMES, SHAPE_CATEGORY_IDS if is_coco else tuple(range(1, len(SHAPE_NAMES) + 1))

    def prepare(self) -> None:
        """Draw the images, unless the folder holds exactly these."""
        draw_shapes(self.path, **self._settings)

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the drawn files of a split."""
        if self._annotation_format == "voc":
            return parse_voc(self.path, [split], class_names=class_names)
        file, images = self.path / "annotations" / f"instances_{split}.json", self.path / "JPEGImages"
        return parse_coco(file, images, class_names=class_names)


def draw_shapes(
    folder: Path, *, num_train: int, num_val: int, seed: int, max_objects: int = MAX_OBJECTS, clutter: int = 1
) -> None:
    """Draw the data set into `folder`, unless it is there already. The same arguments give the same files.

    The folder gets JPEGImages/000001.jpg ..., annotations/instances_{train,val}.json (file names relative to
    JPEGImages, category ids with gaps), Annotations/*.xml and ImageSets/Main/{train,val}.txt. It appears complete or
    not at all: an interrupted drawing starts again. A folder drawn with other settings is replaced. Raises ConfigError
    for a number out of its range in `Shapes`, DataError if `folder` holds other files, or cannot be written.
    """
    numbers = {"num_train": num_train, "num_val": num_val, "seed": seed, "max_objects": max_objects, "clutter": clutter}
    for name, value in numbers.items():
        minimum = 0 if name in ("seed", "clutter") else 1
        key = "draw_seed" if name == "seed" else name
        require(value >= minimum, f"data.source.{key}", value, f">= {minimum}")
    settings = numbers | {"version": DRAWING_VERSION}
    if _is_finished(folder, settings):
        return
    try:
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not is_free and _read_settings(folder) is None:
            problem = f"is not empty and was not drawn here (it has no {SETTINGS_FILE}), so it is not replaced"
            raise DataError(f"{printable(folder)}: {problem}.\nGive another folder: data.source.path")
        with atomic_folder(folder) as unfinished:
            (unfinished / "JPEGImages").mkdir()
            val = range(num_train, num_train + num_val)
            splits = [
                _draw_split(unfinished, "train", seed, range(num_train), max_objects, clutter),
                _draw_split(unfinished, "val", seed, val, MAX_OBJECTS, clutter),
            ]
            write_coco(unfinished, splits)
            write_voc(unfinished, splits)
            (unfinished / SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
            if folder.exists() and not _is_finished(folder, settings):
                # Under another name first, so that no partial one is ever seen.
                outdated = folder.replace(tempfile.mkdtemp(prefix=unfinished.name, dir=folder.parent))
                shutil.rmtree(outdated, ignore_errors=True)
    except OSError as reason:
        if _is_finished(folder, settings):  # by another process, meanwhile
            return
        problem = f"the drawn data set cannot be written: {reason.strerror or reason}"
        remedy = "Give a folder that can be written, with 100 MB free: data.source.path"
        raise DataError(f"{printable(reason.filename or folder)}: {problem}.\n{remedy}") from None


def _is_finished(folder: Path, settings: JSONDict) -> bool:
    """Tell whether the folder holds exactly what is asked for."""
    num_images = sum(1 for _ in (folder / "JPEGImages").glob("*.jpg"))
    return _read_settings(folder) == settings and num_images == settings["num_train"] + settings["num_val"]


def _read_settings(folder: Path) -> JSONDict | None:
    """Return the settings of a finished drawing; None for any other folder."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "num_train" in settings else None


def _draw_split(folder: Path, name: str, seed: int, indices: range, max_objects: int, clutter: int) -> WritableSplit:
    names = [f"{index + 1:06d}.jpg" for index in indices]
    paths = [str(folder / "JPEGImages" / file_name) for file_name in names]

    def draw(index: int, path: str) -> tuple[tuple[int, ...], Scene]:
        scene = draw_scene(seed, index, max_objects, clutter)
        bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        Path(path).write_bytes(jpeg.tobytes())
        return bgr.shape[:2], scene._replace(image=np.zeros((0, 0, 3), dtype=np.uint8))

    with ThreadPoolExecutor() as pool:  # NumPy and OpenCV release the lock for most of the time
        sizes, scenes = zip(*pool.map(draw, indices, paths), strict=True)
    boxes, labels, areas = ([getattr(scene, name) for scene in scenes] for name in ("boxes", "labels", "areas"))
    rows = np.repeat(np.arange(len(names)), list(map(len, boxes)))
    all_boxes, all_areas = np.concatenate(boxes).astype(np.float64), np.concatenate(areas).astype(np.float64)
    annotations = build_annotation_set(
        f"drawn shapes ({name})",
        ImageColumns(paths, np.array(indices) + 1, np.array(sizes, np.int32)),
        ObjectColumns(rows, all_boxes, np.concatenate(labels), areas=all_areas),
        SHAPE_NAMES,
        SHAPE_CATEGORY_IDS,
        describe=str,
    )
    return WritableSplit(name, annotations, names)
