"""Recognise the format of a path and its splits, for training, doctor, anchors and convert."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import FILE, UNKNOWN_CLASS
from onestage.data.coco import COCO, list_annotation_files, split_name
from onestage.data.source import Source, role_of
from onestage.data.source import Split as Role
from onestage.data.voc import VOC, NoClassesError, find_lists, list_stems
from onestage.data.yolo import NAMES_FILES, SETTINGS_FILES, YOLO
from onestage.errors import DataError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

ROLES = ("train", None, "val", "test")  # the order of splits; None: a name of the user's own
NUM_SEEN = 2000  # files of an unknown folder that are counted
KNOWN = (
    "Known are: COCO (a JSON file, annotations/instances_*.json, <split>/_annotations.coco.json), "
    "VOC (ImageSets/Main, VOCdevkit, or XML files beside images), "
    "YOLO (data.yaml, or classes.txt with images/ and labels/)"
)


class SplitSource(NamedTuple):
    """One split that a path holds."""

    name: str  # train, val or test; the name of the file if it says none of these
    format: str  # COCO, VOC or YOLO
    path: Path
    read: Callable[[float], AnnotationSet]  # max_bad_fraction -> the split


class Split(NamedTuple):
    """A split that was read, or the finding that says why it cannot be read."""

    name: str
    format: str
    path: Path
    annotations: AnnotationSet | None
    findings: list[Finding]


def recognise(path: str | Path, image_root: Path | None = None) -> Source:
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
        return COCO(path, train_images=image_root and image_root.absolute())
    if not path.is_dir():
        problem = "is not a folder, JSON or YAML file" if path.exists() else "there is no such file or folder"
        raise DataError(f"{printable(path)}: {problem}.\n{KNOWN}.")
    if list_stems(path):
        return VOC(path)
    if any((path / name).is_file() for name in (*SETTINGS_FILES, *NAMES_FILES)):
        return YOLO(path)
    if find_lists(path):
        return VOC(path)
    if list_annotation_files(path):
        images = image_root and image_root.absolute()
        return COCO(path, train_images=images, val_images=images, test_images=images)
    suffixes = Counter(file.suffix.lower() or "no suffix" for file in islice(path.rglob("*.*"), NUM_SEEN))
    seen = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) or "nothing"
    raise DataError(f"{printable(path)}: is no data set that is known here; it holds {seen}.\n{KNOWN}.")


def describe_source(source: Source) -> list[str]:
    """Return the lines that a training prints: the format, the files of each split, and the files of none."""
    lines = [f"{split}: {source.describe(split)}" for split in source.splits]
    if isinstance(source, COCO) and source.path.is_dir():
        used = {source.annotation_file(split) for split in source.splits}
        lines += [f"not used: {printable(file)}" for file in list_annotation_files(source.path) if file not in used]
    return [f"{source.format} data set {printable(source.path)}", *(f"  {line}" for line in lines)]


def find_sources(paths: Sequence[Path], image_root: Path | None = None) -> list[SplitSource]:
    """Return the splits that the paths hold: train, val, test, each name once.

    Args:
        paths: COCO files, VOC folders, YOLO files or folders. Several are splits of one set.
        image_root: the image folder of COCO files; None: found by their first image.

    Raises:
        DataError: a path is missing, or of an unknown format.
    """
    found = [split for path in paths for split in _splits_of(recognise(path, image_root))]
    found.sort(key=lambda split: ROLES.index(role_of(split.name)))
    names = [split.name for split in found]
    return [
        split if names.count(split.name) == 1 else split._replace(name=f"{split.name} ({number})")
        for number, split in enumerate(found, start=1)
    ]


def read_splits(sources: Sequence[SplitSource], max_bad_fraction: float = 1.0) -> list[Split]:
    """Read every split; an error becomes a finding. The classes that VOC collects get one order in all splits."""
    splits = [_read(source, max_bad_fraction) for source in sources]
    voc = [split.annotations for split in splits if split.format == "VOC" and split.annotations is not None]
    names = sorted({name for annotations in voc for name in annotations.class_names})
    return [
        split._replace(
            annotations=_with_classes(split.annotations, names),
            findings=[*split.findings, *_unknown_classes(split.annotations, voc[0].class_names)],
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


def _splits_of(source: Source) -> list[SplitSource]:
    """Return the splits of a source; the name of a single COCO file says which split it is."""
    splits = source.splits
    if not splits:
        problem = "no file says by its name which split it is"
        raise DataError(f"{printable(source.path)}: {problem}.\nGive the files one by one, or call one of them train.")
    own_name = split_name(source.path) if source.path.suffix.lower() == ".json" else ""

    def read(split: Role, max_bad_fraction: float) -> AnnotationSet:
        try:
            return source.read(split, max_bad_fraction=max_bad_fraction)
        except NoClassesError:  # a split of negatives
            return source.read(split, ["object"], max_bad_fraction=max_bad_fraction)

    return [
        SplitSource(role_of(own_name) or own_name or split, source.format, source.path, partial(read, split))
        for split in splits
    ]


def _read(source: SplitSource, max_bad_fraction: float) -> Split:
    try:
        annotations = source.read(max_bad_fraction)
    except DataError as reason:
        return Split(source.name, source.format, source.path, None, [as_finding(reason, source.path)])
    return Split(source.name, source.format, source.path, annotations, list(annotations.findings))


def _unknown_classes(annotations: AnnotationSet, known: Sequence[str]) -> list[Finding]:
    """Report the classes of a split that the training split, whose classes are the detector's, does not have."""
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
