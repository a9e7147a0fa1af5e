"""Read PASCAL VOC annotations (devkit of VOC2012, section 4): one XML file per image."""

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

import onestage.data.annotations as rules
from onestage.data.annotations import malformed, shortened, with_nearest
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.label_files import LabelFile, LabelFormat, LabelledImage, WrittenObject, read_label_files
from onestage.data.source import Source, Split, names_by_role, role_of
from onestage.errors import AnnotationError, require
from onestage.files import as_path, list_files, printable, read_file, read_text, to_flag, to_number
from onestage.types import AnnotationSet

SPLIT_FOLDER = Path("ImageSets", "Main")
CLASS_LIST = re.compile(r"_(train|val|trainval|test)$")
ALL_IMAGES = "."  # name of the split of a folder without lists
CORNERS = ("xmin", "ymin", "xmax", "ymax")
LABEL_FORMAT = LabelFormat(
    rules.NO_XML,
    rules.XML_MALFORMED,
    {
        rules.OTHER_FILE_NAME: "in {} XML files <filename> is not the name of the file",
        rules.ZERO_BASED: "{} boxes start at pixel 0, though VOC counts from 1: clipped",
    },
)
MAX_XML_BYTES = 16 << 20  # some 50,000 objects; a file of VOC has a few kB


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
        self.path = as_path(path)
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

    def unused(self) -> list[str]:
        """Return the lists that belong to no split, without those of one class and those that overlap by definition."""
        used = {name for split in self._given for name in self.lists(split)}
        files = (
            (name, file)
            for name, file in find_list_files(self.path).items()
            if file.stem not in ("train", "val", "trainval")
        )
        return [printable(file) for name, file in files if name not in used and not CLASS_LIST.search(file.stem)]

    def lists(self, split: Split) -> tuple[str, ...]:
        """Return the names of the lists of a split; empty if there are none."""
        given = self._given[split]
        return tuple(given) if given is not None else find_lists(self.path).get(split, ())


def find_lists(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the lists of each split by role. If no name tells the role, a single list is the training split."""
    files = find_list_files(root)
    if not files:
        folders = names_by_role(path.name for path in root.glob("*/") if role_of(path.name) and _list_folder(path))
        found: dict[str, tuple[str, ...]] = {role: (name,) for role, name in folders.items()}
        return found or ({"train": (ALL_IMAGES,)} if _list_folder(root) else {})
    by_stem: dict[str, list[str]] = {}
    for name, file in files.items():
        if not CLASS_LIST.search(file.stem):
            by_stem.setdefault(file.stem, []).append(name)
    stems = names_by_role(by_stem)
    has_years = not (root / SPLIT_FOLDER).is_dir()
    if "test" in by_stem and "trainval" in by_stem and (has_years or "val" not in stems):  # the papers', such as 07+12
        stems = {"train": "trainval", "val": "test"}
    if not stems and len(by_stem) == 1:
        stems = {"train": next(iter(by_stem))}
    return {role: tuple(by_stem[stem]) for role, stem in stems.items()}


def find_list_files(root: Path) -> dict[str, Path]:
    """Return the lists in ImageSets/Main by name; above year folders the name has the year: 2007_trainval."""
    folders = [root]
    if not (root / SPLIT_FOLDER).is_dir():
        folders = sorted(root.glob("VOC????")) or sorted(root.glob("VOCdevkit/VOC????"))
    files = [file for folder in folders for file in sorted((folder / SPLIT_FOLDER).glob("*.txt"))]
    return {file.stem if folders == [root] else f"{file.parents[2].name[3:]}_{file.stem}": file for file in files}


def parse_voc(
    root: Path, splits: Sequence[str], *, class_names: Sequence[str] | None = None, max_bad_fraction: float = 0.01
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
    """
    source = f"{printable(root)} ({' + '.join(splits)})"
    listed = list(dict.fromkeys(image for split in splits for image in _list_images(root, split)))
    names = list(class_names or ())

    def find_classes(objects: Sequence[WrittenObject]) -> dict[str | float, int]:
        found = {str(item.class_key): item.text for item in reversed(objects) if item.class_key}
        names.extend(sorted(found) if class_names is None else ())
        label_of_name: dict[str | float, int] = {name: label for label, name in enumerate(names)}
        unknown = sorted(found.keys() - label_of_name.keys())
        if unknown:
            lines = [f"{found[name]}: {text}" for name, text in zip(unknown, with_nearest(unknown, names), strict=True)]
            problem = f"{len(unknown)} class names are not among {shortened(names, 100)}"
            raise malformed(source, problem, "Correct the names, or add them to data.class_names.", lines)
        return label_of_name

    def read(row: int) -> LabelFile:
        return read_record(listed[row].label)

    return read_label_files(source, root, listed, read, find_classes, names, LABEL_FORMAT, max_bad_fraction)


def _list_images(root: Path, split: str) -> list[LabelledImage]:
    """Return the images of a list, or of a folder if there are no lists."""
    lists = find_list_files(root)
    if split in lists:
        folder = lists[split].parents[2]
        return _pair(folder / "JPEGImages", folder / "Annotations", _read_list(lists[split]))
    listed = _list_folder(root / split) if not lists and Path(split).name in ("", split) else []
    if not listed:
        found = ", ".join(list(lists)[:30]) or ("none" if root.is_dir() else "no such folder")
        problem = f"there is no list {split!r} in {SPLIT_FOLDER}; there are: {found}"
        remedy = "Correct data.path, or the name of the split; or hold out a part of another: data.val_fraction: 0.2"
        raise malformed(printable(root), problem, remedy)
    return listed


def _list_folder(folder: Path) -> list[LabelledImage]:
    """Return all images of a folder without lists: XML files beside the images, or in Annotations."""
    for xml_folder in (folder, folder / "Annotations", folder / "annotations"):
        stems = {Path(name).stem for name in list_files(xml_folder) if name.endswith(".xml")}
        if stems:
            image_folders = [folder] if xml_folder == folder else [folder / "JPEGImages", folder / "images", folder]
            images = next((path for path in image_folders if _images_by_stem(path)), folder)
            return _pair(images, xml_folder, sorted(stems | set(_images_by_stem(images))))
    nested = [item for path in sorted(folder.glob("*/")) for item in _list_folder(path)]  # one for each camera, say
    return nested if any(not item.is_missing for item in nested) else []


def _pair(image_folder: Path, xml_folder: Path, stems: Sequence[str]) -> list[LabelledImage]:
    """Return the image and the XML file of each stem."""
    names = _images_by_stem(image_folder)
    stem_of_file = {name: stem for stem, name in names.items()}  # some lists have names with suffix
    stems = [stem if stem in names else stem_of_file.get(stem, stem) for stem in stems]
    return [
        LabelledImage(image_folder / names.get(stem, stem), xml_folder / f"{stem}.xml", stem not in names)
        for stem in stems
    ]


def _images_by_stem(folder: Path) -> dict[str, str]:
    """Return stem -> file name of the images in a folder. Of several with one stem, the first known suffix counts."""
    rank = {suffix: place for place, suffix in enumerate(IMAGE_SUFFIXES)}
    images = [path for path in map(Path, list_files(folder)) if path.suffix.lower() in rank]
    images.sort(key=lambda path: (rank[path.suffix.lower()], path.name), reverse=True)
    return {path.stem: path.name for path in images}


def _read_list(path: Path) -> list[str]:
    """Read one list: an image per line, perhaps followed by -1, 0 or 1 as in VOC's lists of one class.

    The folder JPEGImages before a name, with whatever stands before it, does not count.
    """
    text = read_text(path, AnnotationError, "a list of images", "Use another list, or convert it to UTF-8.")
    stems = [re.sub(r"^.*JPEGImages[/\\]|\s+(-1|0|1)$", "", line.strip()) for line in text.splitlines()]
    for number, stem in enumerate(stems, start=1):
        if stem in (".", "..") or {"/", "\\", "\0"}.intersection(stem):
            rule = "a line must be the name of an image in JPEGImages without suffix and without folders"
            raise malformed(f"{printable(path)}:{number}", f"{stem!r:.200}: {rule}", "Correct the line.")
    if not any(stems):
        raise malformed(printable(path), "names no image", "Use another list: data.source.train, data.source.val")
    return [stem for stem in stems if stem]


def read_record(path: Path) -> LabelFile:
    """Parse one XML file.

    Raises:
        AnnotationError: it cannot be read, or is not such XML; the message has line and column.
    """
    content = read_file(path, AnnotationError, "a VOC annotation (XML)", rules.XML_MALFORMED.remedy, MAX_XML_BYTES)
    place = printable(path)
    try:
        root = fromstring(content, forbid_dtd=True)
    except DefusedXmlException:
        problem = "has a DOCTYPE or entities, which can read other files and fill memory: refused"
        raise malformed(place, problem, "Check its origin.") from None
    except (ParseError, ValueError, LookupError) as reason:  # the others: an encoding that the parser does not know
        raise malformed(place, f"is not XML: {reason}", "Export it again, as UTF-8.") from None
    if root.tag != "annotation":
        raise malformed(place, f"its first element is {root.tag!r:.80}; in VOC it is 'annotation'", "Export it again.")
    height, width = (to_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (int(height), int(width)) if 0 < height < 1 << 31 and 0 < width < 1 << 31 else (0, 0)
    objects = [_read_object(element, f"{place}: object {n}") for n, element in enumerate(root.findall("object"), 1)]
    file_name = (root.findtext("filename") or "").strip()
    notes = {
        rules.OTHER_FILE_NAME: int(file_name != "" and Path(file_name).stem != path.stem),
        rules.ZERO_BASED: sum(min(item.box[:2]) == -1 for item in objects),
    }
    return LabelFile(objects, size, notes)


def _read_object(element: Element, place: str) -> WrittenObject:
    """Read one object. Only its own bndbox counts: the `part` elements of a person have their own."""
    name = printable((element.findtext("name") or "").strip())
    box = xmin, ymin, xmax, ymax = tuple(to_number(element.findtext(f"bndbox/{corner}")) for corner in CORNERS)
    problem = None
    if not name:
        problem = "an object must have a name"
    elif not isfinite(sum(box)):
        problem = "its bndbox must hold a finite number for each of xmin, ymin, xmax, ymax"
    elif xmin >= xmax or ymin >= ymax:
        problem = "xmin < xmax and ymin < ymax must hold"
    written = ", ".join(f"{corner} {value:g}" for corner, value in zip(CORNERS, box, strict=True))
    is_difficult = to_flag(element.findtext("difficult"))
    return WrittenObject(f"{place} ({name}), {written}", name, (xmin - 1, ymin - 1, xmax, ymax), problem, is_difficult)
