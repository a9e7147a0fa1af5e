"""Read YOLO txt labels: a line `class cx cy width height` per object, in fractions of the image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

import onestage.data.annotations as rules
from onestage.data.annotations import (
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
    malformed,
    require_images,
    require_same_names,
)
from onestage.data.folder import find_images
from onestage.data.image_headers import NUM_THREADS, check_header
from onestage.data.images import IMAGE_SUFFIXES
from onestage.data.source import Source, Split
from onestage.errors import AnnotationError
from onestage.files import is_path, list_files, printable, read_file, read_text
from onestage.types import AnnotationSet, Finding

SETTINGS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "yolo.yaml")
NAMES_FILES = ("classes.txt", "obj.names", "labels/classes.txt")  # as LabelImg, CVAT and darknet write them
MAX_DEPTH = 10  # data.yaml has 2
MAX_SETTINGS_BYTES = 1 << 20  # ten thousand classes take a fifth of it
SPLIT_WORDS = {"val": ("val", "valid", "validation")}
BOX_COLUMNS = 5  # class, cx, cy, width, height
TOLERANCE = 1e-3  # of rounding, in fractions of the image
PIXELS_FRACTION = 0.2  # more boxes than this beyond 0..1 are no accident
PIXELS_MINIMUM = 4  # and at least so many, or one careless box would condemn a small file
NAN_BOX = (float("nan"),) * 4


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
            names = read_settings(self.path).class_names
        except AnnotationError:
            return None
        return names, tuple(range(1, len(names) + 1))


class YOLOSettings(NamedTuple):
    """Content of data.yaml."""

    source: str  # the file or folder, for messages
    root: Path  # what paths are relative to
    class_names: tuple[str, ...]  # [K] in order of class index
    entries: Mapping[str, tuple[str, ...]]  # split -> folders and lists of images; empty without data.yaml
    num_keypoint_values: int = 0  # numbers after each box in a pose data set


class LabelledImage(NamedTuple):
    """An image of a split, and the path of its label file, which may not exist."""

    image: Path
    label: Path


class LabelLine(NamedTuple):
    """One line of a label file."""

    place: str  # file and number of the line, from 1
    class_index: float  # as written
    box: tuple[float, ...]  # cx, cy, width, height, in fractions of the image
    problem: str | None = None  # the rule that it breaks
    is_polygon: bool = False

    @property
    def text(self) -> str:
        """Place and values; a broken rule quotes the values itself."""
        values = " ".join(f"{value:g}" for value in self.box)
        return self.place if self.problem else f"{self.place}: class {self.class_index:g}, box {values}"


class LabelFile(NamedTuple):
    """One label file."""

    lines: Sequence[LabelLine] = ()
    num_repeated: int = 0  # lines skipped because they occur twice


def parse_yolo(
    data: Path, split: str, *, class_names: Sequence[str] | None = None, max_bad_fraction: float = 0.01
) -> AnnotationSet:
    """Read the images of a split. Those without a label file, or with an empty one, stay as images without objects.

    A label is `class cx cy width height`, in fractions of the upright image; the outline of a segmentation data set
    becomes the box around it. Lines that cannot be used, and images whose label file or header cannot be read, are
    skipped and named in `AnnotationSet.skipped`. Image ids are 1..N in order of path, category ids 1..K.

    Args:
        data: data.yaml, or the folder of the data set; see `read_settings`.
        split: train, val or test.
        class_names: as in `Source.read`; the data set must have exactly these.
        max_bad_fraction: as in `Source.read`.
    """
    settings = read_settings(data)
    source = f"{settings.source} ({split})"
    names = settings.class_names
    wanted = tuple(class_names) if class_names is not None else names
    require_same_names(source, names, wanted)
    columns, files, findings = _read_images(source, list_split(settings, split), settings.num_keypoint_values)
    require_images(source, len(files), findings, max_bad_fraction)
    lines = [line for file in files for line in file.lines]
    return build_annotation_set(
        source,
        columns,
        _object_columns(source, files, columns.sizes, [wanted.index(name) for name in names]),
        wanted,
        range(1, len(wanted) + 1),
        describe=lambda row: lines[row].text,
        findings=findings,
        max_bad_fraction=max_bad_fraction,
    )


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
    file = next((data / name for name in SETTINGS_FILES if (data / name).is_file()), None)
    if file is not None:
        return _read_yaml(file)
    names_file = next((data / name for name in NAMES_FILES if (data / name).is_file()), data / NAMES_FILES[0])
    remedy = f"Put {SETTINGS_FILES[0]} there, or {NAMES_FILES[0]} with a class name on each line; or correct data.path."
    names = _read_lines(names_file, "the class names of a YOLO data set", remedy)
    return YOLOSettings(printable(data), data, _checked_names(printable(names_file), names, None), {})


def find_entries(settings: YOLOSettings, split: str) -> tuple[str, ...]:
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
        names_by_folder = {folder: list_files(settings.root / folder) for folder in ("images", ".")}
        is_image = (any(name.lower().endswith(IMAGE_SUFFIXES) for name in names) for names in names_by_folder.values())
        found = [folder for folder, has_images in zip(names_by_folder, is_image, strict=True) if has_images]
    return tuple(found[:1])


def list_split(settings: YOLOSettings, split: str) -> list[LabelledImage]:
    """Return the images of a split, each once, in order of path.

    The label file has the path of its image with `labels` for the last folder `images`; without such a folder it is
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
    labels_root = settings.root / "labels" if (settings.root / "labels").is_dir() else None
    return [LabelledImage(image, _label_of(image, settings.root, labels_root)) for image in images]


def _read_lines(file: Path, noun: str, remedy: str) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank, stripped."""
    lines = read_text(file, AnnotationError, noun, remedy).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_yaml(file: Path) -> YOLOSettings:
    source = printable(file)
    remedy = "Give the data.yaml of the data set, or its folder: data.path"
    content = read_file(file, AnnotationError, "a YOLO data set's settings (YAML)", remedy, MAX_SETTINGS_BYTES)
    settings = _parse_yaml(source, content)
    if not isinstance(settings, dict) or "names" not in settings:
        raise malformed(source, "has no 'names'; data.yaml gives path, train, val and names", remedy)
    root = settings.get("path") or "."
    if not isinstance(root, str) or not is_path(root):
        raise malformed(source, f"path is {str(root)[:80]!r}; it must be a folder", "Correct it, or leave it out.")
    folder = file.parent / root
    keypoints = settings.get("kpt_shape") or (0, 0)
    if not (isinstance(keypoints, list | tuple) and len(keypoints) == 2 and {int} == set(map(type, keypoints))):
        raise malformed(source, f"kpt_shape is {str(keypoints)[:80]!r}; it must be two whole numbers", "Correct it.")
    keys = [key for key in ("train", *SPLIT_WORDS["val"], "test") if settings.get(key)]
    return YOLOSettings(
        source,
        folder if folder.is_dir() else file.parent,  # `path` is often that of another machine
        _checked_names(source, settings["names"], settings.get("nc")),
        {key: _checked_entries(source, key, settings[key]) for key in keys},
        keypoints[0] * keypoints[1],
    )


def _parse_yaml(source: str, content: bytes) -> Any:
    """Parse YAML without aliases, a few of which can stand for gigabytes."""
    depth = 0
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise malformed(source, "has YAML aliases, which data.yaml does not need", "Write the values out.")
            if depth > MAX_DEPTH:  # thousands of brackets take the parser seconds
                raise malformed(source, f"is nested more than {MAX_DEPTH} deep", "Write it as data.yaml is written.")
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:  # ValueError: a date such as 2024-99-99
        mark = getattr(reason, "problem_mark", None)
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = getattr(reason, "problem", None) or type(reason).__name__
        raise malformed(place, f"is not YAML: {str(problem)[:200]}", "Correct the line.") from None


def _checked_names(source: str, names: object, num_classes: object) -> tuple[str, ...]:
    """Return the class names in order of index, given as a list or as index: name."""
    if isinstance(names, dict):
        by_index = {str(key): name for key, name in names.items()}
        if set(by_index) != {str(index) for index in range(len(names))}:
            found = ", ".join(str(key)[:20] for key in list(names)[:20])
            problem = f"names has the indices {found}; they must be 0..{len(names) - 1}, each once"
            raise malformed(source, problem, "Number the classes from 0 without gaps.")
        names = [by_index[str(index)] for index in range(len(by_index))]
    if not isinstance(names, list) or not names:
        raise malformed(source, "names must be a list of names, or a table index: name", "List them in order of index.")
    wrong = [n for n, name in enumerate(names) if isinstance(name, list | dict) or not str(name).strip()]
    if wrong:
        raise malformed(source, f"class {wrong[0]} has no name; it must be text", "Name every class.")
    if num_classes is not None and num_classes != len(names):
        problem = f"nc is {str(num_classes)[:20]}, but there are {len(names)} names; they must agree"
        raise malformed(source, problem, "Give every class a name, and correct nc or leave it out.")
    texts = tuple(printable(str(name).strip()) for name in names)
    repeated = [name for name, count in Counter(texts).items() if count > 1]
    if repeated:
        raise malformed(source, f"two classes are called {repeated[0]!r}", "Give every class a name of its own.")
    return texts


def _checked_entries(source: str, key: str, value: object) -> tuple[str, ...]:
    """Return the folders and lists of a split, with "/" between folders."""
    given = value if isinstance(value, list) else [value]
    entries = tuple(entry.replace("\\", "/") for entry in given if isinstance(entry, str) and entry and is_path(entry))
    if len(entries) < len(given):
        raise malformed(source, f"{key} must be a folder, a list file, or a list of these", f"Correct {key}.")
    return entries


def _list_entry(settings: YOLOSettings, entry: str) -> list[Path]:
    """Return the images of one folder or list file."""
    path = settings.root / entry  # Roboflow writes ../train/images for train/images; COCO's folders have no images/
    for other in (entry.removeprefix("../"), entry.removeprefix("images/")):
        if not path.exists():
            path = settings.root / other
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


def _label_of(image: Path, root: Path, labels_root: Path | None) -> Path:
    """Return the path of the label file of an image."""
    parts = image.parts
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        return Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
    if labels_root is not None and image.is_relative_to(root):
        return (labels_root / image.relative_to(root)).with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_images(
    source: str, listed: list[LabelledImage], num_keypoint_values: int
) -> tuple[ImageColumns, list[LabelFile], list[Finding]]:
    """Read size and labels of every image. Skipped images are findings."""
    label_names = {folder: list_files(folder) for folder in {item.label.parent for item in listed}}
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # labels are fractions of the image's size
        headers = list(pool.map(check_header, [str(item.image) for item in listed]))
    files: list[LabelFile] = []
    paths: list[str] = []
    sizes: list[tuple[int, int]] = []
    findings: list[Finding] = []
    num_missing = 0
    for (image, label), header in zip(listed, headers, strict=True):
        is_missing = label.name not in label_names[label.parent]
        num_missing += is_missing
        bad = [finding for finding in header.findings if finding.effect == "skipped"][:1]
        try:
            file = LabelFile() if is_missing else _read_label(label, num_keypoint_values)
        except AnnotationError as reason:
            bad = [rules.LABEL_MALFORMED.broken_by(label, reason)]
        findings += bad
        if not bad:
            files.append(file)
            paths.append(str(image))
            sizes.append((header.height, header.width))
    if num_missing == len(listed):
        problem = f"none of its {num_missing} images has a label file (searched {printable(listed[0].label)}, ...)"
        raise malformed(source, problem, "Put labels/ beside images/, with a .txt file for each image.")
    findings += _about_labels(source, files, num_missing)
    ids = np.arange(1, len(paths) + 1, dtype=np.int64)
    return ImageColumns(paths, ids, np.array(sizes, dtype=np.int32).reshape(-1, 2)), files, findings


def _about_labels(source: str, files: list[LabelFile], num_missing: int) -> list[Finding]:
    """Report what was read in another way than written."""
    num_repeated = sum(file.num_repeated for file in files)
    num_polygons = sum(line.is_polygon for file in files for line in file.lines)
    counted = (
        (rules.NO_LABEL, num_missing, f"{num_missing} images have no label file: without objects"),
        (rules.BOX_REPEATED, num_repeated, f"{num_repeated} lines occur twice in their file: read once"),
        (rules.POLYGON, num_polygons, f"{num_polygons} objects are outlines: the box around each is used"),
    )
    return [rule.broken(source, problem, number) for rule, number, problem in counted if number]


def _read_label(path: Path, num_keypoint_values: int) -> LabelFile:
    """Read one label file; each line counts once."""
    text = read_text(path, AnnotationError, "a YOLO label file", "Export it again.")
    if "\0" in text:
        raise AnnotationError(f"{printable(path)}: holds NUL bytes, so it is not text; export it again")
    rows = [(number, tuple(line.split())) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    items = reversed({words: number for number, words in reversed(rows)}.items())  # the first of equal lines
    lines = [_read_line(f"{printable(path)}:{number}", words, num_keypoint_values) for words, number in items]
    return LabelFile(lines, len(rows) - len(lines))


def _read_line(place: str, words: Sequence[str], num_keypoint_values: int) -> LabelLine:
    """Read `class cx cy width height`, followed by keypoints in a pose data set; or `class x1 y1 x2 y2 x3 y3 ...`."""
    try:
        class_index, *values = map(float, words)
    except ValueError:
        problem = f"{' '.join(words)!r:.80}: a line must hold numbers with spaces between, class cx cy width height"
        return LabelLine(place, float("nan"), NAN_BOX, problem)
    if len(words) == BOX_COLUMNS + num_keypoint_values:
        return LabelLine(place, class_index, tuple(values[:4]))
    if len(values) >= 6 and len(values) % 2 == 0 and not num_keypoint_values:
        left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
        if not np.isfinite(values).all():
            left = float("nan")  # min and max ignore it
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        return LabelLine(place, class_index, box, is_polygon=True)
    problem = f"has {len(words)} columns; a line must have 5: class cx cy width height"
    if len(words) == BOX_COLUMNS + 1:
        problem += " (6 are those of detections, with a score)"
    return LabelLine(place, class_index, NAN_BOX, problem)


def _object_columns(
    source: str, files: list[LabelFile], sizes: npt.NDArray[np.int32], label_of_index: Sequence[int]
) -> ObjectColumns:
    """Flatten, check classes and range, and turn fractions of the image into edges in pixels."""
    lines = [line for file in files for line in file.lines]
    image_rows = np.repeat(np.arange(len(files)), [len(file.lines) for file in files]).astype(np.int64)
    classes = np.array([line.class_index for line in lines], dtype=np.float64)
    fractions = np.array([line.box for line in lines], dtype=np.float64).reshape(-1, 4)
    num_classes = len(label_of_index)
    with np.errstate(invalid="ignore"):
        is_beyond = np.asarray(((fractions < -TOLERANCE) | (fractions > 1 + TOLERANCE)).any(axis=1), dtype=np.bool_)
        is_class = (classes >= 0) & (classes < num_classes) & (classes == np.floor(classes))
    _refuse_pixels(source, is_beyond, fractions)
    problems = {int(row): "cx, cy, width, height must be in 0..1" for row in np.flatnonzero(is_beyond)}
    rule = f"the class must be a whole number in 0..{num_classes - 1}; the first one is 0"
    problems |= {int(row): rule for row in np.flatnonzero(~is_class)}
    problems |= {row: line.problem for row, line in enumerate(lines) if line.problem}
    labels = np.array(label_of_index, dtype=np.int64)[np.where(is_class, classes, 0).astype(np.int64)]
    width_height = sizes[image_rows][:, ::-1].astype(np.float64)
    centers, halves = fractions[:, :2] * width_height, fractions[:, 2:] * width_height / 2
    boxes = np.concatenate([centers - halves, centers + halves], axis=1)
    return ObjectColumns(image_rows, boxes, labels, problems)


def _refuse_pixels(source: str, is_beyond: npt.NDArray[np.bool_], fractions: npt.NDArray[np.float64]) -> None:
    """Raise if so many boxes leave 0..1 that they must be in pixels."""
    num_beyond, total = int(np.count_nonzero(is_beyond)), len(is_beyond)
    if num_beyond >= PIXELS_MINIMUM and num_beyond > PIXELS_FRACTION * total:
        example = " ".join(f"{value:g}" for value in fractions[is_beyond][0])
        problem = f"{num_beyond} of {total} boxes lie beyond 0..1 (such as {example}), like boxes in pixels"
        raise malformed(source, problem, "Divide cx and width by the width of the image, cy and height by its height.")
