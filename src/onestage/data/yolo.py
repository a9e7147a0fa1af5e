"""Read YOLO txt labels: a line `class cx cy width height` per object, in fractions of the image."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import onestage.data.annotations as rules
from onestage.data.annotations import malformed, require_known_names, shortened
from onestage.data.folder import find_images
from onestage.data.image_headers import check_header
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.label_files import LabelFile, LabelledImage, WrittenObject, read_label_files
from onestage.data.source import Source, Split, names_by_role, role_of
from onestage.errors import AnnotationError
from onestage.files import (
    as_path,
    find_below,
    foreign_parts,
    is_hidden,
    is_path,
    printable,
    read_file,
    read_text,
    refuse_repeated_keys,
    spellings,
    to_number,
)
from onestage.types import AnnotationSet, Finding, JSONDict

SETTINGS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "yolo.yaml")  # or any other YAML file with names
NAMES_KEY = re.compile(rb"^[\"']?names[\"']?\s*:", re.MULTILINE)
DARKNET_FILE = "obj.data"  # of CVAT and darknet: names, train and valid
NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels", "train/_darknet.labels")
DEEP_NAMES_FILES = ("*/classes.txt", "*/*/classes.txt")  # as LabelImg writes them beside the labels of each folder
LABEL_FOLDERS = {"images": "labels", "Images": "Labels", "IMAGES": "LABELS"}
DEEP_YAML = re.compile(rb"(?:[\[{]\s*){10}")  # thousands of brackets take the parser seconds; data.yaml has 2
CLASS_INDEX = re.compile(r"^\s*(\d{1,4})(?:\.0*)?\s", re.MULTILINE)  # larger ones are no class indices
MAX_SETTINGS_BYTES = 1 << 20  # ten thousand classes take a fifth of it
MAX_SEARCHED = 100  # images of which one must have a label, to take a folder for YOLO's
TOLERANCE = 1e-3  # of rounding, in fractions of the image


class YOLOSettings(NamedTuple):
    """Content of data.yaml."""

    source: str  # the file or folder, for messages
    root: Path  # what paths are relative to
    class_names: list[str]  # [K] in order of class index
    entries: Mapping[str, Sequence[str]]  # name of a split -> its folders and lists of images
    num_keypoint_values: int = 0  # numbers after each box in a pose data set
    is_named: bool = True  # by a file, and not class_0, class_1, ...


class YOLO(Source):
    """YOLO txt labels: the splits that data.yaml names, or images/<split> and labels/<split>, or all of images/.

    Args:
        path: data.yaml, or the folder of the data set; see `read_settings`.
        train: name of the training split.
        val: name of the validation split; val also finds valid, validation and val2017.
        test: name of the test split.
    """

    format = "YOLO"

    def __init__(self, path: str | Path, *, train: str = "train", val: str = "val", test: str = "test") -> None:
        self.path = as_path(path)
        self._names: dict[Split, str] = {"train": train, "val": val, "test": test}

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that data.yaml names or whose folders exist."""
        try:
            found = {split: self._entries(split) for split in self._names}
            if not any(entry == "." or find_below(self._settings.root, entry) for entry in found["test"]):
                found["test"] = ()  # Roboflow always names one
            return tuple(split for split, entries in found.items() if entries)
        except AnnotationError:  # `read` reports it
            return ("train",)

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the label files of a split. Images without one, or with an empty one, stay as images without objects.

        A label is `class cx cy width height`, in fractions of the upright image; the outline of a segmentation data
        set becomes the box around it. Image ids are 1..N in order of path, category ids 1..K.
        """
        settings, name = self._settings, self._names[split]
        names = list(class_names or settings.class_names)
        source = f"{settings.source} ({name})"
        notices = require_known_names(source, settings.class_names, names)

        def read(image: Path, label: Path | None) -> LabelFile | Finding:
            header = check_header(str(image))
            if not header.is_usable:
                return header.findings[0]
            size = (header.height, header.width)
            return _read_label(label, size, settings) if label is not None else LabelFile(size=size)

        found = read_label_files(source, settings.root, list_split(settings, name), read, names)
        if not settings.is_named:
            problem = f"nothing names the {len(names)} classes: they are called {shortened(names)}"
            notices.append(rules.NO_NAMES.broken(source, problem))
        return replace(found, findings=(*found.findings, *notices))

    def describe(self, split: Split) -> str:
        """Return the settings file or folder, and the folders and lists of a split."""
        return f"{self._settings.source} ({', '.join(self._entries(split))})"

    def unused(self) -> list[str]:
        """Return the entries that belong to no split, such as `valid` beside `val`, and the lists that are no entry."""
        root, entries = self._settings.root, self._settings.entries
        used = list(map(self._entries, self.splits))
        unused = [f"{name}: {', '.join(entry)}" for name, entry in entries.items() if entry not in used]
        files = {Path(entry).name for entry in chain(*entries.values())}
        return unused + sorted(
            file.name for file in root.glob("*.txt") if role_of(file.stem) and file.name not in files
        )

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """The names of data.yaml or classes.txt."""
        try:
            names = tuple(self._settings.class_names)
        except AnnotationError:
            return None
        return names, tuple(range(1, len(names) + 1))

    @cached_property
    def _settings(self) -> YOLOSettings:
        return read_settings(self.path)

    def _entries(self, split: Split) -> Sequence[str]:
        return find_entries(self._settings, self._names[split])


def read_settings(data: Path) -> YOLOSettings:
    """Read data.yaml or obj.data, or derive their content from the folder.

    data: the YAML file; or a folder that holds one (data.yaml, dataset.yaml or yolo.yaml), or obj.data, or else
    classes.txt or obj.names with a name on each line. Without any of these, the largest class index in the label files
    tells how many classes there are, and they are called class_0, class_1, ... Raises AnnotationError if the file is
    missing or malformed, or its classes are incomplete.
    """
    if not data.is_dir():
        return _read_yaml(data)
    files = _settings_files(data)
    if len(files) > 1:
        problem = f"{', '.join(file.name for file in files[:5])} all have names of classes"
        raise malformed(printable(data), problem, f"Give one of them: data.path: {printable(files[0])}")
    if files:
        return _read_yaml(files[0])
    entries, names_file = _folder_entries(data), _find_names_file(data)
    if (data / DARKNET_FILE).is_file():
        lines = _read_lines(data / DARKNET_FILE, "the settings of a YOLO data set", "Correct the file, or remove it.")
        given = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines.values())}
        names_file = find_below(data, given.get("names")) or names_file
        lists = {key: [given[key]] for key in ("train", "valid", "test") if find_below(data, given.get(key))}
        entries = lists or entries
    if names_file is None:
        settings = YOLOSettings(printable(data), data, [], entries, is_named=False)
        return settings._replace(class_names=[f"class_{index}" for index in range(_count_classes(settings))])
    remedy = "Write a class name on each line."
    text = read_text(names_file, AnnotationError, "the class names of a YOLO data set", remedy)
    names = text.rstrip().splitlines()  # a blank line between them is a class without name, which is refused
    return YOLOSettings(printable(data), data, _checked_names(printable(names_file), names), entries)


def _find_names_file(folder: Path) -> Path | None:
    """Return the file of class names in a folder; raise AnnotationError if several name other classes."""
    for pattern in (*NAMES_FILES, *DEEP_NAMES_FILES):
        files = sorted(file for file in folder.glob(pattern) if file.is_file())
        if len({file.read_bytes() for file in files}) > 1:
            problem = f"{len(files)} files of class names differ: {shortened([printable(file) for file in files])}"
            remedy = f"Put the right one there: {printable(folder / NAMES_FILES[0])}"
            raise malformed(printable(folder), problem, remedy)
        if files:
            return files[0]
    return None


def has_settings(folder: Path) -> bool:
    """Tell whether a folder holds data.yaml, obj.data or class names."""
    return any((folder / name).is_file() for name in (DARKNET_FILE, *NAMES_FILES)) or bool(_settings_files(folder))


def _settings_files(folder: Path) -> list[Path]:
    """Return data.yaml, or what it may be called: the YAML files of a folder that have a key names."""
    usual = (folder / name for name in SETTINGS_FILES)
    if first := next((file for file in usual if file.is_file()), None):
        return [first]
    files = (file for file in sorted(folder.glob("*.[yY]*[mM][lL]")) if file.is_file() and not is_hidden(file.name))
    return [file for file in files if NAMES_KEY.search(file.read_bytes()[:MAX_SETTINGS_BYTES])]


def has_labels(folder: Path) -> bool:
    """Tell whether one of the first images of a folder has a label file."""
    entries = _folder_entries(folder).values()
    folders = (folder / entry if (folder / entry).is_dir() else folder for (entry,) in entries)  # else a list
    images = (image for path in folders for image in find_images(path)[:MAX_SEARCHED])
    return any(_stored(_label_folder(image.parent, folder) / f"{image.stem}.txt") is not None for image in images)


def _stored(label: Path) -> Path | None:
    """Return a label file as it is called on the disk, such as A.TXT for A.txt, or None."""
    return next((file for form in spellings(label.name) if (file := label.with_name(form)).is_file()), None)


def find_entries(settings: YOLOSettings, split: str) -> Sequence[str]:
    """Return the folders and lists of a split, which may be named otherwise (`valid` for val); empty if none."""
    name = split if split in settings.entries else names_by_role(settings.entries).get(split)
    return settings.entries[name] if name is not None else ()


def list_split(settings: YOLOSettings, split: str) -> list[LabelledImage]:
    """Return the images of a split, sorted by path, and their label files.

    A label lies in the folder `labels` that stands beside the image's last folder `images`, or else below `labels` of
    the root, or else beside the image. Raises AnnotationError if the split is missing or empty.
    """
    entries = find_entries(settings, split)
    if not entries:
        where = f"there are: {', '.join(settings.entries) or 'none'}"
        problem, remedy = f"has no split {split!r} ({where})", f"Name its images with {split}: in data.yaml."
        raise malformed(settings.source, problem, remedy)
    images = {image: is_there for entry in entries for image, is_there in _list_entry(settings, entry).items()}
    if not images:
        problem = f"the split {split!r} holds no image ({' '.join(IMAGE_SUFFIXES)})"
        raise malformed(settings.source, problem, "Correct the path of the split.")
    labels = {folder: _label_folder(folder, settings.root) for folder in {image.parent for image in images}}
    return [
        LabelledImage(image, labels[image.parent] / f"{image.stem}.txt", not images[image]) for image in sorted(images)
    ]


def _folder_entries(root: Path) -> dict[str, list[str]]:
    """Return images/<split>, <split>/images, <split> or <split>.txt of a folder; train may be all other images."""
    found: dict[str, Path] = {}
    for pattern in ("[iI]mages/*/", "*/[iI]mages/", "*/", "*.txt"):
        named = ((path.parent if path.name in LABEL_FOLDERS else path, path) for path in root.glob(pattern))
        roles = {owner.stem: path for owner, path in named if owner != root and role_of(owner.stem)}
        found = {name: path for name, path in roles.items() if _has_images(path, root)} | found
        if "train" in map(role_of, found):
            break
    else:
        taken = {folder for path in found.values() for folder in (path, *path.parents)}
        free = (path for name in (*LABEL_FOLDERS, "obj_train_data", ".") if (path := root / name) not in taken)
        if rest := next((path for path in free if path.is_dir() and find_images(path)), None):
            found["train"] = rest
    return {name: [path.relative_to(root).as_posix()] for name, path in found.items()}


def _has_images(path: Path, root: Path) -> bool:
    """Tell whether a folder holds an image, or a line of a list names one that is there."""
    if path.is_dir():
        return bool(find_images(path))
    with suppress(AnnotationError):
        lines = _read_lines(path, "a list of images", "").values()
        return any(line.lower().endswith(IMAGE_SUFFIXES) and find_below(root, line) is not None for line in lines)
    return False


def _count_classes(settings: YOLOSettings) -> int:
    """Return the largest class index of all label files plus one; AnnotationError if there is no label."""
    largest = -1
    for label in {item.label for split in settings.entries for item in list_split(settings, split)}:
        with suppress(AnnotationError):  # reading the split reports it
            file = _stored(label)
            text = read_text(file, AnnotationError, "a YOLO label file", "") if file is not None else ""
            largest = max([largest, *map(int, CLASS_INDEX.findall(text))])
    if largest < 0:
        problem = "names no classes, and no label file has any"
        raise malformed(settings.source, problem, f"Put {SETTINGS_FILES[0]} or {NAMES_FILES[0]} there.")
    return largest + 1


def _read_lines(file: Path, noun: str, remedy: str) -> dict[int, str]:
    """Return the lines of a UTF-8 text file that are not blank, stripped, by their number in the file."""
    lines = read_text(file, AnnotationError, noun, remedy).splitlines()
    return {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}


def _read_yaml(file: Path) -> YOLOSettings:
    source, remedy = printable(file), "Give the data.yaml of the data set, or its folder: data.path"
    content = read_file(file, AnnotationError, "a YOLO data set's settings (YAML)", remedy, MAX_SETTINGS_BYTES)
    settings = _parse_yaml(source, content)
    root, keypoints = settings.get("path") or ".", settings.get("kpt_shape") or ["0", "0"]
    if "names" not in settings:
        raise malformed(source, "has no 'names'; data.yaml gives path, train, val and names", remedy)
    if not isinstance(root, str) or not is_path(root):
        raise malformed(source, f"path must be a folder, got {str(root)[:80]!r}", "Correct it, or leave it out.")
    if not (isinstance(keypoints, list) and len(keypoints) == 2 and all(str(n).isdecimal() for n in keypoints)):
        raise malformed(source, f"kpt_shape must be two whole numbers, got {str(keypoints)[:80]!r}", "Correct it.")
    folder = file.parent / as_path(root.replace("\\", "/"))
    return YOLOSettings(
        source,
        folder if folder.is_dir() else find_below(file.parent, root) or file.parent,  # often that of another machine
        _checked_names(source, settings["names"]),
        {str(k): _checked_entries(source, k, value) for k, value in settings.items() if role_of(str(k)) and value},
        int(keypoints[0]) * int(keypoints[1]),
    )


class TextLoader(yaml.BaseLoader):
    """Reads every scalar as text; refuses a repeated key."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        """Return a table of YAML."""
        return refuse_repeated_keys(self.construct_pairs(node, deep=True))


def _parse_yaml(source: str, content: bytes) -> JSONDict:
    """Parse YAML, every scalar as the text that it is, without aliases, a few of which can stand for gigabytes."""
    try:
        if DEEP_YAML.search(content):
            raise ValueError("more than 10 nested brackets")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=yaml.SafeLoader)):
            raise ValueError("aliases are not read; write the values out")
        settings = TextLoader(content).get_single_data()
        is_table = isinstance(settings, dict)
        return {k: v for k, v in settings.items() if v not in ("", "~", "null")} if is_table else {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as reason:  # TypeError: a list as key
        problem = printable(" ".join(str(reason).split()))
        raise malformed(source, f"is not YAML as in data.yaml: {problem[:300]}", "Correct the line.") from None


def _checked_names(source: str, names: object) -> list[str]:
    """Return the class names in order of index, given as a list or as index: name."""
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise malformed(source, "names must be a list of names, or a table index: name", "List them in order of index.")
    texts = [printable(name.strip()) if isinstance(name, str) else "" for name in names]
    if "" in texts:
        problem = f"class {texts.index('')} has no name; the classes must be numbered from 0 without gaps"
        raise malformed(source, problem, "Name every class.")
    name, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise malformed(source, f"{count} classes are called {name!r}", "Give every class a name of its own.")
    return texts


def _checked_entries(source: str, key: str, value: object) -> list[str]:
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
    if not entries or not all(foreign_parts(entry) or entry in (".", "./") for entry in entries):
        raise malformed(source, f"{key} must be a folder, a list file, or a list of these", f"Correct {key}.")
    return entries


def _list_entry(settings: YOLOSettings, entry: str) -> dict[Path, bool]:
    """Return the images of one folder or list file -> whether each is there."""
    path = settings.root if not foreign_parts(entry) else find_below(settings.root, entry)
    if path is not None and path.is_dir():
        return dict.fromkeys(find_images(path), True)
    if path is None or path.suffix.lower() != ".txt" or not path.is_file():
        problem = f"{entry!r} is neither a folder nor a list file (.txt) in {printable(settings.root)}"
        raise malformed(settings.source, problem, "Correct it, or path: in data.yaml.")
    lines = _read_lines(path, "a list of images", "Give a text file with the path of an image on each line.")
    images = {n: find_below(settings.root, line) or find_below(path.parent, line) for n, line in lines.items()}
    return {image or Path(f"{path}:{n}: {printable(lines[n])[:200]}"): image is not None for n, image in images.items()}


def _label_folder(folder: Path, root: Path) -> Path:
    parts, places = folder.parts, [n for n, part in enumerate(folder.parts) if part in LABEL_FOLDERS]
    if places:
        beside = Path(*parts[: places[-1]], LABEL_FOLDERS[parts[places[-1]]], *parts[places[-1] + 1 :])
        if beside.is_dir():
            return beside
    below = root / "labels" / folder.relative_to(root) if folder.is_relative_to(root) else folder
    return below if below.is_dir() else folder


def _read_label(path: Path, size: tuple[int, int], settings: YOLOSettings) -> LabelFile:
    """Read one label file; each line counts once. size: (height, width) of the image."""
    text = read_text(path, AnnotationError, "a YOLO label file", rules.LABEL_MALFORMED.remedy)
    place, num_repeated = printable(path), 0
    objects: dict[tuple[str, ...], WrittenObject] = {}  # by the words of the line
    for number, line in enumerate(text.splitlines(), start=1):
        words = tuple(line.split())
        if words in objects:
            num_repeated += 1
        elif words:
            objects[words] = _read_line(f"{place}:{number}", words, size, settings)
    num_outlines = sum(item.is_outline for item in objects.values())
    return LabelFile(list(objects.values()), size, {rules.BOX_REPEATED: num_repeated, rules.POLYGON: num_outlines})


def _read_line(place: str, words: Sequence[str], size: tuple[int, int], settings: YOLOSettings) -> WrittenObject:
    """Read `class cx cy width height`, perhaps with keypoints after it, or `class x1 y1 x2 y2 x3 y3 ...`."""
    class_index, *values = map(to_number, words)
    is_class = class_index.is_integer() and 0 <= class_index < len(settings.class_names)
    is_outline = len(words) >= 7 and len(words) % 2 == 1 and not settings.num_keypoint_values
    box: tuple[float, ...] = (nan,) * 4
    problem = None
    if not values or not isfinite(sum(values)):
        problem = "a line must hold numbers with spaces between, class cx cy width height"
    elif is_outline:
        sides = [(min(numbers), max(numbers)) for numbers in (values[::2], values[1::2])]
        box = (*((low + high) / 2 for low, high in sides), *(high - low for low, high in sides))
    elif len(words) in (5, 5 + settings.num_keypoint_values):
        box = tuple(values[:4])
    else:
        problem = f"has {len(words)} columns; a line must have 5: class cx cy width height"
    if not problem and not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in box):
        problem = "cx, cy, width, height must be in 0..1: fractions of the width and height of the image"
    elif not problem and not is_class:
        problem = f"the class must be a whole number in 0..{len(settings.class_names) - 1}; the first one is 0"
    x, y, width, height = (fraction * side for fraction, side in zip(box, size[::-1] * 2, strict=True))
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    class_name = settings.class_names[int(class_index)] if is_class else ""
    text = f"{place}: {printable(' '.join(words))[:80]}"
    return WrittenObject(text, class_name, edges, problem, is_outline=is_outline)
