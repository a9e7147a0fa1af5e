"""Reads YOLO txt labels (a line `class cx cy width height` for each object) into an `AnnotationSet`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import (
    BOX_REPEATED,
    LABEL_MALFORMED,
    NO_LABEL,
    POLYGON,
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
    require_images,
    require_same_names,
)
from onestage.data.image_headers import NUM_THREADS, HeaderCheck, check_header
from onestage.data.source import Source, Split
from onestage.data.yolo_layout import LabelledImage, YOLOSettings, find_splits, list_split, read_settings
from onestage.errors import AnnotationError
from onestage.files import list_files, printable, read_file
from onestage.types import AnnotationSet, Finding

BLANK_BYTES = 64  # a label file without objects is empty, or holds a line end or two
BOX_COLUMNS = 5  # class, cx, cy, width, height
TOLERANCE = 1e-3  # of rounding, in fractions of the image
PIXELS_FRACTION = 0.2  # more boxes than this beyond 0..1 are no accident
PIXELS_MINIMUM = 4  # and so many must be, or one careless box would condemn a small file
NAN_BOX = (float("nan"),) * 4


class YOLO(Source):
    """YOLO txt labels: the splits that data.yaml names, or images/<split> and labels/<split>.

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
        return tuple(split for split, name in self._names.items() if find_splits(settings, name))

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read the label files of a split."""
        return parse_yolo(self.path, self._names[split], class_names=class_names, max_bad_fraction=max_bad_fraction)

    def describe(self, split: Split) -> str:
        """Return the settings file and the name of a split."""
        return f"{printable(self.path)} ({self._names[split]})"

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """The names of data.yaml or classes.txt."""
        try:
            names = read_settings(self.path).class_names
        except AnnotationError:
            return None
        return names, tuple(range(1, len(names) + 1))


class LabelLine(NamedTuple):
    """One line of a label file."""

    number: int  # of the line, from 1
    class_index: float  # as written
    box: tuple[float, ...]  # cx, cy, width, height, in fractions of the image
    problem: str | None  # the rule that it breaks
    is_polygon: bool


class LabelFile(NamedTuple):
    """One label file."""

    path: Path
    lines: list[LabelLine]
    num_repeated: int  # lines left out because they stand there twice


def parse_yolo(
    data: Path, split: str, *, class_names: Sequence[str] | None = None, max_bad_fraction: float = 0.01
) -> AnnotationSet:
    """Read the images of a split. Those without a label file, or with an empty one, stay as images without objects.

    A label says `class cx cy width height`, in fractions of the upright image; the outline of a segmentation data set
    becomes the box around it. A line that cannot be used, and an image whose label file or header cannot be read, is
    left out and named in `AnnotationSet.skipped`. Image ids are 1..N in order of path, category ids 1..K.

    Args:
        data: data.yaml, or the folder of the data set; see `read_settings`.
        split: train, val or test.
        class_names: [K] names that the data set must have, in the label order wanted; None takes its own.
        max_bad_fraction: 0..1, the fraction of boxes, and of images, that may be left out; two always may, unless 0.

    Raises:
        AnnotationError: files are missing, are not what they should be, or too much of them cannot be used.
    """
    settings = read_settings(data)
    source = f"{settings.source} ({split})"
    names = settings.class_names
    if class_names is not None:
        require_same_names(source, names, class_names)
    columns, files, findings = _read_images(source, list_split(settings, split), settings)
    require_images(source, len(files), findings, max_bad_fraction)
    lines = [line for file in files for line in file.lines]
    places = [f"{printable(file.path)}:{line.number}" for file in files for line in file.lines]
    wanted = tuple(class_names) if class_names is not None else names
    return build_annotation_set(
        source,
        columns,
        _object_columns(source, files, columns.sizes, [wanted.index(name) for name in names]),
        wanted,
        range(1, len(wanted) + 1),
        describe=lambda row: places[row] if lines[row].problem else f"{places[row]}: {_written(lines[row])}",
        findings=findings,
        max_bad_fraction=max_bad_fraction,
    )


def _read_images(
    source: str, listed: list[LabelledImage], settings: YOLOSettings
) -> tuple[ImageColumns, list[LabelFile], list[Finding]]:
    """Read size and labels of every image. Those that are left out are findings."""
    label_names = {folder: list_files(folder) for folder in {item.label.parent for item in listed}}
    files: list[LabelFile] = []
    paths: list[str] = []
    sizes: list[tuple[int, int]] = []
    findings: list[Finding] = []
    num_missing = 0
    for (image, label), header in zip(listed, _read_headers(listed), strict=True):
        is_missing = label.name not in label_names[label.parent]
        bad = [finding for finding in header.findings if finding.effect == "skipped"][:1]
        try:
            file = LabelFile(label, [], 0) if is_missing else _read_label(label, settings.num_keypoint_values)
        except AnnotationError as reason:
            place, _, problem = str(reason).partition("\n")[0].partition(": ")
            bad = [LABEL_MALFORMED.broken(place, problem)]
        num_missing += is_missing
        findings += bad
        if not bad:
            files.append(file)
            paths.append(str(image))
            sizes.append((header.height, header.width))
    if num_missing == len(listed):
        problem = f"none of its {num_missing} images has a label file (looked for {printable(listed[0].label)}, ...)"
        remedy = "Put labels/ beside images/, with a .txt file for each image."
        raise AnnotationError(f"{source}: {problem}.\n{remedy}")
    findings += _about_labels(source, files, num_missing)
    ids = np.arange(1, len(paths) + 1, dtype=np.int64)
    return ImageColumns(paths, ids, np.array(sizes, dtype=np.int32).reshape(-1, 2)), files, findings


def _read_headers(listed: list[LabelledImage]) -> list[HeaderCheck]:
    """Read the size of every image: labels are fractions of it."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(check_header, [str(item.image) for item in listed]))


def _about_labels(source: str, files: list[LabelFile], num_missing: int) -> list[Finding]:
    """Count what was read in another way than written."""
    num_repeated = sum(file.num_repeated for file in files)
    num_polygons = sum(line.is_polygon for file in files for line in file.lines)
    counted = (
        (NO_LABEL, num_missing, f"{num_missing} images have no label file: without objects"),
        (BOX_REPEATED, num_repeated, f"{num_repeated} lines stand in their file twice: read once"),
        (POLYGON, num_polygons, f"{num_polygons} objects are outlines: the box around each is used"),
    )
    return [rule.broken(source, problem, number) for rule, number, problem in counted if number]


def _read_label(path: Path, num_keypoint_values: int) -> LabelFile:
    """Read one label file; each line counts once."""
    with suppress(OSError):  # `read_file` has the words for it
        if path.stat().st_size <= BLANK_BYTES and not path.read_bytes().strip():
            return LabelFile(path, [], 0)
    content = read_file(path, AnnotationError, "a YOLO label file", "Export it again.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise AnnotationError(f"{printable(path)}: is not UTF-8 text (byte {reason.start}); export it again") from None
    if "\0" in text:
        raise AnnotationError(f"{printable(path)}: holds NUL bytes, so it is not text; export it again")
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1)]
    first_of_words = {tuple(words): number for number, words in reversed(rows) if words}
    lines = [_read_line(number, words, num_keypoint_values) for words, number in reversed(first_of_words.items())]
    return LabelFile(path, lines, sum(1 for _, words in rows if words) - len(lines))


def _read_line(number: int, words: Sequence[str], num_keypoint_values: int) -> LabelLine:
    """Read `class cx cy width height`, with keypoints behind them in a pose data set; or `class x1 y1 x2 y2 x3 y3`."""
    try:
        class_index, *values = map(float, words)
    except ValueError:
        problem = f"{' '.join(words)!r:.80}: a line must hold numbers with spaces between, class cx cy width height"
        return LabelLine(number, float("nan"), NAN_BOX, problem, False)
    if len(words) == BOX_COLUMNS + num_keypoint_values:
        return LabelLine(number, class_index, tuple(values[:4]), None, False)
    if len(values) >= 6 and len(values) % 2 == 0 and not num_keypoint_values:
        left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
        if not np.isfinite(values).all():
            left = float("nan")  # min and max pass it over
        box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        return LabelLine(number, class_index, box, None, True)
    problem = f"has {len(words)} columns; a line must have 5: class cx cy width height"
    if len(words) == BOX_COLUMNS + 1:
        problem += " (6 are those of detections, with a score)"
    return LabelLine(number, class_index, NAN_BOX, problem, False)


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
    return ObjectColumns(
        image_rows=image_rows,
        boxes=np.concatenate([centers - halves, centers + halves], axis=1),
        labels=labels,
        areas=np.full(len(lines), np.nan),
        is_crowd=np.zeros(len(lines), dtype=np.bool_),
        is_difficult=np.zeros(len(lines), dtype=np.bool_),
        problems=problems,
    )


def _refuse_pixels(source: str, is_beyond: npt.NDArray[np.bool_], fractions: npt.NDArray[np.float64]) -> None:
    """Stop where so many boxes leave 0..1 that they must be in pixels."""
    num_beyond = int(np.count_nonzero(is_beyond))
    if num_beyond < PIXELS_MINIMUM or num_beyond <= PIXELS_FRACTION * len(is_beyond):
        return
    example = " ".join(f"{value:g}" for value in fractions[is_beyond][0])
    problem = f"{num_beyond} of {len(is_beyond)} boxes lie beyond 0..1 (such as {example}); are they in pixels?"
    remedy = "Divide cx and width by the width of the image, cy and height by its height."
    raise AnnotationError(f"{source}: {problem}\n{remedy}")


def _written(line: LabelLine) -> str:
    return f"class {line.class_index:g}, box " + " ".join(f"{value:g}" for value in line.box)
