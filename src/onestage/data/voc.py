"""Reads PASCAL VOC annotations (devkit of VOC2012, section 4) into an `AnnotationSet`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onestage.data.annotations import (
    IMAGE_MISSING,
    NO_XML,
    NUM_EXAMPLES,
    OTHER_FILE_NAME,
    XML_MALFORMED,
    ZERO_BASED,
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
    require_images,
)
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.source import Source, Split
from onestage.data.voc_record import CORNERS, MalformedRecordError, VOCObject, VOCRecord, read_record
from onestage.errors import AnnotationError, require
from onestage.files import list_files, printable, read_file
from onestage.types import AnnotationSet, Finding

SPLIT_FOLDER = Path("ImageSets", "Main")
NO_IMAGE = "there is no such image"
LISTED_WITH_SUFFIX = "the list names it with its suffix; lists of VOC have names without"


class VOC(Source):
    """PASCAL VOC: XML files in `Annotations` for the images that the lists in `ImageSets/Main` name.

    `path` is such a folder, or it holds VOC2007, VOC2012 ... (also below VOCdevkit).

    Args:
        path: the folder of the data set.
        train: lists that make up the training split; above year folders with the year, such as `2007_trainval`; null:
            train (or trainval), or the trainval lists of all years where one of them has a test list.
        val: lists of the validation split; null: val (valid, validation), or the test lists beside trainval.
        test: lists of the test split; null: test, unless it is the validation split.
        train_difficult: whether objects flagged as difficult are training targets, as in the SSD paper's own code. If
            not, the loss ignores their regions. Evaluation counts them neither found nor missed.
    """

    format = "VOC"

    def __init__(
        self,
        path: str | Path,
        *,
        train: Sequence[str] | None = None,
        val: Sequence[str] | None = None,
        test: Sequence[str] | None = None,
        train_difficult: bool = True,
    ) -> None:
        self.path = Path(path)
        self.train_difficult = train_difficult
        self._given: dict[Split, Sequence[str] | None] = {"train": train, "val": val, "test": test}
        for split, lists in self._given.items():
            require(lists is None or len(lists) > 0, f"data.source.{split}", lists, "a list of at least one name")

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that were named or found."""
        return tuple(split for split in self._given if self.lists(split))

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read the XML files of a split."""
        lists = self.lists(split) or (split,)
        return parse_voc(self.path, lists, class_names=class_names, max_bad_fraction=max_bad_fraction)

    def describe(self, split: Split) -> str:
        """Return the lists of a split."""
        return f"{printable(self.path)} ({' + '.join(self.lists(split))})"

    def lists(self, split: Split) -> tuple[str, ...]:
        """Return the names of the lists of a split; empty if there are none."""
        given = self._given[split]
        return tuple(given) if given is not None else find_lists(self.path).get(split, ())


def find_lists(root: Path) -> dict[Split, tuple[str, ...]]:
    """Return the lists of each split by role. Without lists named train, val or test, the only list is train."""
    folders = [root] if (root / SPLIT_FOLDER).is_dir() else sorted(root.glob("VOC????"))
    folders = folders or sorted(root.glob("VOCdevkit/VOC????"))
    prefixes = {folder: "" if folder == root else f"{folder.name[3:]}_" for folder in folders}
    stems = {
        f"{prefix}{file.stem}": file.stem
        for folder, prefix in prefixes.items()
        for file in sorted((folder / SPLIT_FOLDER).glob("*.txt"))
    }

    def named(*words: str) -> tuple[str, ...]:
        return next((found for word in words if (found := tuple(n for n, s in stems.items() if s == word))), ())

    found: dict[Split, tuple[str, ...]] = {
        "train": named("train", "trainval"),
        "val": named("val", "valid", "validation"),
        "test": named("test"),
    }
    if root not in folders and named("trainval") and found["test"]:
        found = {"train": named("trainval"), "val": found["test"], "test": ()}  # the papers' sets, such as 07+12
    elif found["train"] == named("trainval") and found["test"] and not found["val"]:
        found = found | {"val": found["test"], "test": ()}
    # Beside the splits VOC has lists of each class, such as dog_train.
    others = [name for name, stem in stems.items() if not re.search(r"_(train|val|trainval|test)$", stem)]
    if not any(found.values()) and len(others) == 1:
        found["train"] = (others[0],)
    return {split: lists for split, lists in found.items() if lists}


class NoClassesError(AnnotationError):
    """The images hold no object that the classes could be taken from."""


class ListedImage(NamedTuple):
    """One line of a split list."""

    folder: Path  # the VOC folder, which holds JPEGImages and Annotations
    stem: str

    @property
    def xml(self) -> Path:
        """Where the annotation is, if there is one."""
        return self.folder / "Annotations" / f"{self.stem}.xml"


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
        NoClassesError: no names are given, and there is no object.
    """
    source = f"{printable(root)} ({' + '.join(splits)})"
    listed = _read_splits(root, splits)
    columns, records, findings = _read_images(source, listed)
    require_images(source, len(records), findings, max_bad_fraction)
    objects = [item for record in records for item in record.objects]
    names = tuple(class_names) if class_names is not None else _sorted_names(source, objects)
    label_of_name = {name: label for label, name in enumerate(names)}
    _refuse_unknown_names(source, objects, names)
    return build_annotation_set(
        source,
        columns,
        _object_columns(source, records, objects, label_of_name, findings),
        names,
        range(1, len(names) + 1),
        describe=lambda row: f"{objects[row].place} ({objects[row].class_name}), {_written(objects[row])}",
        findings=findings,
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


def _read_images(source: str, listed: list[ListedImage]) -> tuple[ImageColumns, list[VOCRecord], list[Finding]]:
    """Read the annotation of every image that is on disk. Those that are left out are findings."""
    image_of_stem = {folder: _images_by_stem(folder / "JPEGImages") for folder in {image.folder for image in listed}}
    xml_names = {folder: set(list_files(folder / "Annotations")) for folder in image_of_stem}
    paths: list[str] = []
    records: list[VOCRecord] = []
    findings: list[Finding] = []
    num_without_xml = num_renamed = 0
    for image in listed:
        name = image_of_stem[image.folder].get(image.stem)
        has_xml = image.xml.name in xml_names[image.folder]
        if name is None:
            has_suffix = image.stem in image_of_stem[image.folder].values()
            problem = LISTED_WITH_SUFFIX if has_suffix else NO_IMAGE
            findings.append(IMAGE_MISSING.broken(printable(image.folder / "JPEGImages" / image.stem), problem))
            continue
        try:
            records.append(read_record(image.xml) if has_xml else VOCRecord((0, 0), []))
        except MalformedRecordError as reason:
            findings.append(reason.finding)
            continue
        except AnnotationError as reason:  # of a file that cannot be read at all
            place, _, problem = str(reason).partition("\n")[0].partition(": ")
            findings.append(XML_MALFORMED.broken(place, problem))
            continue
        num_without_xml += not has_xml
        num_renamed += has_xml and bool(records[-1].file_name) and Path(records[-1].file_name).stem != image.stem
        paths.append(str(image.folder / "JPEGImages" / name))
    findings += _about_names(source, num_without_xml, num_renamed, len(listed))
    sizes = np.array([record.size for record in records], dtype=np.int32).reshape(-1, 2)
    return ImageColumns(paths, np.arange(1, len(paths) + 1, dtype=np.int64), sizes), records, findings


def _images_by_stem(folder: Path) -> dict[str, str]:
    """Return stem -> file name of the images in a folder. Of several with one stem, the first suffix known counts."""
    rank = {suffix: place for place, suffix in enumerate(IMAGE_SUFFIXES)}
    paths = [Path(name) for name in list_files(folder)]
    images = [path for path in paths if path.suffix.lower() in rank]
    images.sort(key=lambda path: (rank[path.suffix.lower()], path.name), reverse=True)
    return {path.stem: path.name for path in images}


def _about_names(source: str, num_without_xml: int, num_renamed: int, num_images: int) -> list[Finding]:
    """Images without an XML file are negatives; if all are, the folder is wrong. The XML's own name decides."""
    if num_without_xml == num_images:
        problem = f"none of the {num_images} images has an XML file in Annotations"
        raise AnnotationError(f"{source}: {problem}.\nCorrect data.root, or put the annotations there.")
    findings = []
    if num_without_xml:
        problem = f"{num_without_xml} of {num_images} images have no XML file: without objects"
        findings.append(NO_XML.broken(source, problem, num_without_xml))
    if num_renamed:
        problem = f"in {num_renamed} XML files <filename> is not the name of the file; the file's name decides"
        findings.append(OTHER_FILE_NAME.broken(source, problem, num_renamed))
    return findings


def _written(item: VOCObject) -> str:
    return ", ".join(f"{corner} {value:g}" for corner, value in zip(CORNERS, item.corners, strict=True))


def _sorted_names(source: str, objects: list[VOCObject]) -> tuple[str, ...]:
    """Return the class names that occur."""
    names = sorted({item.class_name for item in objects if item.class_name})
    if not names:
        raise NoClassesError(f"{source}: holds no object, so there are no classes.\nGive data.class_names.")
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
    source: str,
    records: list[VOCRecord],
    objects: list[VOCObject],
    label_of_name: dict[str, int],
    findings: list[Finding],
) -> ObjectColumns:
    """Flatten, and turn pixel indices into edges."""
    boxes = np.array([item.corners for item in objects], dtype=np.float64).reshape(-1, 4)
    num_zero_based = int(np.count_nonzero((boxes[:, :2] == 0).any(axis=1)))
    if num_zero_based:
        problem = f"{num_zero_based} boxes start at pixel 0, though VOC counts from 1: clipped"
        findings.append(ZERO_BASED.broken(source, problem, num_zero_based))
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
