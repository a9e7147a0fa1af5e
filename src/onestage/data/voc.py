"""Reads PASCAL VOC annotations (devkit of VOC2012, section 4) into an `AnnotationSet`."""

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from onestage.data.files import list_files, printable, read_file
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.records import NUM_EXAMPLES, ImageColumns, ObjectColumns, build_annotation_set, require_images
from onestage.errors import AnnotationError
from onestage.types import AnnotationSet

SPLIT_FOLDER = Path("ImageSets", "Main")
CORNERS = ("xmin", "ymin", "xmax", "ymax")

logger = logging.getLogger(__name__)


class ListedImage(NamedTuple):
    """One line of a split list."""

    folder: Path  # the VOC folder, which holds JPEGImages and Annotations
    stem: str

    @property
    def xml(self) -> Path:
        """Where the annotation is, if there is one."""
        return self.folder / "Annotations" / f"{self.stem}.xml"


class VOCObject(NamedTuple):
    """One `object` element, as written."""

    place: str  # file and number of the object
    class_name: str
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax; 1-based, inclusive; NaN where not a number
    is_difficult: bool
    problem: str | None  # the rule that its bndbox breaks


class VOCRecord(NamedTuple):
    """One XML file."""

    size: tuple[int, int]  # (height, width); 0, 0 where not given
    objects: list[VOCObject]


def parse_voc(
    root: Path,
    splits: Sequence[str],
    *,
    class_names: Sequence[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> AnnotationSet:
    """Read the images of one or more splits as one set. Images without objects, or without an XML file, stay.

    VOC gives 1-based inclusive pixel indices: the left and top *edges* are one less, the right and bottom equal. Since
    a box whose xmin equals its xmax is a slip of the mouse in every set seen, it counts as having no width. Image ids
    are 1..N, category ids 1..K.

    Args:
        root: a folder with JPEGImages, Annotations and ImageSets/Main; or one that holds VOC2007, VOC2012 ... (also
            below VOCdevkit).
        splits: names of lists in ImageSets/Main, such as "train"; with year folders "2007_trainval".
        class_names: [K] names in label order; None takes all that occur, sorted.
        max_bad_fraction: 0..1, the fraction of boxes, and of images, that may be left out; two always may, unless 0.

    Raises:
        AnnotationError: a list is missing, empty or malformed, a class is unknown, or too much cannot be used.
    """
    source = f"{printable(root)} ({' + '.join(splits)})"
    listed = _read_splits(root, splits)
    columns, records, skipped_images = _read_images(source, listed)
    require_images(source, len(records), skipped_images, max_bad_fraction)
    objects = [item for record in records for item in record.objects]
    names = tuple(class_names) if class_names is not None else _sorted_names(source, objects)
    label_of_name = {name: label for label, name in enumerate(names)}
    _refuse_unknown_names(source, objects, names)
    return build_annotation_set(
        source,
        columns,
        _object_columns(source, records, objects, label_of_name),
        names,
        range(1, len(names) + 1),
        describe=lambda row: f"{objects[row].place} ({objects[row].class_name}), {_written(objects[row])}",
        skipped_images=skipped_images,
        max_bad_fraction=max_bad_fraction,
    )


def _read_splits(root: Path, splits: Sequence[str]) -> list[ListedImage]:
    """Return the images of all the lists, each once, in order."""
    if not splits:
        raise AnnotationError(f"{printable(root)}: no split is named; at least one is needed, such as train.")
    located = [_locate(root, split) for split in splits]
    return list(dict.fromkeys(image for folder, name in located for image in _read_list(folder, name)))


def _locate(root: Path, split: str) -> tuple[Path, str]:
    """Return the VOC folder of a split, and the name of its list in there."""
    if (root / SPLIT_FOLDER).is_dir():
        return root, split
    year, _, name = split.partition("_")
    for parent in (root, root / "VOCdevkit"):
        if re.fullmatch(r"\d{4}", year) and (parent / f"VOC{year}" / SPLIT_FOLDER).is_dir():
            return parent / f"VOC{year}", name
    if not root.is_dir():
        raise AnnotationError(f"{printable(root)}: is not a folder; it must hold a VOC data set.\nCorrect data.root.")
    years = sorted(path.parent.parent.name[3:] for path in root.glob(f"**/VOC????/{SPLIT_FOLDER}"))
    raise AnnotationError(
        f"{printable(root)}: there is no {SPLIT_FOLDER} for split {split!r} in it (years found: "
        f"{', '.join(years) or 'none'}); a VOC folder has JPEGImages, Annotations and {SPLIT_FOLDER}, and above year "
        "folders a split is called like 2007_trainval.\nCorrect data.root, or the name of the split."
    )


def _read_list(folder: Path, split: str) -> list[ListedImage]:
    """Read one list: an image a line, perhaps followed by -1, 0 or 1 as in VOC's lists of one class."""
    lists = folder / SPLIT_FOLDER
    path = lists / f"{split}.txt"
    known = ", ".join(sorted(printable(file.stem) for file in lists.glob("*.txt"))[:30]) or "none"
    if Path(split).name != split or not path.is_file():
        raise AnnotationError(f"{printable(path)}: there is no such split list.\nThe lists there are: {known}")
    try:
        text = read_file(path, AnnotationError, "a list of images", f"Use another list: {known}").decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise AnnotationError(f"{printable(path)}: is not UTF-8 text (byte {reason.start}).\nConvert it.") from None
    stems = [re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in text.splitlines()]
    for number, stem in enumerate(stems, start=1):
        if stem in (".", "..") or {"/", "\\", "\0"}.intersection(stem):
            rule = "a line must be the name of an image in JPEGImages without suffix and without folders"
            raise AnnotationError(f"{printable(path)}:{number}: {stem!r:.200}: {rule}.\nCorrect the line.")
    listed = [ListedImage(folder, stem) for stem in stems if stem]
    if not listed:
        raise AnnotationError(f"{printable(path)}: names no image.\nUse another list: {known}")
    return listed


def _read_images(source: str, listed: list[ListedImage]) -> tuple[ImageColumns, list[VOCRecord], list[str]]:
    """Read the annotation of every image that is on disk. Returns also a line for each image that is left out."""
    image_of_stem = {folder: _images_by_stem(folder / "JPEGImages") for folder in {image.folder for image in listed}}
    xml_names = {folder: set(list_files(folder / "Annotations")) for folder in image_of_stem}
    paths: list[str] = []
    records: list[VOCRecord] = []
    skipped: list[str] = []
    num_without_xml = 0
    for image in listed:
        name = image_of_stem[image.folder].get(image.stem)
        has_xml = image.xml.name in xml_names[image.folder]
        if name is None:
            skipped.append(f"{printable(image.folder / 'JPEGImages' / image.stem)}: there is no such image")
            continue
        try:
            records.append(_read_record(image.xml) if has_xml else VOCRecord((0, 0), []))
        except AnnotationError as reason:
            skipped.append(str(reason).partition("\n")[0])
            continue
        num_without_xml += not has_xml
        paths.append(str(image.folder / "JPEGImages" / name))
    _report_missing_xml(source, num_without_xml, len(listed))
    sizes = np.array([record.size for record in records], dtype=np.int32).reshape(-1, 2)
    return ImageColumns(paths, np.arange(1, len(paths) + 1, dtype=np.int64), sizes), records, skipped


def _images_by_stem(folder: Path) -> dict[str, str]:
    """Return stem -> file name of the images in a folder. Of several with one stem, the first suffix known counts."""
    rank = {suffix: place for place, suffix in enumerate(IMAGE_SUFFIXES)}
    paths = [Path(name) for name in list_files(folder)]
    images = [path for path in paths if path.suffix.lower() in rank]
    images.sort(key=lambda path: (rank[path.suffix.lower()], path.name), reverse=True)
    return {path.stem: path.name for path in images}


def _report_missing_xml(source: str, num_missing: int, num_images: int) -> None:
    """Images without an XML file are negatives. If all are, the folder is wrong."""
    if num_missing == num_images:
        problem = f"none of the {num_images} images has an XML file in Annotations"
        raise AnnotationError(f"{source}: {problem}.\nCorrect data.root, or put the annotations there.")
    if num_missing:
        logger.warning("%s: %d of %d images have no XML file: without objects", source, num_missing, num_images)


def _read_record(path: Path) -> VOCRecord:
    """Parse one XML file."""
    content = read_file(path, AnnotationError, "a VOC annotation (XML)", "Export it again.")
    place = printable(path)
    try:
        root = fromstring(content, forbid_dtd=True)
    except ParseError as reason:
        line, column = reason.position
        raise AnnotationError(f"{place}:{line}:{column + 1}: is not XML: {reason}") from None
    except DefusedXmlException:
        raise AnnotationError(f"{place}: has a DOCTYPE or entities, which an annotation needs not: refused") from None
    except (ValueError, LookupError) as reason:  # an encoding that the parser does not know
        raise AnnotationError(f"{place}: cannot be decoded ({reason}); save it as UTF-8") from None
    if root.tag != "annotation":
        raise AnnotationError(f"{place}: its first element is {root.tag!r:.80}; in VOC it is 'annotation'")
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (int(height), int(width)) if 0 < height < 1 << 31 and 0 < width < 1 << 31 else (0, 0)
    objects = [_read_object(element, f"{place}: object {n}") for n, element in enumerate(root.findall("object"), 1)]
    return VOCRecord(size, objects)


def _read_object(element: Element, place: str) -> VOCObject:
    """Read one object. Only its own bndbox counts: the `part` elements of a person have their own."""
    name = (element.findtext("name") or "").strip()
    xmin, ymin, xmax, ymax = (_number(element.findtext(f"bndbox/{corner}")) for corner in CORNERS)
    problem = None
    if not name:
        problem = "an object must have a name"
    elif not np.isfinite([xmin, ymin, xmax, ymax]).all():
        problem = "its bndbox must hold a finite number for each of xmin, ymin, xmax, ymax"
    elif xmin >= xmax or ymin >= ymax:
        problem = "xmin < xmax and ymin < ymax must hold"
    difficult = _number(element.findtext("difficult"))
    return VOCObject(place, printable(name), (xmin, ymin, xmax, ymax), difficult == 1, problem)


def _number(text: str | None) -> float:
    """Return a number, or NaN for anything else."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _written(item: VOCObject) -> str:
    return ", ".join(f"{corner} {value:g}" for corner, value in zip(CORNERS, item.corners, strict=True))


def _sorted_names(source: str, objects: list[VOCObject]) -> tuple[str, ...]:
    """Return the class names that occur."""
    names = sorted({item.class_name for item in objects if item.class_name})
    if not names:
        raise AnnotationError(f"{source}: holds no object, so there are no classes.\nGive data.class_names.")
    return tuple(names)


def _refuse_unknown_names(source: str, objects: list[VOCObject], class_names: Sequence[str]) -> None:
    """Stop at class names that are not expected."""
    unknown = {item.class_name: item for item in objects if item.class_name and item.class_name not in class_names}
    if not unknown:
        return
    lines = []
    for name, item in sorted(unknown.items())[:NUM_EXAMPLES]:
        nearest = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
        lines.append(f"  {item.place}: {name!r} (nearest: {', '.join(map(repr, nearest)) or 'none'})")
    more = f"\n  and {len(unknown) - NUM_EXAMPLES} more" if len(unknown) > NUM_EXAMPLES else ""
    raise AnnotationError(
        f"{source}: {len(unknown)} class names are not among {', '.join(class_names)}:\n"
        + "\n".join(lines)
        + more
        + "\n"
        "Correct the names, or add them to data.class_names."
    )


def _object_columns(
    source: str, records: list[VOCRecord], objects: list[VOCObject], label_of_name: dict[str, int]
) -> ObjectColumns:
    """Flatten, and turn pixel indices into edges."""
    boxes = np.array([item.corners for item in objects], dtype=np.float64).reshape(-1, 4)
    num_zero_based = int(np.count_nonzero((boxes[:, :2] == 0).any(axis=1)))
    if num_zero_based:
        logger.warning("%s: %d boxes start at pixel 0, though VOC counts from 1: clipped", source, num_zero_based)
    boxes[:, :2] -= 1
    num_objects = len(objects)
    return ObjectColumns(
        image_rows=np.repeat(np.arange(len(records)), [len(record.objects) for record in records]).astype(np.int64),
        boxes=boxes,
        labels=np.array([label_of_name.get(item.class_name, 0) for item in objects], dtype=np.int64),
        areas=np.full(num_objects, np.nan),
        is_crowd=np.zeros(num_objects, dtype=np.bool_),
        is_difficult=np.array([item.is_difficult for item in objects], dtype=np.bool_),
        problems={row: item.problem for row, item in enumerate(objects) if item.problem},
    )
