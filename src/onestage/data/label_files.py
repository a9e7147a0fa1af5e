"""One annotation file per image, as in VOC and YOLO: read all, skip malformed ones, flatten their objects."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import onestage.data.annotations as rules
from onestage.data.annotations import ImageColumns, ObjectColumns, Rule, malformed, shortened
from onestage.errors import AnnotationError
from onestage.files import list_files, printable, require_inside, spellings
from onestage.types import AnnotationSet, Finding

NOTES = {
    rules.NO_LABEL: "{} images have no annotation file: without objects",
    rules.ZERO_BASED: "{} boxes start at pixel 0, though VOC counts from 1: clipped",
    rules.BOX_REPEATED: "{} lines occur twice in their file: read once",
    rules.POLYGON: "{} objects are outlines: the box around each is used",
}


class LabelledImage(NamedTuple):
    """An image of a split and its annotation file."""

    image: Path
    label: Path  # may not exist: an image without objects
    is_missing: bool = False  # there is no such image


class WrittenObject(NamedTuple):
    """One object as its file gives it."""

    text: str  # place and values, for messages
    class_name: str  # empty: it has none, which is a problem
    box: tuple[float, ...]  # xyxy edges, px; NaN where there is no number
    problem: str | None = None  # the rule that it breaks
    is_difficult: bool = False
    is_outline: bool = False  # around which `box` lies


class LabelFile(NamedTuple):
    """One annotation file."""

    objects: Sequence[WrittenObject] = ()
    size: tuple[int, int] = (0, 0)  # (height, width) of the image; 0, 0 if not given
    notes: Mapping[Rule, int] = {}  # what is read in another way than written -> number of times


ReadLabel = Callable[[Path, Path | None], LabelFile | Finding]  # of an image and its file; a finding skips the image


def read_label_files(
    source: str, root: Path, listed: Sequence[LabelledImage], read: ReadLabel, class_names: Sequence[str] | None
) -> AnnotationSet:
    """Read the annotation file of each image that can be used. An image without a file is one without objects.

    Raises AnnotationError if no image has a file, a link leaves the folder `root`, or an object has another class.
    read: reads the file of an image, None if it has none; raises AnnotationError if it is malformed, which skips the
    image. class_names: [K] in label order; None: those of the objects, sorted.
    """
    files, findings = _read_all(source, root, listed, read)
    for rule, problem in NOTES.items():
        count = sum(file.notes.get(rule, 0) for file in files.values())
        findings += rule.counted(source, problem.format(count), count)
    objects = [item for file in files.values() for item in file.objects]
    text_of_class = {item.class_name: item.text for item in reversed(objects) if item.class_name}
    names = sorted(text_of_class) if class_names is None else list(class_names)
    if unknown := sorted(text_of_class.keys() - {*names}):
        lines = [f"{text_of_class[name]}: {name!r}" for name in unknown]
        problem = f"{len(unknown)} class names are not among {shortened(names, 100)}"
        raise malformed(source, problem, "Correct the names, or add them to data.class_names.", lines)
    label_of_name = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of_name.get(item.class_name, -1) for item in objects], dtype=np.int64)
    problems = {row: item.problem for row, item in enumerate(objects) if item.problem}
    sizes = np.array([file.size for file in files.values()], dtype=np.int32).reshape(-1, 2)
    image_rows = np.repeat(np.arange(len(files)), [len(file.objects) for file in files.values()]).astype(np.int64)
    boxes = np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4)
    is_difficult = np.array([item.is_difficult for item in objects], dtype=np.bool_)
    return rules.build_annotation_set(
        source,
        ImageColumns([str(image) for image in files], np.arange(1, len(files) + 1), sizes),
        ObjectColumns(image_rows, boxes, labels, problems, is_difficult=is_difficult),
        names,
        range(1, len(names) + 1),
        describe=lambda row: objects[row].text,
        findings=findings,
    )


def _read_all(
    source: str, root: Path, listed: Sequence[LabelledImage], read: ReadLabel
) -> tuple[dict[Path, LabelFile], list[Finding]]:
    """Return image -> file of every image that can be used, and a finding for each other; see `read_label_files`."""
    folders = {path.parent for item in listed for path in (item.image, item.label)}
    listings = {folder: list_files(folder) for folder in folders}
    files: dict[Path, LabelFile] = {}
    findings: list[Finding] = []
    has_any = False
    for image, label, is_missing in listed:
        stored = next((form for form in spellings(label.name) if form in listings[label.parent]), None)
        file = label.with_name(stored) if stored is not None and stored != label.name else label
        has_any = has_any or stored is not None
        for path in (image, file):
            if listings[path.parent].get(path.name):  # a link
                require_inside(source, [root, path.parent], path)
        if is_missing:
            findings.append(
                rules.IMAGE_MISSING.broken(printable(image), f"there is no such image below {printable(root)}")
            )
            continue
        try:
            found = read(image, file if stored is not None else None)
        except AnnotationError as reason:
            found = rules.LABEL_MALFORMED.broken_by(file, reason)
        if isinstance(found, Finding):
            findings.append(found)
        else:
            files[image] = found if stored is not None else found._replace(notes={rules.NO_LABEL: 1})
    if files and not has_any:
        searched = f"searched {printable(listed[0].label)}, ..."
        problem = f"none of its {len(listed)} images has an annotation file ({searched})"
        raise malformed(source, problem, "Correct data.path, or put the annotations there.")
    return files, findings
