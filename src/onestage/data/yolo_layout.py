"""Where a YOLO data set keeps its images and labels: data.yaml as Ultralytics' users have it, or folders alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from onestage.data.folder import find_images
from onestage.data.images import IMAGE_SUFFIXES
from onestage.errors import AnnotationError
from onestage.files import is_path, printable, read_file

SETTINGS_FILES = ("data.yaml", "data.yml", "dataset.yaml", "yolo.yaml")
NAMES_FILE = "classes.txt"  # as labelImg writes it
MAX_DEPTH = 10  # data.yaml has 2
MAX_SETTINGS_BYTES = 1 << 20  # ten thousand classes take a fifth of it
SPLIT_WORDS = {"val": ("val", "valid", "validation")}
IMAGES, LABELS = "images", "labels"


class YOLOSettings(NamedTuple):
    """What data.yaml says."""

    source: str  # the file or folder, for messages
    root: Path  # what paths are relative to
    class_names: tuple[str, ...]  # [K] in order of class index
    entries: Mapping[str, tuple[str, ...]]  # split -> folders and lists of images; without data.yaml none
    num_keypoint_values: int  # numbers that follow each box in a pose data set; 0 in all others


class LabelledImage(NamedTuple):
    """An image of a split and where its labels are, if there are any."""

    image: Path
    label: Path


def read_settings(data: Path) -> YOLOSettings:
    """Read data.yaml, or work out from the folder what it would say.

    Args:
        data: the YAML file; or a folder that holds one (data.yaml, dataset.yaml or yolo.yaml), or else classes.txt
            with a name on each line.

    Raises:
        AnnotationError: there is no such file, or the classes in it are not whole.
    """
    if not data.is_dir():
        return _read_yaml(data)
    file = next((data / name for name in SETTINGS_FILES if (data / name).is_file()), None)
    if file is not None:
        return _read_yaml(file)
    remedy = f"Put {SETTINGS_FILES[0]} there, or {NAMES_FILE} with a class name on each line; or correct data.root."
    names = read_lines(data / NAMES_FILE, "the class names of a YOLO data set", remedy)
    return YOLOSettings(printable(data), data, _checked_names(printable(data / NAMES_FILE), names, None), {}, 0)


def find_splits(settings: YOLOSettings, split: str) -> bool:
    """Tell whether data.yaml, or without it a folder, holds a split."""
    if settings.entries:
        return any(settings.entries.get(word) for word in _words(split))
    folders = (settings.root / folder for word in _words(split) for folder in (f"{IMAGES}/{word}", f"{word}/{IMAGES}"))
    return any(folder.is_dir() for folder in folders)


def list_split(settings: YOLOSettings, split: str) -> list[LabelledImage]:
    """Return the images of a split, each once, in order of path.

    A label lies where its image does with `labels` for the last folder `images` of the path; below `labels` of the
    root where there is no such folder; or else beside the image.

    Raises:
        AnnotationError: the split is not there, or holds no image.
    """
    entries = next((settings.entries[word] for word in _words(split) if settings.entries.get(word)), None)
    if entries is None and settings.entries:
        given = ", ".join(settings.entries)
        _refuse(
            settings.source, f"has no split {split!r} (there are: {given})", f"Name its images with {split}: in it."
        )
    images = [image for entry in entries or _split_folders(settings, split) for image in _list_entry(settings, entry)]
    images = sorted(dict.fromkeys(images))
    if not images:
        kinds = " ".join(IMAGE_SUFFIXES)
        _refuse(settings.source, f"the split {split!r} holds no image ({kinds})", "Correct the path of the split.")
    labels_root = settings.root / LABELS
    has_labels_root = labels_root.is_dir()
    return [
        LabelledImage(image, _label_of(image, settings.root, labels_root if has_labels_root else None))
        for image in images
    ]


def read_lines(file: Path, noun: str, remedy: str) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank, stripped.

    Raises:
        AnnotationError: the file is missing, empty or no such text.
    """
    try:
        text = read_file(file, AnnotationError, noun, remedy).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise AnnotationError(f"{printable(file)}: is not UTF-8 text (byte {reason.start}).\n{remedy}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_yaml(file: Path) -> YOLOSettings:
    source = printable(file)
    remedy = "Give the data.yaml of the data set, or its folder: data.root"
    content = read_file(file, AnnotationError, "a YOLO data set's settings (YAML)", remedy, MAX_SETTINGS_BYTES)
    settings = _parse_yaml(source, content)
    if not isinstance(settings, dict) or "names" not in settings:
        _refuse(source, "has no 'names'; data.yaml gives path, train, val and names", remedy)
    root = settings.get("path") or "."
    if not isinstance(root, str) or not is_path(root):
        _refuse(source, f"path is {str(root)[:80]!r}; it must be a folder", "Correct it, or leave it out.")
    folder = file.parent / root
    keypoints = settings.get("kpt_shape") or (0, 0)
    if not (isinstance(keypoints, list | tuple) and len(keypoints) == 2 and {int} == set(map(type, keypoints))):
        _refuse(source, f"kpt_shape is {str(keypoints)[:80]!r}; it must be two whole numbers", "Correct it.")
    return YOLOSettings(
        source,
        folder if folder.is_dir() else file.parent,  # `path` is often that of another machine
        _checked_names(source, settings["names"], settings.get("nc")),
        {key: _entries(source, key, settings[key]) for key in ("train", "val", "valid", "test") if settings.get(key)},
        keypoints[0] * keypoints[1],
    )


def _parse_yaml(source: str, content: bytes) -> Any:
    """Parse YAML without aliases: a few of them can stand for gigabytes, and nobody needs them here."""
    depth = 0
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                _refuse(source, "has YAML aliases, which data.yaml needs not", "Write the values out.")
            if depth > MAX_DEPTH:  # thousands of brackets take the parser seconds
                _refuse(source, f"is nested more than {MAX_DEPTH} deep", "Write it as data.yaml is written.")
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:  # ValueError: a date such as 2024-99-99
        mark = getattr(reason, "problem_mark", None)
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = getattr(reason, "problem", None) or type(reason).__name__
        raise AnnotationError(f"{place}: is not YAML: {str(problem)[:200]}.\nCorrect the line.") from None


def _checked_names(source: str, names: object, num_classes: object) -> tuple[str, ...]:
    """Return the class names in order of index, given as a list or as index: name."""
    if isinstance(names, dict):
        try:
            by_index = {int(str(key)): name for key, name in names.items()}
        except ValueError:
            _refuse(source, "names has keys that are no whole numbers", "Write names as a list, or as index: name.")
        if sorted(by_index) != list(range(len(names))):
            found = ", ".join(str(key)[:20] for key in list(names)[:20])
            problem = f"names has the indices {found}; they must be 0..{len(names) - 1}, each once"
            _refuse(source, problem, "Number the classes from 0 without gaps.")
        names = [by_index[index] for index in range(len(by_index))]
    if not isinstance(names, list) or not names:
        _refuse(source, "names must be a list of class names, or a table index: name", "List them in order of index.")
    wrong = next((n for n, name in enumerate(names) if isinstance(name, list | dict) or not str(name).strip()), None)
    if wrong is not None:
        _refuse(source, f"class {wrong} has no name; it must be text", "Name every class.")
    if num_classes is not None and num_classes != len(names):
        problem = f"nc is {str(num_classes)[:20]}, but there are {len(names)} names; they must agree"
        _refuse(source, problem, "Give every class a name, and correct nc or leave it out.")
    texts = tuple(str(name).strip() for name in names)
    if len(set(texts)) < len(texts):
        repeated = next(name for name in texts if texts.count(name) > 1)
        _refuse(source, f"two classes are called {repeated!r}", "Give every class a name of its own.")
    return texts


def _entries(source: str, key: str, value: object) -> tuple[str, ...]:
    """Return the folders and lists that a split is made of."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, str) or not entry or not is_path(entry):
            _refuse(source, f"{key} must be a folder, a list file, or a list of these", f"Correct {key}.")
    return tuple(entries)


def _words(split: str) -> Sequence[str]:
    return SPLIT_WORDS.get(split, (split,))


def _split_folders(settings: YOLOSettings, split: str) -> list[str]:
    """Return the folder of a split by convention: images/<split>, or <split>/images as Roboflow exports it."""
    words = [word for word in _words(split) if Path(word).name == word]
    folders = [folder for word in words for folder in (f"{IMAGES}/{word}", f"{word}/{IMAGES}")]
    found = [folder for folder in folders if (settings.root / folder).is_dir()]
    if not found:
        problem = f"has no split {split!r}: neither {IMAGES}/{split} nor {split}/{IMAGES} is a folder there"
        _refuse(settings.source, problem, "Put the images there, or name their folders in data.yaml.")
    return found[:1]


def _list_entry(settings: YOLOSettings, entry: str) -> list[Path]:
    """Return the images of one folder or list file."""
    path = settings.root / entry
    # Roboflow writes ../train/images for what lies beside its data.yaml; COCO's own folders have no `images` above.
    for other in (entry.removeprefix("../"), entry.removeprefix(f"{IMAGES}/")):
        if not path.exists():
            path = settings.root / other
    if path.is_dir():
        return find_images(path)
    if path.suffix != ".txt" or not path.is_file():
        problem = f"{entry!r} is neither a folder nor a list file (.txt) in {printable(settings.root)}"
        _refuse(settings.source, problem, "Correct it, or path: in data.yaml.")
    remedy = "Give a text file with the path of an image on each line."
    lines = read_lines(path, "a list of images", remedy)
    return [_listed_image(settings, path, number, line) for number, line in enumerate(lines, start=1)]


def _listed_image(settings: YOLOSettings, file: Path, number: int, line: str) -> Path:
    """Return the image that a line names, relative to the root or, with ./, to the list. It must lie below one."""
    is_named = is_path(line)
    image = Path((file.parent if line.startswith("./") else settings.root) / line) if is_named else None
    roots = {settings.root.resolve(), file.parent.resolve()}
    if image is None or not any(image.resolve().is_relative_to(root) for root in roots):
        _refuse(
            f"{printable(file)}:{number}",
            f"{line!r:.200} is not a path below {printable(settings.root)}",
            "Correct the line, or set path: in data.yaml to a folder that holds all images.",
        )
    return image


def _label_of(image: Path, root: Path, labels_root: Path | None) -> Path:
    """Return where the labels of an image are."""
    parts = image.parts
    if IMAGES in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index(IMAGES)
        return Path(*parts[:place], LABELS, *parts[place + 1 :]).with_suffix(".txt")
    if labels_root is not None and image.is_relative_to(root):
        return (labels_root / image.relative_to(root)).with_suffix(".txt")
    return image.with_suffix(".txt")


def _refuse(source: str, problem: str, remedy: str) -> NoReturn:
    raise AnnotationError(f"{source}: {problem}.\n{remedy}")
