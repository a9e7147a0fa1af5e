"""Recognise the format of a path and its splits, for training, doctor, anchors and convert."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

import onestage.data.annotations as rules
from onestage.data.annotations import kind_of, missing_classes, require_few_skipped, shortened
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
    """Return the source of a path by what lies there; DataError if it is missing, or of an unknown format.

    image_root: the image folder of COCO files; None: found by their first images.
    """
    path, images = as_path(path), image_root and as_path(image_root).absolute()
    suffix = path.suffix.lower()
    if suffix == ".json":
        return COCO(path, train_images=images)
    if suffix in (".yaml", ".yml"):
        return _require_splits(YOLO(path))
    if path.name == DARKNET_FILE and path.is_file():
        return YOLO(path.parent)
    if not path.is_dir():
        problem = "is not a folder, JSON or YAML file" if path.exists() else "there is no such file or folder"
        raise DataError(f"{printable(path)}: {problem}.\n{KNOWN}.")
    folder = only_folder(path)
    # Whether all that lies there is the folder of a data set, not of a split or of images.
    is_wrapped = folder is not None and not role_of(folder.name) and folder.name not in LABEL_FOLDERS
    if find_list_files(path):
        return _require_splits(VOC(path))
    has_lists, has_json = bool(find_lists(path)), bool(list_annotation_files(path))
    if has_settings(path) and (not (has_lists or has_json) or has_labels(path)):  # classes.txt may lie beside others
        return _require_splits(YOLO(path))
    if has_lists:
        return _require_splits(VOC(path))
    if has_json:
        return _require_splits(COCO(path, train_images=images, val_images=images, test_images=images))
    if not is_wrapped and has_labels(path):
        return _require_splits(YOLO(path))
    if folder is not None:
        return recognise(folder, image_root)
    suffixes = Counter(file.suffix.lower() or "no suffix" for file in islice(path.rglob("*.*"), NUM_SEEN))
    seen = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(4)) or "nothing"
    problem = f"is no data set that is known here; it holds {seen}{_what_it_holds(path)}"
    raise DataError(f"{printable(path)}: {problem}.\nGive the folder of the whole data set. {KNOWN}.")


def _require_splits(source: Source) -> Source:
    """Return a source; DataError, with what lies there, if it has no split."""
    if source.splits:
        return source
    problem, remedy = "holds annotations, but no images", "Put the images there, as they were exported."
    if source.path.is_file() or find_images(source.path):
        if isinstance(source, YOLO):
            source.read("train")  # says which key is missing
        kind = _what_it_holds(source.path)
        problem = f"no file says by its name which split it is{kind}"
        remedy = "Give the files one by one, or call one of them train." if "COCO" in kind or not kind else EXPORT
    raise DataError(f"{printable(source.path)}: {problem}.\n{remedy}")


def _what_it_holds(folder: Path) -> str:
    """Return of which tool the files of a folder are, for messages; empty if that is not known."""
    files = islice((file for kind in ("*.json", "*.xml") for file in folder.rglob(kind)), NUM_SEEN)
    for file in islice((file for file in files if not is_hidden(file.name)), 3):
        with suppress(DataError, ValueError, RecursionError):
            content = read_text(file, DataError, "a file of annotations", "", MAX_SEEN_BYTES)
            if kind := "CVAT's own XML" if "<annotations>" in content else kind_of(json.loads(content)):
                return f" (they look like {kind})"
    return ""


def describe_source(source: Source) -> list[str]:
    """Return the lines that a training prints: the format, the files of each split, and the files of none."""
    lines = [f"{split}: {source.describe(split)}" for split in source.splits]
    lines += [f"not used: {name}" for name in source.unused()]
    return [f"{source.format} data set {printable(source.path)}", *(f"  {line}" for line in lines)]


def find_splits(paths: Sequence[Path], image_root: Path | None = None) -> list[Split]:
    """Return the splits of one set that the paths hold: train, val, test, each name once. See `recognise`."""
    found = []
    for source in (recognise(path, image_root) for path in paths):
        # The name of a single COCO file says which split it is.
        own_name = split_name(source.path) if source.path.suffix.lower() == ".json" else ""
        found += [Split(role_of(own_name) or own_name or split, source, split) for split in source.splits]
    found.sort(key=lambda split: ROLES.index(role_of(split.name)))
    names = [split.name for split in found]
    return [
        split if names.count(split.name) == 1 else split._replace(name=f"{split.name} ({number})")
        for number, split in enumerate(found, start=1)
    ]


def read_splits(
    splits: Sequence[Split], max_bad_fraction: float = 1.0, option: str = rules.BAD_FRACTION_KEY
) -> list[Split]:
    """Read every split; an error becomes a finding. The classes that VOC collects get one order in all splits."""
    read = []
    for split in splits:
        try:
            found = split.source.read(split.role)
            require_few_skipped(found.source, len(found), len(found.boxes), found.findings, max_bad_fraction, option)
            read.append(split._replace(annotations=found, findings=found.findings))
        except DataError as reason:
            read.append(split._replace(findings=(rules.FILE.broken_by(split.source.path, reason),)))
    return _with_one_order(read)


def _with_one_order(read: Sequence[Split]) -> list[Split]:
    """Give the splits that could be read the classes of the training split, which the detector has."""
    voc = [part for split in read if split.source.format == "VOC" and (part := split.annotations) is not None]
    all_names = sorted(set().union(*(part.class_names for part in voc))) or ["object"]
    ordered = []
    for split in read:
        if (part := split.annotations) is None:
            ordered.append(split)
            continue
        if split.source.format == "VOC":
            categories = {name: category for category, name in enumerate(all_names, start=1)}
            unknown = sorted({*part.class_names} - {*voc[0].class_names})
            problem = f"the training split has no {shortened(list(map(repr, unknown)))}"
            findings = rules.UNKNOWN_CLASS.counted(part.source, problem, len(unknown))
        else:  # the file may lack some of the training split's; others are a finding of their own
            own, known = _categories(part), _categories(read[0].annotations)
            categories = known if own.items() < known.items() else own
            findings = missing_classes(part.source, sorted(categories.keys() - own.keys()))
        label_of_name = {name: label for label, name in enumerate(categories)}
        labels = np.array([label_of_name[name] for name in part.class_names], dtype=np.int64)[part.labels]
        names, ids = tuple(categories), tuple(categories.values())
        whole = replace(part, labels=labels, class_names=names, category_ids=ids)
        ordered.append(split._replace(annotations=whole, findings=(*split.findings, *findings)))
    return ordered


def _categories(annotations: AnnotationSet | None) -> dict[str, int]:
    """Return class name -> category id."""
    return dict(zip(annotations.class_names, annotations.category_ids, strict=True)) if annotations is not None else {}
