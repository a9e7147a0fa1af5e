"""Finds out which format a path is in and which splits it holds, and reads them as a training would."""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import FILE, UNKNOWN_CLASS
from onestage.data.coco import COCO, list_annotation_files, parse_coco
from onestage.data.source import Source as DetectionSource
from onestage.data.voc import SPLIT_FOLDER, VOC, NoClassesError, find_lists, parse_voc
from onestage.data.yolo import YOLO, parse_yolo
from onestage.data.yolo_layout import SETTINGS_FILES, read_settings
from onestage.errors import DataError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

SPLITS = ("train", "val", "test")
HEAD_BYTES = 4 << 20  # of a JSON file, in which the first file name is looked for
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
KNOWN = (
    "a COCO JSON file, a folder with annotations/*.json, a VOC folder (with ImageSets/Main), or a YOLO data.yaml or "
    "the folder that holds it"
)


def recognise(path: str | Path, image_root: Path | None = None) -> DetectionSource:
    """Return the source of a path by what lies there.

    Args:
        path: a COCO file or folder, a VOC folder, or a YOLO file or folder.
        image_root: the image folder of COCO files; None: found by their first image.

    Raises:
        DataError: the path is missing, or of an unknown format.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        return YOLO(path)
    if path.suffix.lower() == ".json":
        return COCO(path, train_images=image_root)
    if find_lists(path) or (path / SPLIT_FOLDER).is_dir():
        return VOC(path)
    if any((path / name).is_file() for name in (*SETTINGS_FILES, "classes.txt")):
        return YOLO(path)
    if list_annotation_files(path):
        return COCO(path, train_images=image_root, val_images=image_root, test_images=image_root)
    problem = "is no data set that is known here" if path.is_dir() else "there is no such file or folder"
    raise DataError(f"{printable(path)}: {problem}.\nGive {KNOWN}.")


def describe_source(source: DetectionSource) -> list[str]:
    """Return the lines that a training prints: the format, and the files of each split."""
    lines = [f"{split}: {source.describe(split)}" for split in source.splits]
    return [f"{source.format} data set {printable(source.path)}", *(f"  {line}" for line in lines)]


class Source(NamedTuple):
    """One split that a path holds."""

    name: str  # train, val, ... as its files call it
    format: str  # COCO, VOC or YOLO
    path: Path  # the file or folder
    read: Callable[[float], AnnotationSet]  # max_bad_fraction -> the split


class Split(NamedTuple):
    """A split that was read, or the reason why it cannot be."""

    name: str
    format: str
    path: Path
    annotations: AnnotationSet | None
    findings: list[Finding]


def find_sources(paths: Sequence[Path], image_root: Path | None = None) -> list[Source]:
    """Return the splits that the paths hold, in their order, each name once.

    Args:
        paths: COCO files, VOC folders, YOLO files or folders. Several are splits of one set.
        image_root: the folder that the file names of COCO files are relative to; None: where the first of them is.

    Raises:
        DataError: a path is nothing of that kind.
    """
    sources = [source for path in paths for source in _sources_of(path, image_root)]
    names = [source.name for source in sources]
    return [
        source if names.count(source.name) == 1 else source._replace(name=f"{source.name} ({number})")
        for number, source in enumerate(sources, start=1)
    ]


def read_splits(sources: Sequence[Source]) -> list[Split]:
    """Read every split; what stops one becomes a finding. Classes that a format collects get one order in all."""
    splits = [_read(source) for source in sources]
    voc = [split for split in splits if split.format == "VOC" and split.annotations is not None]
    names = sorted({name for split in voc if split.annotations for name in split.annotations.class_names})
    return [
        split._replace(
            annotations=_with_classes(split.annotations, names),
            findings=[*split.findings, *_unknown_classes(split.annotations, voc[0].annotations)],
        )
        if split.format == "VOC" and split.annotations is not None
        else split
        for split in splits
    ]


def as_finding(reason: DataError, place: Path) -> Finding:
    """Turn an error that stops a training into a finding."""
    text, _, remedy = str(reason).partition("\n")
    lines = [text, *remedy.splitlines()[:-1]]  # the last line is the remedy, those between belong to the problem
    problem = "\n  ".join(lines).removeprefix(f"{printable(place)}: ").rstrip(".")
    return FILE.broken(printable(place), problem)._replace(remedy=(remedy.splitlines() or [FILE.remedy])[-1])


def _read(source: Source) -> Split:
    """Read a split with all that is bad in it, then see whether it is more than a training would accept."""
    try:
        annotations = source.read(1.0)
    except DataError as reason:
        return Split(source.name, source.format, source.path, None, [as_finding(reason, source.path)])
    return Split(source.name, source.format, source.path, annotations, list(annotations.findings))


def _sources_of(path: Path, image_root: Path | None) -> list[Source]:
    """Return the splits of one path."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return _yolo_sources(path)
    if path.is_file() or path.suffix.lower() == ".json":
        return [_coco_source(path, image_root)]
    if (path / SPLIT_FOLDER).is_dir() or list(path.glob(f"VOC????/{SPLIT_FOLDER}")):
        return _voc_sources(path)
    if list(path.glob(f"VOCdevkit/VOC????/{SPLIT_FOLDER}")):
        return _voc_sources(path / "VOCdevkit")
    if any((path / name).is_file() for name in (*SETTINGS_FILES, "classes.txt")):
        return _yolo_sources(path)
    files = sorted([*path.glob("annotations/*.json"), *path.glob("*/_annotations.coco.json"), *path.glob("*.json")])
    if files:
        return [_coco_source(file, image_root) for file in files]
    problem = "is no data set that is known here" if path.is_dir() else "there is no such file or folder"
    raise DataError(f"{printable(path)}: {problem}.\nGive {KNOWN}.")


def _coco_source(file: Path, image_root: Path | None) -> Source:
    name = file.parent.name if file.name == "_annotations.coco.json" else file.stem.removeprefix("instances_")
    root = image_root or _guess_image_root(file, name)
    return Source(name, "COCO", file, lambda fraction: parse_coco(file, root, max_bad_fraction=fraction))


def _guess_image_root(file: Path, name: str) -> Path:
    """Return the first likely folder that holds the first image of a COCO file."""
    above = file.parent.parent
    likely = [
        above / name, file.parent / name, above / "images" / name, above / "images", file.parent / "images",
        file.parent, above / "JPEGImages", above,
    ]  # fmt: skip
    present = [root for root in likely if root.is_dir()] or likely
    if not file.is_file():
        return present[0]
    try:
        with file.open("rb") as stream:
            found = FILE_NAME.search(stream.read(HEAD_BYTES))
        first = str(json.loads(found[1])) if found else ""
        return next((root for root in present if first and (root / first).is_file()), present[0])
    except (OSError, ValueError):  # the parser will say what it is
        return present[0]


def _voc_sources(root: Path) -> list[Source]:
    """Return train, val and test of all years; or, where they are not there, the lists that are."""
    lists = {
        (f"{folder.parent.parent.name[3:]}_" if folder.parent.parent != root else "") + file.stem: file.stem
        for folder in sorted([*root.glob(str(SPLIT_FOLDER)), *root.glob(f"VOC????/{SPLIT_FOLDER}")])
        for file in sorted(folder.glob("*.txt"))
    }
    names = [name for name in SPLITS if name in lists.values()]
    if not {"train", "val"} & set(names) and "trainval" in lists.values():
        names = ["trainval", *names]
    # Beside the splits VOC has a list of each class, such as dog_train.
    names = names or [
        name for name in dict.fromkeys(lists.values()) if not re.search(r"_(train|val|trainval|test)$", name)
    ]
    if not names:
        raise DataError(
            f"{printable(root / SPLIT_FOLDER)}: holds no list of images.\nWrite train.txt and val.txt there."
        )
    return [
        Source(name, "VOC", root, partial(_read_voc, root, [split for split, stem in lists.items() if stem == name]))
        for name in names
    ]


def _read_voc(root: Path, splits: list[str], max_bad_fraction: float) -> AnnotationSet:
    try:
        return parse_voc(root, splits, max_bad_fraction=max_bad_fraction)
    except NoClassesError:
        return parse_voc(root, splits, class_names=["object"], max_bad_fraction=max_bad_fraction)


def _yolo_sources(path: Path) -> list[Source]:
    """Return the splits that data.yaml names, or else those whose folders are there."""
    try:
        settings = read_settings(path)
    except DataError:  # reading it again will say so
        return [Source("train", "YOLO", path, partial(_read_yolo, path, "train"))]
    named = {"val" if name == "valid" else name for name in settings.entries}
    if not named:
        folders = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
        named = {
            name
            for name, words in folders.items()
            for word in words
            if (settings.root / "images" / word).is_dir() or (settings.root / word / "images").is_dir()
        }
    return [
        Source(name, "YOLO", path, partial(_read_yolo, path, name)) for name in SPLITS if name in (named or {"train"})
    ]


def _read_yolo(path: Path, split: str, max_bad_fraction: float) -> AnnotationSet:
    return parse_yolo(path, split, max_bad_fraction=max_bad_fraction)


def _unknown_classes(annotations: AnnotationSet, train: AnnotationSet | None) -> list[Finding]:
    """Say which classes occur in a split and not in the training split, whose classes are the detector's."""
    known = train.class_names if train is not None else annotations.class_names
    unknown = [name for name in annotations.class_names if name not in known]
    if not unknown:
        return []
    nearest = [(name, difflib.get_close_matches(name, known, n=1, cutoff=0.0)) for name in unknown]
    written = ", ".join(f"{name!r} (nearest: {near[0]!r})" for name, near in nearest if near)
    return [UNKNOWN_CLASS.broken(annotations.source, f"the training split has no {written}", len(unknown))]


def _with_classes(annotations: AnnotationSet, names: Sequence[str]) -> AnnotationSet:
    """Number the classes in the order of `names`, which holds all of the set's own."""
    new_label = np.array([names.index(name) for name in annotations.class_names], dtype=np.int64)
    labels = new_label[annotations.labels] if len(annotations.labels) else annotations.labels
    return replace(annotations, labels=labels, class_names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))
