"""Read PASCAL VOC annotations (devkit of VOC2012, section 4): one XML file per image."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

import onestage.data.annotations as rules
from onestage.data.annotations import malformed
from onestage.data.folder import find_images
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.label_files import LabelFile, LabelledImage, WrittenObject, read_label_files
from onestage.data.source import Source, Split, names_by_role, role_of
from onestage.errors import AnnotationError, require
from onestage.files import (
    as_path,
    foreign_parts,
    is_hidden,
    list_files,
    only_folder,
    printable,
    read_file,
    read_text,
    spellings,
    to_flag,
    to_number,
)
from onestage.types import AnnotationSet

SPLIT_FOLDER = Path("ImageSets", "Main")
IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "image", "imgs", "img", "data", ".")  # "." last: beside XML files
XML_FOLDERS = ("Annotations", "annotations", "Annotation", "annotation", "annots", "labels", "xmls", "xml", ".")
ALL_IMAGES = "."  # name of the split of a folder without lists
CORNERS = ("xmin", "ymin", "xmax", "ymax")
LIST_EXTRAS = re.compile(r"^.*JPEGImages[/\\]|\s+(-1|0|1|\S+\.xml)$")
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

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the XML files of a split."""
        return parse_voc(self.path, self.lists(split) or (split,), class_names)

    def describe(self, split: Split) -> str:
        """Return the lists of a split."""
        names = " + ".join(self.lists(split))
        return f"{printable(self.path)} ({'all images' if names == ALL_IMAGES else names})"

    def unused(self) -> list[str]:
        """Return the lists that belong to no split, without those of one class and those that overlap by definition."""
        used = {name for split in self._given for name in self.lists(split)}
        others = [file for name, file in _without_classes(find_list_files(self.path)).items() if name not in used]
        return [printable(file) for file in others if file.stem not in ("train", "val", "trainval")]

    def lists(self, split: Split) -> tuple[str, ...]:
        """Return the names of the lists of a split; empty if there are none."""
        given = self._given[split]
        return tuple(given) if given is not None else self._found.get(split, ())

    @cached_property
    def _found(self) -> dict[str, tuple[str, ...]]:
        return find_lists(self.path)  # walks all folders where there are no lists


def find_lists(root: Path) -> dict[str, tuple[str, ...]]:
    """Return the lists of each split by role. If no name tells the role, a single list is the training split."""
    files = find_list_files(root)
    if not files and only_folder(root):  # `recognise` goes on there, where its folders may be splits
        return {}
    if not files:
        folders = names_by_role(path.name for path in root.glob("*/") if role_of(path.name) and _list_folder(path))
        found: dict[str, tuple[str, ...]] = {role: (name,) for role, name in folders.items()}
        is_rest = not found or ("train" not in found and _xml_folder(root) is not None)
        return ({"train": (ALL_IMAGES,)} if is_rest and _list_folder(root) else {}) | found
    lists = _without_classes(files)
    all_stems = {file.stem for file in lists.values()}
    stems = names_by_role(all_stems)
    has_years = not (root / SPLIT_FOLDER).is_dir()
    if all_stems >= {"test", "trainval"} and (has_years or "val" not in stems):  # the papers', such as 07+12
        stems = {"train": "trainval", "val": "test"}
    if not stems and len(all_stems) == 1:
        stems = {"train": all_stems.pop()}
    return {role: tuple(name for name, file in lists.items() if file.stem == stem) for role, stem in stems.items()}


def find_list_files(root: Path) -> dict[str, Path]:
    """Return the lists in ImageSets/Main by name; above year folders the name has the year: 2007_trainval.

    Some tools write the lists into ImageSets, or beside the folder of the XML files.
    """
    folders = [root]
    if not (root / SPLIT_FOLDER).is_dir():
        folders = sorted(root.glob("VOC????")) or sorted(root.glob("VOCdevkit/VOC????")) or [root]
    lists = [file for folder in folders for file in sorted((folder / SPLIT_FOLDER).glob("*.txt"))]
    lists = lists or sorted((root / SPLIT_FOLDER.parent).glob("*.txt"))
    if not lists and _xml_folder(root) not in (None, root):
        lists = sorted(file for file in root.glob("*.txt") if role_of(file.stem))
    files = [file for file in lists if not is_hidden(file.name)]
    return {file.stem if folders == [root] else f"{_set_of(file).name[3:]}_{file.stem}": file for file in files}


def _set_of(file: Path) -> Path:
    return next(folder for folder in file.parents if folder.name not in SPLIT_FOLDER.parts)


def _without_classes(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the lists without those of one class: dog_train beside train."""
    stems = {file.stem for file in files.values()}
    is_of_class = {s: any(s[place + 1 :] in stems for place, sign in enumerate(s) if sign == "_") for s in stems}
    return {name: file for name, file in files.items() if not is_of_class[file.stem]}


def parse_voc(root: Path, splits: Sequence[str], class_names: Sequence[str] | None = None) -> AnnotationSet:
    """Read the images of one or more splits as one set. Images without objects, or without an XML file, stay.

    VOC gives 1-based inclusive pixel indices: the left and top *edges* are one less, the right and bottom equal. A box
    whose xmin equals its xmax is a slip of the mouse in every set seen, so it counts as having no width. Image ids are
    1..N, category ids 1..K.

    splits: names of lists in ImageSets/Main, such as "train"; with year folders "2007_trainval"; without lists the
    folder of the images, "." for `root`. class_names: as in `Source.read`; None takes all that occur, sorted.
    """
    source = f"{printable(root)} ({' + '.join(splits)})"
    listed = list(dict.fromkeys(image for split in splits for image in _list_images(root, split)))
    return read_label_files(source, root, listed, lambda _, xml: read_record(xml) if xml else LabelFile(), class_names)


def _list_images(root: Path, split: str) -> list[LabelledImage]:
    """Return the images of a list, or of a folder if there are no lists."""
    lists = find_list_files(root)
    if split in lists:
        folder = _set_of(lists[split])
        images, xmls = _image_folder(folder), _xml_folder(folder) or folder / XML_FOLDERS[0]
        return _pair(images, xmls, _read_list(lists[split]))
    listed = _list_folder(root / split) if not lists and Path(split).name in ("", split) else []
    if not listed:
        found = ", ".join(list(lists)[:30]) or ("none" if root.is_dir() else "no such folder")
        problem = f"there is no list {split!r} in {SPLIT_FOLDER}; there are: {found}"
        remedy = "Correct data.path, or the name of the split; or hold out a part of another: data.val_fraction: 0.2"
        raise malformed(printable(root), problem, remedy)
    return listed


def _list_folder(folder: Path) -> list[LabelledImage]:
    """Return all images of a folder without lists: XML files beside the images, or in Annotations."""
    xmls = _xml_folder(folder)
    if xmls is None:  # a folder for each camera, say
        return [item for path in sorted(folder.glob("*/")) for item in _list_folder(path)]
    images = folder if xmls == folder else _image_folder(folder)
    stems = {path[:-4] for path in _list_below(xmls, (".xml",), is_deep=xmls != folder)}
    stems_of_images = _images_by_stem(images, is_deep=images != folder).keys()
    return _pair(images, xmls, sorted(stems | stems_of_images)) if stems & stems_of_images else []


def _xml_folder(folder: Path) -> Path | None:
    folders = (folder / name for name in XML_FOLDERS)
    is_xml = (".xml", ".XML")
    return next((path for path in folders if any(name.endswith(is_xml) for name in list_files(path))), None)


def _image_folder(folder: Path) -> Path:
    """Return the folder of the images of a data set; the usual one if there is none."""
    folders = (folder / name for name in IMAGE_FOLDERS)
    return next((path for path in folders if _images_by_stem(path)), folder / IMAGE_FOLDERS[0])


def _pair(image_folder: Path, xml_folder: Path, lines: Sequence[str]) -> list[LabelledImage]:
    """Return the image and the XML file of each line.

    A line is a stem, perhaps with a suffix, the folders of another machine, or what else lists hold.
    """
    names = _images_by_stem(image_folder)
    stem_of = {form: stem for stem, name in names.items() for form in (f"{stem}.xml", name)}
    stem_of |= {stem: stem for stem in names}

    def find_stem(line: str) -> str:
        if line in stem_of:
            return stem_of[line]
        texts = line, re.sub(LIST_EXTRAS, "", line)  # "a 1" may be a name
        for *folders, name in filter(None, map(foreign_parts, texts)):
            for form in spellings(name):
                for start in range(len(folders) + 1):
                    if stem := stem_of.get("/".join((*folders[start:], form))):
                        return stem
        return name

    return [
        LabelledImage(image_folder / names.get(stem, stem), xml_folder / f"{stem}.xml", stem not in names)
        for stem in map(find_stem, lines)
    ]


def _images_by_stem(folder: Path, is_deep: bool = True) -> dict[str, str]:
    """Return stem -> name of the images in a folder, and perhaps below it: sub/a -> sub/a.jpg."""
    names = sorted(_list_below(folder, IMAGE_SUFFIXES, is_deep), reverse=True)  # a.jpg counts, not a.png
    return {Path(name).with_suffix("").as_posix(): name for name in names}


def _list_below(folder: Path, suffixes: tuple[str, ...], is_deep: bool) -> list[str]:
    """Return the names of the files in a folder, and perhaps below it, that have one of the suffixes."""
    if is_deep and folder.is_dir():
        return [path.relative_to(folder).as_posix() for path in find_images(folder, suffixes)]
    return [name for name in list_files(folder) if not is_hidden(name) and name.lower().endswith(suffixes)]


def _read_list(path: Path) -> list[str]:
    """Read one list: an image per line, perhaps followed by -1, 0 or 1 as in VOC's lists of a class, or by an XML file.

    The folder JPEGImages before a name, with whatever stands before it, does not count.
    """
    text = read_text(path, AnnotationError, "a list of images", "Use another list, or convert it to UTF-8.")
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and not foreign_parts(re.sub(LIST_EXTRAS, "", line)):
            rule = "a line must be the name of an image in JPEGImages"
            raise malformed(f"{printable(path)}:{number}", f"{line!r:.200}: {rule}", "Correct the line.")
    if not any(lines):
        raise malformed(printable(path), "names no image", "Use another list: data.source.train, data.source.val")
    return [line for line in lines if line]


def read_record(path: Path) -> LabelFile:
    """Parse one XML file; AnnotationError, with line and column, if it cannot be read or is not such XML."""
    content = read_file(path, AnnotationError, "a VOC annotation (XML)", rules.LABEL_MALFORMED.remedy, MAX_XML_BYTES)
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
    objects = [
        _read_object(element, corners, f"{place}: object {n}")
        for n, element in enumerate(root.findall("object"), 1)
        for corners in element.findall("bndbox") or [element]  # some tools write two; without one, there are no corners
    ]
    return LabelFile(objects, size, {rules.ZERO_BASED: sum(min(item.box[:2]) == -1 for item in objects)})


def _read_object(element: Element, corners: Element, place: str) -> WrittenObject:
    """Read one object. Only its own bndbox counts: the `part` elements of a person have their own."""
    name = printable((element.findtext("name") or "").strip())
    box = xmin, ymin, xmax, ymax = tuple(to_number(corners.findtext(corner)) for corner in CORNERS)
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
