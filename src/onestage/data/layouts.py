"""Recognise the format of a path and its splits, for training, doctor, anchors and convert."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import FILE, UNKNOWN_CLASS, kind_of, missing_classes, require_few_skipped, shortened
from onestage.data.coco import COCO, EXPORT, list_annotation_files, split_name
from onestage.data.folder import find_images
from onestage.data.source import Source, Split as Role, role_of
from onestage.data.voc import VOC, find_list_files, find_lists
from onestage.data.yolo import DARKNET_FILE, LABEL_FOLDERS, YOLO, has_labels, has_settings
from onestage.errors import DataError
from onestage.files import as_path, is_hidden, only_folder, printable, read_text
from onestage.types import AnnotationSet, Finding

ROLES = ("train", None, "val", "test")  # the order of splits; None: a name of the user's own
NUM_SEEN = 2000  # files of an unknown folder that are counted
MAX_SEEN_BYTES = 1 << 20  # of a file of an unknown folder that is read
KNOWN = (
    "Known are: COCO (a JSON file, annotations/instances_*.json, <split>/_annotations.coco.json), "
    "VOC (ImageSets/Main, VOCdevkit, or XML files beside images), "
    "YOLO (data.yaml, obj.data, or images/ and labels/)"
)


class Split(NamedTuple):
    """One split that a path holds, and what `read_splits` made of it."""

    name: str  # train, val or test; the name of the file if it says none of these
    source: Source
    role: Role  # for `source.read`
    annotations: AnnotationSet | None = None  # None: not read yet, or a finding says why it cannot be read
    findings: tuple[Finding, ...] = ()


def recognise(path: str | Path, image_root: Path | None = None) -> Source:
    """Return the source of a path by what lies there.

    Args:
        path: a COCO file or folder, a VOC folder, or a YOLO file or folder.
        image_root: the image folder of COCO files; None: found by their first image.

    Raises:
        DataError: the path is missing, or of an unknown format.
    """
    path, images = as_path(path), image_root and as_path(image_root).absolute()
    if path.suffix.lower() in (".yaml", ".yml"):
        yolo = YOLO(path)
        if not yolo.splits:
            yolo.read("train")  # says which key is missing
        return yolo
    if path.suffix.lower() == ".json":
        return COCO(path, train_images=images)
    if path.name == DARKNET_FILE and path.is_file():
        return YOLO(path.parent)
    if not path.is_dir():
        problem = "is not a folder, JSON or YAML file" if path.exists() else "there is no such file or folder"
        raise DataError(f"{printable(path)}: {problem}.\n{KNOWN}.")
    recognisers: tuple[tuple[Callable[[Path], object], Callable[[Path], Source]], ...] = (
        (find_list_files, VOC),
        (has_settings, YOLO),
        (find_lists, VOC),
        (list_annotation_files, partial(COCO, train_images=images, val_images=images, test_images=images)),
        (lambda folder: not _is_wrapped(folder) and has_labels(folder), YOLO),
    )
    for is_found, source in recognisers:
        if is_found(path):
            found = source(path)
            if not found.splits:
                problem, remedy = "holds annotations, but no images", "Put the images there, as they were exported."
                if find_images(path):
                    if isinstance(found, YOLO):
                        found.read("train")  # as above
                    kind = _what_it_holds(path)
                    problem = f"no file says by its name which split it is{kind}"
                    is_foreign = kind and "COCO" not in kind
                    remedy = EXPORT if is_foreign else "Give the files one by one, or call one of them train."
                raise DataError(f"{printable(path)}: {problem}.\n{remedy}")
            return found
    if folder := only_folder(path):
        return recognise(folder, image_root)
    suffixes = Counter(file.suffix.lower() or "no suffix" for file in islice(path.rglob("*.*"), NUM_SEEN))
    seen = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) or "nothing"
    problem = f"is no data set that is known here; it holds {seen}{_what_it_holds(path)}"
    raise DataError(f"{printable(path)}: {problem}.\nGive the folder of the whole data set. {KNOWN}.")


def _is_wrapped(path: Path) -> bool:
    """Tell whether all that a folder holds is the folder of a data set, not of a split or of images."""
    folder = only_folder(path)
    return folder is not None and not role_of(folder.name) and folder.name not in LABEL_FOLDERS


def _what_it_holds(folder: Path) -> str:
    """Return of which tool the files of a folder are, for messages; empty if that is not known."""
    files = islice((file for kind in ("*.json", "*.xml") for file in folder.rglob(kind)), NUM_SEEN)
    for file in islice((file for file in files if not is_hidden(file.name)), 3):
        try:
            content = read_text(file, DataError, "a file of annotations", "", MAX_SEEN_BYTES)
            if kind := "CVAT's own XML" if "<annotations>" in content else kind_of(json.loads(content)):
                return f" (they look like {kind})"
        except (DataError, ValueError, RecursionError):
            continue
    return ""


def describe_source(source: Source) -> list[str]:
    """Return the lines that a training prints: the format, the files of each split, and the files of none."""
    lines = [f"{split}: {source.describe(split)}" for split in source.splits]
    lines += [f"not used: {name}" for name in source.unused()]
    return [f"{source.format} data set {printable(source.path)}", *(f"  {line}" for line in lines)]


def find_splits(paths: Sequence[Path], image_root: Path | None = None) -> list[Split]:
    """Return the splits of one set that the paths hold: train, val, test, each name once. See `recognise`."""
    found = [split for path in paths for split in _splits_of(recognise(path, image_root))]
    found.sort(key=lambda split: ROLES.index(role_of(split.name)))
    names = [split.name for split in found]
    return [
        split if names.count(split.name) == 1 else split._replace(name=f"{split.name} ({number})")
        for number, split in enumerate(found, start=1)
    ]


def read_splits(splits: Sequence[Split], max_bad_fraction: float = 1.0) -> list[Split]:
    """Read every split; an error becomes a finding. The classes that VOC collects get one order in all splits."""
    read = []
    for split in splits:
        try:
            found = split.source.read(split.role)
            require_few_skipped(found.source, len(found), len(found.boxes), found.findings, max_bad_fraction)
            read.append(split._replace(annotations=found, findings=found.findings))
        except DataError as reason:
            read.append(split._replace(findings=(FILE.broken_by(split.source.path, reason),)))
    voc = [part for split in read if split.source.format == "VOC" and (part := split.annotations) is not None]
    all_names = sorted(set().union(*(part.class_names for part in voc))) or ["object"]
    for number, split in enumerate(read):
        if split.source.format == "VOC" and (whole := split.annotations) is not None:
            findings = (*split.findings, *_unknown_classes(whole, voc[0].class_names))
            read[number] = split._replace(annotations=_with_classes(whole, all_names), findings=findings)
        elif split.annotations is not None:
            whole = _with_categories_of(read[0].annotations, split.annotations)
            lacking = sorted({*whole.class_names} - {*split.annotations.class_names})
            findings = (*split.findings, *missing_classes(whole.source, lacking))
            read[number] = split._replace(annotations=whole, findings=findings)
    return read


def _splits_of(source: Source) -> list[Split]:
    """Return the splits of a source; the name of a single COCO file says which split it is."""
    own_name = split_name(source.path) if source.path.suffix.lower() == ".json" else ""
    return [Split(role_of(own_name) or own_name or split, source, split) for split in source.splits]


def _unknown_classes(annotations: AnnotationSet, known: Sequence[str]) -> list[Finding]:
    """Report the classes of a split that the training split, whose classes are the detector's, does not have."""
    unknown = sorted(set(annotations.class_names) - set(known))
    problem = f"the training split has no {shortened(list(map(repr, unknown)))}"
    return UNKNOWN_CLASS.counted(annotations.source, problem, len(unknown))


def _with_categories_of(train: AnnotationSet | None, other: AnnotationSet) -> AnnotationSet:
    """Return a split with the categories of the training split, of which its file may lack some."""
    known = dict(zip(train.class_names, train.category_ids, strict=True)) if train is not None else {}
    if not dict(zip(other.class_names, other.category_ids, strict=True)).items() < known.items():
        return other  # the same, or others, which is a finding of its own
    return replace(_with_classes(other, [*known]), category_ids=tuple(known.values()))


def _with_classes(annotations: AnnotationSet, names: Sequence[str]) -> AnnotationSet:
    """Number the classes in the order of `names`, which holds all of the set's own."""
    label_of_name = {name: label for label, name in enumerate(names)}
    new_label = np.array([label_of_name[name] for name in annotations.class_names], dtype=np.int64)
    labels = new_label[annotations.labels] if len(annotations.labels) else annotations.labels
    return replace(annotations, labels=labels, class_names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))
