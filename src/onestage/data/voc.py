"""Read PASCAL VOC annotations (devkit of VOC2012, section 4): one XML file per image."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

import onestage.data.annotations as rules
from onestage.data.annotations import (
    NUM_EXAMPLES,
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
    malformed,
    require_images,
)
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.source import Source, Split, role_of
from onestage.errors import AnnotationError, require
from onestage.files import list_files, printable, read_file, read_text
from onestage.types import AnnotationSet, Finding

SPLIT_FOLDER = Path("ImageSets", "Main")
ALL_IMAGES = "."  # name of the split of a folder without lists
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_XML_BYTES = 16 << 20  # some 50,000 objects; a file of VOC has a few kB
LISTED_WITH_SUFFIX = "the list names it with its suffix; lists of VOC have names without"


class NoClassesError(AnnotationError):
    """There is no object to take the classes from."""


class VOC(Source):
    """PASCAL VOC: XML files in `Annotations` for the images that the lists in `ImageSets/Main` name.

    `path` is such a folder, or it holds VOC2007, VOC2012 ... (also below VOCdevkit). Without lists, all images with an
    XML file beside them, or in Annotations, are used; folders train, valid and test of such images are splits.

    Args:
        path: the folder of the data set.
        train: lists that make up the training split; above year folders with the year, such as `2007_trainval`; null:
            train (or trainval), or the trainval lists of all years if one of them has a test list.
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
        names = " + ".join(self.lists(split))
        return f"{printable(self.path)} ({'all images' if names == ALL_IMAGES else names})"

    def lists(self, split: Split) -> tuple[str, ...]:
        """Return the names of the lists of a split; empty if there are none."""
        given = self._given[split]
        return tuple(given) if given is not None else find_lists(self.path).get(split, ())


def find_lists(root: Path) -> dict[Split, tuple[str, ...]]:
    """Return the lists of each split by role. If no name tells the role, a single list is the training split."""
    stems = list_stems(root)
    if not stems:
        folders = {role_of(path.name): path.name for path in sorted(root.glob("*/")) if next(path.glob("*.xml"), None)}
        found: dict[Split, tuple[str, ...]] = {role: (name,) for role, name in folders.items() if role is not None}
        return found or ({"train": (ALL_IMAGES,)} if _list_folder(root) else {})

    def named(*words: str) -> tuple[str, ...]:
        lists = (tuple(name for name, stem in stems.items() if stem == word) for word in words)
        return next((names for names in lists if names), ())

    has_years = not (root / SPLIT_FOLDER).is_dir()
    train, val, test = named("train", "trainval"), named("val", "valid", "validation"), named("test")
    if test and named("trainval") and (has_years or not val):  # the papers' sets, such as 07+12
        train, val, test = named("trainval"), test, ()
    # Beside the splits VOC has lists of each class, such as dog_train.
    others = [name for name, stem in stems.items() if not re.search(r"_(train|val|trainval|test)$", stem)]
    if not (train or val or test) and len(others) == 1:
        train = (others[0],)
    lists: dict[Split, tuple[str, ...]] = {"train": train, "val": val, "test": test}
    return {split: names for split, names in lists.items() if names}


def list_stems(root: Path) -> dict[str, str]:
    """Return the name of every list, with its year above year folders -> its name in ImageSets/Main."""
    if (root / SPLIT_FOLDER).is_dir():
        prefix_of_folder = {root: ""}
    else:
        folders = sorted(root.glob("VOC????")) or sorted(root.glob("VOCdevkit/VOC????"))
        prefix_of_folder = {folder: f"{folder.name[3:]}_" for folder in folders}
    return {
        f"{prefix}{file.stem}": file.stem
        for folder, prefix in prefix_of_folder.items()
        for file in sorted((folder / SPLIT_FOLDER).glob("*.txt"))
    }


class ListedImage(NamedTuple):
    """One image of a split, which may not exist."""

    image_folder: Path
    xml_folder: Path
    stem: str


def parse_voc(
    root: Path,
    splits: Sequence[str],
    *,
    class_names: Sequence[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> AnnotationSet:
    """Read the images of one or more splits as one set. Images without objects, or without an XML file, stay.

    VOC gives 1-based inclusive pixel indices: the left and top *edges* are one less, the right and bottom equal. A box
    whose xmin equals its xmax is a slip of the mouse in every set seen, so it counts as having no width. Image ids are
    1..N, category ids 1..K.

    Args:
        root: a folder with JPEGImages, Annotations and ImageSets/Main; one that holds VOC2007, VOC2012 ... (also below
            VOCdevkit); or one with XML files only.
        splits: names of lists in ImageSets/Main, such as "train"; with year folders "2007_trainval"; without lists the
            folder of the images, "." for `root`.
        class_names: as in `Source.read`; None takes all that occur, sorted.
        max_bad_fraction: as in `Source.read`.

    Raises:
        NoClassesError: no names are given, and there is no object.
    """
    source = f"{printable(root)} ({' + '.join(splits)})"
    if not splits:
        raise AnnotationError(f"{source}: no split is named; at least one is needed, such as train.")
    listed = list(dict.fromkeys(image for split in splits for image in _list_images(root, split)))
    columns, records, findings = _read_images(source, listed)
    require_images(source, len(records), findings, max_bad_fraction)
    objects = [item for record in records for item in record.objects]
    names = tuple(class_names) if class_names is not None else _sorted_names(source, objects)
    _refuse_unknown_names(source, objects, names)
    return build_annotation_set(
        source,
        columns,
        _object_columns(source, records, objects, names, findings),
        names,
        range(1, len(names) + 1),
        describe=lambda row: objects[row].text,
        findings=findings,
        max_bad_fraction=max_bad_fraction,
    )


def _list_images(root: Path, split: str) -> list[ListedImage]:
    """Return the images of a list, or of a folder if there are no lists."""
    year, _, name = split.partition("_")
    for folder, list_name in ((root, split), (root / f"VOC{year}", name), (root / "VOCdevkit" / f"VOC{year}", name)):
        if (folder / SPLIT_FOLDER).is_dir():
            stems = _read_list(folder / SPLIT_FOLDER, list_name)
            return [ListedImage(folder / "JPEGImages", folder / "Annotations", stem) for stem in stems]
    if not root.is_dir():
        raise AnnotationError(f"{printable(root)}: is not a folder; it must hold a VOC data set.\nCorrect data.path.")
    years = {name.partition("_")[0] for name in list_stems(root)}
    listed = [] if years or Path(split).name not in ("", split) else _list_folder(root / split)
    if not listed:
        problem = f"there is no {SPLIT_FOLDER} for split {split!r} in it (years found: {', '.join(years) or 'none'})"
        rule = f"a VOC folder has JPEGImages, Annotations and {SPLIT_FOLDER}; above year folders name 2007_trainval"
        raise malformed(printable(root), f"{problem}; {rule}", "Correct data.path, or the name of the split.")
    return listed


def _list_folder(folder: Path) -> list[ListedImage]:
    """Return all images of a folder without lists: XML files beside the images, or in Annotations."""
    for xml_folder in (folder, folder / "Annotations", folder / "annotations"):
        xml_stems = {Path(name).stem for name in list_files(xml_folder) if name.endswith(".xml")}
        if xml_stems:
            image_folders = [folder] if xml_folder == folder else [folder / "JPEGImages", folder / "images", folder]
            images = next((path for path in image_folders if _images_by_stem(path)), folder)
            return [ListedImage(images, xml_folder, stem) for stem in sorted(xml_stems | set(_images_by_stem(images)))]
    return []


def _read_list(lists: Path, split: str) -> list[str]:
    """Read one list: an image per line, perhaps followed by -1, 0 or 1 as in VOC's lists of one class."""
    path = lists / f"{split}.txt"
    known = ", ".join(sorted(printable(file.stem) for file in lists.glob("*.txt"))[:30]) or "none"
    if Path(split).name != split or not path.is_file():
        raise malformed(printable(path), "there is no such split list", f"The lists there are: {known}")
    text = read_text(path, AnnotationError, "a list of images", f"Use another list, or convert it to UTF-8: {known}")
    stems = [re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in text.splitlines()]
    for number, stem in enumerate(stems, start=1):
        if stem in (".", "..") or {"/", "\\", "\0"}.intersection(stem):
            rule = "a line must be the name of an image in JPEGImages without suffix and without folders"
            raise malformed(f"{printable(path)}:{number}", f"{stem!r:.200}: {rule}", "Correct the line.")
    if not any(stems):
        raise malformed(printable(path), "names no image", f"Use another list: {known}")
    return [stem for stem in stems if stem]


class VOCObject(NamedTuple):
    """One `object` element, as written."""

    place: str  # file and number of the object
    class_name: str
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax; 1-based, inclusive; NaN where not a number
    is_difficult: bool
    problem: str | None  # the rule that its bndbox breaks

    @property
    def text(self) -> str:
        """Place, class and corners."""
        written = ", ".join(f"{name} {value:g}" for name, value in zip(CORNERS, self.corners, strict=True))
        return f"{self.place} ({self.class_name}), {written}"


class VOCRecord(NamedTuple):
    """One XML file."""

    size: tuple[int, int] = (0, 0)  # (height, width); 0, 0 if not given
    objects: Sequence[VOCObject] = ()
    file_name: str = ""  # the image, as the file itself calls it


def _read_images(source: str, listed: list[ListedImage]) -> tuple[ImageColumns, list[VOCRecord], list[Finding]]:
    """Read the annotation of every image that is on disk. Skipped images are findings."""
    name_of_stem = {folder: _images_by_stem(folder) for folder in {image.image_folder for image in listed}}
    xml_names = {folder: list_files(folder) for folder in {image.xml_folder for image in listed}}
    paths: list[str] = []
    records: list[VOCRecord] = []
    findings: list[Finding] = []
    num_without_xml = num_renamed = 0
    for image_folder, xml_folder, stem in listed:
        name = name_of_stem[image_folder].get(stem)
        has_xml = f"{stem}.xml" in xml_names[xml_folder]
        if name is None:
            has_suffix = stem in name_of_stem[image_folder].values()
            problem = LISTED_WITH_SUFFIX if has_suffix else "there is no such image"
            findings.append(rules.IMAGE_MISSING.broken(printable(image_folder / stem), problem))
            continue
        xml = xml_folder / f"{stem}.xml"
        try:
            record = read_record(xml) if has_xml else VOCRecord()
        except AnnotationError as reason:
            rule = rules.XML_ENTITIES if "DOCTYPE" in str(reason) else rules.XML_MALFORMED
            findings.append(rule.broken_by(xml, reason))
            continue
        num_without_xml += not has_xml
        num_renamed += record.file_name != "" and Path(record.file_name).stem != stem
        paths.append(str(image_folder / name))
        records.append(record)
    findings += _about_names(source, num_without_xml, num_renamed, len(listed))
    sizes = np.array([record.size for record in records], dtype=np.int32).reshape(-1, 2)
    return ImageColumns(paths, np.arange(1, len(paths) + 1, dtype=np.int64), sizes), records, findings


def _images_by_stem(folder: Path) -> dict[str, str]:
    """Return stem -> file name of the images in a folder. Of several with one stem, the first known suffix counts."""
    rank = {suffix: place for place, suffix in enumerate(IMAGE_SUFFIXES)}
    images = [path for path in map(Path, list_files(folder)) if path.suffix.lower() in rank]
    images.sort(key=lambda path: (rank[path.suffix.lower()], path.name), reverse=True)
    return {path.stem: path.name for path in images}


def _about_names(source: str, num_without_xml: int, num_renamed: int, num_images: int) -> list[Finding]:
    """Report images without an XML file, which are negatives unless all are, and XML files of other names."""
    if num_without_xml == num_images:
        problem = f"none of the {num_images} images has an XML file in Annotations"
        raise malformed(source, problem, "Correct data.path, or put the annotations there.")
    counted = (
        (rules.NO_XML, num_without_xml, f"{num_without_xml} of {num_images} images have no XML file: without objects"),
        (rules.OTHER_FILE_NAME, num_renamed, f"in {num_renamed} XML files <filename> is not the name of the file"),
    )
    return [rule.broken(source, problem, number) for rule, number, problem in counted if number]


def read_record(path: Path) -> VOCRecord:
    """Parse one XML file.

    Raises:
        AnnotationError: it cannot be read, or is not such XML; `<path>[:line:column]: <problem>`.
    """
    content = read_file(path, AnnotationError, "a VOC annotation (XML)", "Export it again.", MAX_XML_BYTES)
    place = printable(path)
    try:
        root = fromstring(content, forbid_dtd=True)
    except ParseError as reason:
        line, column = reason.position
        text = content.decode(errors="replace")
        hint = "; it is not UTF-8: save it as UTF-8" if "\ufffd" in text else ""
        raise AnnotationError(f"{place}:{line}:{column + 1}: is not XML: {reason}{hint}") from None
    except DefusedXmlException:
        raise AnnotationError(f"{place}: has a DOCTYPE or entities, which no annotation needs: refused") from None
    except (ValueError, LookupError) as reason:  # an encoding that the parser does not know
        raise AnnotationError(f"{place}: cannot be decoded ({reason}); save it as UTF-8") from None
    if root.tag != "annotation":
        raise AnnotationError(f"{place}: its first element is {root.tag!r:.80}; in VOC it is 'annotation'")
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (int(height), int(width)) if 0 < height < 1 << 31 and 0 < width < 1 << 31 else (0, 0)
    objects = [_read_object(element, f"{place}: object {n}") for n, element in enumerate(root.findall("object"), 1)]
    return VOCRecord(size, objects, (root.findtext("filename") or "").strip())


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
    """Return a number, or NaN for any other text."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _sorted_names(source: str, objects: list[VOCObject]) -> tuple[str, ...]:
    """Return the class names that occur."""
    names = sorted({item.class_name for item in objects if item.class_name})
    if not names:
        raise NoClassesError(f"{source}: holds no object, so there are no classes.\nGive data.class_names.")
    return tuple(names)


def _refuse_unknown_names(source: str, objects: list[VOCObject], class_names: Sequence[str]) -> None:
    """Raise if there are class names that are not expected."""
    known = {*class_names, ""}
    unknown = {item.class_name: item for item in objects if item.class_name not in known}
    if unknown:
        lines = []
        for name, item in sorted(unknown.items())[:NUM_EXAMPLES]:
            nearest = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
            lines.append(f"{item.place}: {name!r} (nearest: {', '.join(map(repr, nearest)) or 'none'})")
        lines += [""] * (len(unknown) - len(lines))  # counted, not quoted
        problem = f"{len(unknown)} class names are not among {', '.join(class_names)}"
        raise malformed(source, problem, "Correct the names, or add them to data.class_names.", lines)


def _object_columns(
    source: str,
    records: list[VOCRecord],
    objects: list[VOCObject],
    class_names: Sequence[str],
    findings: list[Finding],
) -> ObjectColumns:
    """Flatten the objects, and turn pixel indices into edges."""
    label_of_name = {name: label for label, name in enumerate(class_names)}
    boxes = np.array([item.corners for item in objects], dtype=np.float64).reshape(-1, 4)
    num_zero_based = int(np.count_nonzero((boxes[:, :2] == 0).any(axis=1)))
    if num_zero_based:
        problem = f"{num_zero_based} boxes start at pixel 0, though VOC counts from 1: clipped"
        findings.append(rules.ZERO_BASED.broken(source, problem, num_zero_based))
    boxes[:, :2] -= 1
    image_rows = np.repeat(np.arange(len(records)), [len(record.objects) for record in records]).astype(np.int64)
    labels = np.array([label_of_name.get(item.class_name, 0) for item in objects], dtype=np.int64)
    is_difficult = np.array([item.is_difficult for item in objects], dtype=np.bool_)
    problems = {row: item.problem for row, item in enumerate(objects) if item.problem}
    return ObjectColumns(image_rows, boxes, labels, problems, is_difficult=is_difficult)
