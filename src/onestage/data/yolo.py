"""Read YOLO txt labels: a line `class cx cy width height` per object, in fractions of the image."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

import onestage.data.annotations as rules
from onestage.data.annotations import malformed, require_same_names
from onestage.data.folder import find_images
from onestage.data.image_headers import NUM_THREADS, check_header
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.label_files import LabelFile, LabelledImage, WrittenObject, read_label_files
from onestage.data.source import Source, Split
from onestage.errors import AnnotationError
from onestage.files import is_path, list_files, printable, read_file, read_text
from onestage.types import AnnotationSet, JSONDict

SETTINGS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "yolo.yaml")
NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt")  # as LabelImg, CVAT and darknet write them
DEEP_YAML = re.compile(rb"(?:[\[{]\s*){10}")  # thousands of brackets take the parser seconds; data.yaml has 2
MAX_SETTINGS_BYTES = 1 << 20  # ten thousand classes take a fifth of it
SPLIT_WORDS = {"val": ("val", "valid", "validation")}
TOLERANCE = 1e-3  # of rounding, in fractions of the image


class YOLO(Source):
    """YOLO txt labels: the splits that data.yaml names, or images/<split> and labels/<split>, or all of images/.

    Args:
        path: data.yaml, or the folder of the data set; see `read_settings`.
        train: name of the training split.
        val: name of the validation split; val also finds valid and validation.
        test: name of the test split.
    """

    format = "YOLO"

    def __init__(self, path: str | Path, *, train: str = "train", val: str = "val", test: str = "test") -> None:
        self.path = Path(path)
        self._names: dict[Split, str] = {"train": train, "val": val, "test": test}

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that data.yaml names or whose folders exist."""
        try:
            settings = read_settings(self.path)
        except AnnotationError:  # `read` reports it
            return ("train",)
        return tuple(split for split, name in self._names.items() if find_entries(settings, name))

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read the label files of a split."""
        return parse_yolo(self.path, self._names[split], class_names=class_names, max_bad_fraction=max_bad_fraction)

    def describe(self, split: Split) -> str:
        """Return the settings file or folder, and the folders and lists of a split."""
        settings = read_settings(self.path)
        return f"{settings.source} ({', '.join(find_entries(settings, self._names[split]))})"

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """The names of data.yaml or classes.txt."""
        try:
            names = tuple(read_settings(self.path).class_names)
        except AnnotationError:
            return None
        return names, tuple(range(1, len(names) + 1))


class YOLOSettings(NamedTuple):
    """Content of data.yaml."""

    source: str  # the file or folder, for messages
    root: Path  # what paths are relative to
    class_names: list[str]  # [K] in order of class index
    entries: Mapping[str, Sequence[str]]  # split -> folders and lists of images; empty without data.yaml
    num_keypoint_values: int = 0  # numbers after each box in a pose data set


def parse_yolo(
    data: Path, split: str, *, class_names: Sequence[str] | None = None, max_bad_fraction: float = 0.01
) -> AnnotationSet:
    """Read the images of a split. Those without a label file, or with an empty one, stay as images without objects.

    A label is `class cx cy width height`, in fractions of the upright image; the outline of a segmentation data set
    becomes the box around it. Image ids are 1..N in order of path, category ids 1..K.

    Args:
        data: data.yaml, or the folder of the data set; see `read_settings`.
        split: train, val or test.
        class_names: as in `Source.read`; the data set must have exactly these.
        max_bad_fraction: as in `Source.read`.
    """
    settings = read_settings(data)
    source = f"{settings.source} ({split})"
    names = list(class_names or settings.class_names)
    require_same_names(source, settings.class_names, names)
    listed = list_split(settings, split)
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # labels are fractions of the image's size
        headers = list(pool.map(check_header, [str(item.image) for item in listed]))
    bad_images = {row: header.findings[0] for row, header in enumerate(headers) if not header.is_usable}
    read = partial(_read_label, num_keypoint_values=settings.num_keypoint_values)
    file_rules = rules.NO_LABEL, rules.LABEL_MALFORMED
    notes = {
        rules.BOX_REPEATED: "{} lines occur twice in their file: read once",
        rules.POLYGON: "{} objects are outlines: the box around each is used",
    }
    files = read_label_files(source, listed, bad_images, read, *file_rules, notes, max_bad_fraction)
    sizes = np.array([(headers[row].height, headers[row].width) for row in files.rows], dtype=np.int32)
    width_height = sizes[files.image_rows][:, ::-1]
    centers, halves = files.boxes[:, :2] * width_height, files.boxes[:, 2:] * width_height / 2
    boxes = np.concatenate([centers - halves, centers + halves], axis=1)
    label_of_index: dict[str | float, int] = {
        index: names.index(name) for index, name in enumerate(settings.class_names)
    }
    labels = [label_of_index.get(item.class_key, -1) for item in files.objects]
    unknown_class = f"the class must be a whole number in 0..{len(names) - 1}; the first one is 0"
    return files._replace(images=files.images._replace(sizes=sizes)).build(boxes, labels, names, unknown_class)


def read_settings(data: Path) -> YOLOSettings:
    """Read data.yaml, or derive its content from the folder.

    Args:
        data: the YAML file; or a folder that holds one (data.yaml, dataset.yaml or yolo.yaml), or else classes.txt or
            obj.names with a name on each line.

    Raises:
        AnnotationError: the file is missing or malformed, or its classes are incomplete.
    """
    if not data.is_dir():
        return _read_yaml(data)
    for name in SETTINGS_FILES:
        if (data / name).is_file():
            return _read_yaml(data / name)
    file = next((data / name for name in NAMES_FILES if (data / name).is_file()), data / NAMES_FILES[0])
    remedy = f"Put {SETTINGS_FILES[0]} there, or {NAMES_FILES[0]} with a class name on each line; or correct data.path."
    names = _read_lines(file, "the class names of a YOLO data set", remedy)
    return YOLOSettings(printable(data), data, _checked_names(printable(file), names, None), {})


def find_entries(settings: YOLOSettings, split: str) -> Sequence[str]:
    """Return the folders and lists of a split; empty if there is none.

    Without data.yaml these are images/<split>, or <split>/images as Roboflow exports it. If there is no such folder
    for any split, the training split is images/, or the folder itself.
    """
    words = [word for word in SPLIT_WORDS.get(split, (split,)) if Path(word).name == word]
    if settings.entries:
        return next((settings.entries[word] for word in words if settings.entries.get(word)), ())
    folders = [folder for word in words for folder in (f"images/{word}", f"{word}/images")]
    found = [folder for folder in folders if (settings.root / folder).is_dir()]
    if not found and split == "train" and not find_entries(settings, "val"):
        found = [
            folder
            for folder in ("images", ".")
            if any(name.lower().endswith(IMAGE_SUFFIXES) for name in list_files(settings.root / folder))
        ]
    return found[:1]


def list_split(settings: YOLOSettings, split: str) -> list[LabelledImage]:
    """Return the images of a split, sorted by path, and their label files.

    A label lies in the folder `labels` that stands beside the image's last folder `images`; without such a folder it is
    below `labels` of the root, or else beside the image.

    Raises:
        AnnotationError: the split is missing, or holds no image.
    """
    entries = find_entries(settings, split)
    if not entries:
        where = f"there are: {', '.join(settings.entries)}" if settings.entries else f"images/{split}, {split}/images"
        problem, remedy = f"has no split {split!r} ({where})", f"Name its images with {split}: in data.yaml."
        raise malformed(settings.source, problem, remedy)
    images = sorted({image for entry in entries for image in _list_entry(settings, entry)})
    if not images:
        problem = f"the split {split!r} holds no image ({' '.join(IMAGE_SUFFIXES)})"
        raise malformed(settings.source, problem, "Correct the path of the split.")
    return [LabelledImage(image, _label_of(image, settings.root)) for image in images]


def _read_lines(file: Path, noun: str, remedy: str) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank, stripped."""
    lines = read_text(file, AnnotationError, noun, remedy).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_yaml(file: Path) -> YOLOSettings:
    source, remedy = printable(file), "Give the data.yaml of the data set, or its folder: data.path"
    content = read_file(file, AnnotationError, "a YOLO data set's settings (YAML)", remedy, MAX_SETTINGS_BYTES)
    settings = _parse_yaml(source, content)
    root, keypoints = settings.get("path") or ".", settings.get("kpt_shape") or (0, 0)
    if "names" not in settings:
        raise malformed(source, "has no 'names'; data.yaml gives path, train, val and names", remedy)
    if not isinstance(root, str) or not is_path(root):
        raise malformed(source, f"path must be a folder, got {str(root)[:80]!r}", "Correct it, or leave it out.")
    if not (isinstance(keypoints, list | tuple) and [type(number) for number in keypoints] == [int, int]):
        raise malformed(source, f"kpt_shape must be two whole numbers, got {str(keypoints)[:80]!r}", "Correct it.")
    folder = file.parent / root
    keys = [key for key in ("train", *SPLIT_WORDS["val"], "test") if settings.get(key)]
    return YOLOSettings(
        source,
        folder if folder.is_dir() else file.parent,  # `path` is often that of another machine
        _checked_names(source, settings["names"], settings.get("nc")),
        {key: _checked_entries(source, key, settings[key]) for key in keys},
        keypoints[0] * keypoints[1],
    )


def _parse_yaml(source: str, content: bytes) -> JSONDict:
    """Parse YAML without aliases, a few of which can stand for gigabytes."""
    try:
        if DEEP_YAML.search(content):
            raise ValueError("more than 10 nested brackets")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=yaml.SafeLoader)):
            raise ValueError("aliases are not read; write the values out")
        settings = yaml.safe_load(content)
        return settings if isinstance(settings, dict) else {}
    except (yaml.YAMLError, ValueError, RecursionError) as reason:  # ValueError: also a date such as 2024-99-99
        problem = printable(" ".join(str(reason).split()))
        raise malformed(source, f"is not YAML as in data.yaml: {problem[:300]}", "Correct the line.") from None


def _checked_names(source: str, names: object, num_classes: object) -> list[str]:
    """Return the class names in order of index, given as a list or as index: name."""
    if isinstance(names, dict):
        by_index = {str(key): name for key, name in names.items()}
        names = [by_index.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise malformed(source, "names must be a list of names, or a table index: name", "List them in order of index.")
    texts = ["" if isinstance(name, list | dict | None) else printable(str(name).strip()) for name in names]
    if "" in texts:
        problem = f"class {texts.index('')} has no name; the classes must be numbered from 0 without gaps"
        raise malformed(source, problem, "Name every class.")
    if num_classes is not None and num_classes != len(texts):
        problem = f"nc must be the number of names, {len(texts)}, got {str(num_classes)[:20]}"
        raise malformed(source, problem, "Give every class a name, and correct nc or leave it out.")
    name, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise malformed(source, f"{count} classes are called {name!r}", "Give every class a name of its own.")
    return texts


def _checked_entries(source: str, key: str, value: object) -> list[str]:
    """Return the folders and lists of a split, with "/" between folders."""
    given = value if isinstance(value, list) else [value]
    entries = [entry.replace("\\", "/") for entry in given if isinstance(entry, str) and entry and is_path(entry)]
    if len(entries) < len(given):
        raise malformed(source, f"{key} must be a folder, a list file, or a list of these", f"Correct {key}.")
    return entries


def _list_entry(settings: YOLOSettings, entry: str) -> list[Path]:
    """Return the images of one folder or list file."""
    # Roboflow writes ../train/images for train/images; COCO's folders have no images/.
    names = (entry, entry.removeprefix("../"), entry.removeprefix("images/"))
    path = next((path for name in names if (path := settings.root / name).exists()), settings.root / entry)
    if path.is_dir():
        return find_images(path)
    if path.suffix != ".txt" or not path.is_file():
        problem = f"{entry!r} is neither a folder nor a list file (.txt) in {printable(settings.root)}"
        raise malformed(settings.source, problem, "Correct it, or path: in data.yaml.")
    lines = _read_lines(path, "a list of images", "Give a text file with the path of an image on each line.")
    return [_listed_image(settings, path, number, line) for number, line in enumerate(lines, start=1)]


def _listed_image(settings: YOLOSettings, file: Path, number: int, line: str) -> Path:
    """Return the image that a line names, relative to the root or, with ./, to the list. It must lie below one."""
    line = line.replace("\\", "/")
    image = (file.parent if line.startswith("./") else settings.root) / line if is_path(line) else None
    roots = {settings.root.resolve(), file.parent.resolve()}
    if image is None or not any(image.resolve().is_relative_to(root) for root in roots):
        problem = f"{line!r:.200} is not a path below {printable(settings.root)}"
        remedy = "Correct the line, or set path: in data.yaml to a folder that holds all images."
        raise malformed(f"{printable(file)}:{number}", problem, remedy)
    return image


def _label_of(image: Path, root: Path) -> Path:
    """Return the path of the label file of an image."""
    parts = image.parts
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        image = Path(*parts[:place], "labels", *parts[place + 1 :])
    elif (root / "labels").is_dir() and image.is_relative_to(root):
        image = root / "labels" / image.relative_to(root)
    return image.with_suffix(".txt")


def _read_label(path: Path, num_keypoint_values: int) -> LabelFile:
    """Read one label file; each line counts once."""
    text = read_text(path, AnnotationError, "a YOLO label file", rules.LABEL_MALFORMED.remedy)
    number_of_line: dict[tuple[str, ...], int] = {}
    num_lines = num_outlines = 0
    objects = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = tuple(line.split())
        num_lines += bool(words)
        if words and number_of_line.setdefault(words, number) == number:
            is_outline = len(words) >= 7 and len(words) % 2 == 1 and not num_keypoint_values
            num_outlines += is_outline
            objects.append(_read_line(f"{printable(path)}:{number}", words, 5 + num_keypoint_values, is_outline))
    return LabelFile(objects, notes={rules.BOX_REPEATED: num_lines - len(objects), rules.POLYGON: num_outlines})


def _read_line(place: str, words: Sequence[str], num_columns: int, is_outline: bool) -> WrittenObject:
    """Read `class cx cy width height`, perhaps with keypoints after it, or `class x1 y1 x2 y2 x3 y3 ...`."""
    box: tuple[float, ...] = (nan,) * 4
    class_index, problem = nan, None
    try:
        class_index, *values = map(float, words)
        if is_outline:
            sides = [(min(numbers), max(numbers)) for numbers in (values[::2], values[1::2])]
            box = (*((low + high) / 2 for low, high in sides), *(high - low for low, high in sides))
        elif len(words) == num_columns:
            box = tuple(values := values[:4])
        else:
            score = " (6 are those of detections, with a score)" if len(words) == 6 else ""
            problem = f"has {len(words)} columns; a line must have 5: class cx cy width height{score}"
        if not problem and not (isfinite(sum(values)) and all(-TOLERANCE <= value <= 1 + TOLERANCE for value in box)):
            problem = "cx, cy, width, height must be in 0..1: fractions of the width and height of the image"
    except ValueError:
        problem = "a line must hold numbers with spaces between, class cx cy width height"
    return WrittenObject(f"{place}: {printable(' '.join(words))[:80]}", class_index, box, problem)
