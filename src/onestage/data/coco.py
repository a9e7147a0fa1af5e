"""Read COCO instance annotations (arXiv:1405.0312, the "object detection" format)."""

import gc
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onestage.data.annotations as rules
from onestage.data.annotations import ImageColumns, ObjectColumns, build_annotation_set, malformed, require_same_names
from onestage.data.source import Source, Split, role_of
from onestage.errors import AnnotationError
from onestage.files import find_files, is_encodable, open_at_once, printable, read_file
from onestage.types import AnnotationSet, Finding, JSONDict

TABLES = ("images", "annotations", "categories")
ROBOFLOW_FILE = "_annotations.coco.json"
HEAD_BYTES = 4 << 20  # of a JSON file, searched for the first file name
FIRST_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
MANY_BYTES = 8 << 20  # smaller files are parsed with their outlines
# A list of numbers and lists, up to the comma before the next key. Never part of a text: there a quote is escaped.
OUTLINES = re.compile(rb'"segmentation"\s*:\s*\[[-+0-9eE.,\s\[\]]*\]\s*,(?=\s*")')
XYXY_FRACTION = 0.2  # more boxes than this that leave their image as [x, y, width, height] are no accident
XYXY_MINIMUM = 4  # and at least so many, or one careless box would condemn a small file
AREA_TOLERANCE = 0.01  # of the box's area, and 1 px^2; more is no rounding
FRESH_COPY = "Take a fresh copy of the file, or export it again as COCO JSON."
OTHER_PATH = "Correct data.path (data.source.train, data.source.val), or take a fresh copy of the file."


class COCO(Source):
    """COCO JSON files: `annotations/instances_<split>.json`, `<split>/_annotations.coco.json`, or one file.

    Args:
        path: the folder of the data set, or its only JSON file, which is then the training split.
        train: name of the training split (of `instances_<name>.json`), or a JSON file, relative to `path` or absolute;
            null: found by name (train2017, train).
        val: the validation split; null: found by name (val2017, val, valid, validation).
        test: the test split; null: found by name.
        train_images: image folder of the training split, relative to `path` or absolute; null: where its images are.
        val_images: image folder of the validation split.
        test_images: image folder of the test split.
    """

    format = "COCO"

    def __init__(
        self,
        path: str | Path,
        *,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        train_images: str | Path | None = None,
        val_images: str | Path | None = None,
        test_images: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._root = self.path.parent if self.path.suffix.lower() == ".json" else self.path
        self._given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
        self._images: dict[Split, str | Path | None] = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that were named or found."""
        found = self._found()
        return tuple(split for split, given in self._given.items() if given is not None or split in found)

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read the JSON file of a split."""
        file, images = self.annotation_file(split), self.image_folder(split)
        return parse_coco(file, images, class_names=class_names, max_bad_fraction=max_bad_fraction)

    def describe(self, split: Split) -> str:
        """Return the JSON file of a split."""
        return printable(self.annotation_file(split))

    def annotation_file(self, split: Split) -> Path:
        """Return the JSON file of a split; the usual name if there is none."""
        given = self._given[split]
        if str(given).endswith(".json"):
            return self._root / str(given)
        usual = self._root / "annotations" / f"instances_{given or split}.json"
        return usual if given is not None else self._found().get(split, usual)

    def image_folder(self, split: Split) -> Path:
        """Return the folder that the file names of a split are relative to."""
        given, file = self._images[split], self.annotation_file(split)
        return self._root / given if given is not None else find_image_folder(file, self._root)

    def _found(self) -> dict[Split, Path]:
        """Return the files of the folder by role. Of several for one role, that of 2017 counts, or else the last."""
        if self.path.suffix.lower() == ".json":
            return {"train": self.path}
        files = list_annotation_files(self.path)
        by_role: dict[Split, Path] = {}
        for file in sorted(files, key=lambda file: ("2017" in file.name, file.name)):
            role = role_of(split_name(file))
            if role is not None:
                by_role[role] = file
        return by_role or ({"train": files[0]} if len(files) == 1 else {})


def list_annotation_files(folder: Path) -> list[Path]:
    """Return the COCO annotation files of a folder: instances, or else Roboflow's, or else any JSON files."""
    instances = "instances_*.json"
    patterns = (f"annotations/{instances}", f"*/{ROBOFLOW_FILE}", instances, "annotations/*.json", "*.json")
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def split_name(file: Path) -> str:
    """Return what a COCO file calls its split: `train2017`, or the folder of Roboflow's file."""
    return file.parent.name if file.name == ROBOFLOW_FILE else file.stem.removeprefix("instances_")


def find_image_folder(file: Path, root: Path) -> Path:
    """Return the first likely folder that holds the first image of a COCO file of the data set in `root`."""
    above, name = file.parent.parent, split_name(file)
    likely = [
        root / name, root / "images" / name, above / name, file.parent / name, above / "images" / name,
        above / "images", file.parent / "images", file.parent, above / "JPEGImages", above,
    ]  # fmt: skip
    present = [folder for folder in likely if folder.is_dir()] or likely
    with suppress(OSError, ValueError, StopIteration):  # the parser reports them
        with open(file, "rb", opener=open_at_once) as stream:
            found = FIRST_FILE_NAME.search(stream.read(HEAD_BYTES))
        if found:
            return next(folder for folder in present if (folder / str(json.loads(found[1]))).is_file())
    return present[0]


def parse_coco(
    annotation_file: Path,
    image_root: Path,
    *,
    class_names: Sequence[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> AnnotationSet:
    """Read a COCO instances file. Images without objects stay; outlines are not read.

    Labels are 0..K-1 in order of category id, or in the order of `class_names`. Boxes that cannot be used, and images
    that are not on disk, are skipped and named in `AnnotationSet.skipped`. A category 0 that only names the export
    (Roboflow's root category: the supercategory of the others, without boxes) is not a class.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`; `annotations` may be an empty list.
        image_root: the folder that `file_name` is relative to. No file outside it is ever opened.
        class_names: as in `Source.read`; the file must have exactly these.
        max_bad_fraction: as in `Source.read`.
    """
    source = printable(annotation_file)
    content = _load(annotation_file)
    images, annotations, categories = (_table(source, content, name) for name in TABLES)
    findings = _check_ids(source, annotations)
    category_of_object = _integer_column(source, annotations, "category_id", "annotation", findings)
    classes = _read_categories(source, categories, set(category_of_object.tolist()), findings)
    if class_names is not None:
        require_same_names(source, list(classes), class_names)
        classes = {name: classes[name] for name in class_names}
    labels = _labels(source, annotations, category_of_object, list(classes.values()))
    columns, row_of_id = _read_images(source, images, image_root, findings)
    objects, numbers = _read_objects(source, annotations, labels, columns, row_of_id, findings)

    def describe(row: int) -> str:
        annotation = annotations[numbers[row]]
        place = f"annotation {annotation.get('id', f'number {numbers[row]}')} (image {annotation['image_id']})"
        return f"{source}: {place}, bbox {str(annotation.get('bbox'))[:80]}"

    return build_annotation_set(
        source,
        columns,
        objects,
        list(classes),
        list(classes.values()),
        describe=describe,
        findings=findings,
        max_bad_fraction=max_bad_fraction,
    )


def _load(annotation_file: Path) -> JSONDict:
    """Parse the file and check that its top level is an object.

    Large files are parsed without outlines, in a third of the time and memory. If that fails, the whole file is parsed
    again, so that the line and column of the message are right.
    """
    source = printable(annotation_file)
    read = partial(read_file, annotation_file, AnnotationError, "a COCO annotation file (JSON)", OTHER_PATH)
    content = read()
    repeated = any(content.count(f'"{name}"'.encode()) > 1 for name in TABLES)
    try:
        without_outlines = len(content) >= MANY_BYTES and not repeated
        content = OUTLINES.sub(b"", content) if without_outlines else content
        parsed = _parse_json(source, content, repeated)
    except AnnotationError:
        parsed = _parse_json(source, read(), repeated)
    if isinstance(parsed, list):
        keys = sorted(parsed[0]) if parsed and isinstance(parsed[0], dict) else []
        kind = "a detections (results) file" if "image_id" in keys else "another format"
        problem = f"the top level is a list with the keys {', '.join(keys[:8]) or 'none'}, so this is {kind}"
        raise malformed(source, f"{problem}; a COCO annotation file is an object with {', '.join(TABLES)}", OTHER_PATH)
    if not isinstance(parsed, dict):
        raise malformed(source, f"the top level is a {type(parsed).__name__}; it must be an object", FRESH_COPY)
    return parsed


def _parse_json(source: str, content: bytes, repeated: bool) -> Any:
    """Parse JSON. repeated: a table's name occurs twice, so look for repeated keys too, which is slow."""
    if content[:2] in (b"PK", b"\x1f\x8b"):
        raise malformed(source, "is compressed; it must be JSON text", "Unpack it first (unzip, gunzip).")
    was_enabled = gc.isenabled()
    gc.disable()  # there is no garbage, and searching a million new objects for it doubles the time
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repeated_keys if repeated else None)
    except UnicodeDecodeError as reason:
        problem = f"is not UTF-8 text (byte {reason.start}); JSON must be"
        error = malformed(source, problem, "Convert it (iconv -t UTF-8), or export it again.")
    except RecursionError:
        error = malformed(source, "is nested too deeply for an annotation file", FRESH_COPY)
    except json.JSONDecodeError as reason:
        is_cut = reason.msg.startswith("Unterminated") or len(text) - reason.pos < 16
        cut = f"; the file ends there, after {len(text)} characters, so it was cut off" if is_cut else ""
        error = malformed(f"{source}:{reason.lineno}:{reason.colno}", f"is not JSON: {reason.msg}{cut}", FRESH_COPY)
    except ValueError as reason:  # a repeated key; an integer of thousands of digits
        error = malformed(source, f"is not usable JSON: {reason}", FRESH_COPY)
    finally:
        if was_enabled:
            gc.enable()
    raise error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> JSONDict:
    if len(dict(pairs)) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice in one object, and only one of them would count")
    return dict(pairs)


def _table(source: str, content: JSONDict, name: str) -> list[JSONDict]:
    """Return one of the three lists, checked to hold objects."""
    if name not in content:
        keys = ", ".join(sorted(map(str, content))[:8]) or "none"
        remedy = 'A set without boxes has "annotations": [].' if name == "annotations" else FRESH_COPY
        raise malformed(source, f"has no {name!r}; it must have {', '.join(TABLES)}, got the keys {keys}", remedy)
    table = content[name]
    if not isinstance(table, list) or not set(map(type, table)) <= {dict}:
        raise malformed(source, f"{name!r} must be a list of objects", FRESH_COPY)
    if not table and name != "annotations":
        raise malformed(source, f"{name!r} is empty", "Give a split that holds images and classes.")
    return table


def _integer_column(
    source: str, table: list[JSONDict], key: str, noun: str, findings: list[Finding]
) -> npt.NDArray[np.int64]:
    """Return one key of every entry as int64. Strings of digits are read if all entries have them."""
    values = [entry.get(key) for entry in table]
    kinds = set(map(type, values))
    with suppress(ValueError, OverflowError):
        if kinds <= {int}:
            return np.array(values, dtype=np.int64)
        if kinds == {str}:
            numbers = np.array([int(str(value)) for value in values], dtype=np.int64)
            problem = f"every {key} of the {noun}s is a string; read as integers"
            findings.append(rules.IDS_AS_TEXT.broken(source, problem, len(numbers)))
            return numbers
    wanted = str if kinds == {str} else int
    wrong = (n for n, value in enumerate(values) if type(value) is not wanted or not str(value).lstrip("-").isdigit())
    number = next(wrong, 0)
    problem = f"{noun} number {number} has {key} {values[number]!r:.80}; it must be a 64-bit integer"
    raise malformed(source, problem, f"Write every {key} of the file as an integer.")


def _check_ids(source: str, annotations: list[JSONDict]) -> list[Finding]:
    """Report the annotation ids that confuse other tools. Nothing here depends on them."""
    ids = [entry.get("id") for entry in annotations]
    given = [str(value) for value in ids if value is not None]
    counted = (
        (rules.ID_ZERO, "id 0 or none", sum(1 for value in ids if value is None or value == 0)),
        (rules.IDS_REPEATED, "the id of an earlier one", len(given) - len(set(given))),
    )
    text = "{} annotations have {}; ids are numbered anew"
    return [rule.broken(source, text.format(count, problem), count) for rule, problem, count in counted if count]


def _read_categories(
    source: str, categories: list[JSONDict], used_ids: set[int], findings: list[Finding]
) -> dict[str, int]:
    """Return class name -> category id, in order of id."""
    ids, pairs = _integer_column(source, categories, "id", "category", findings).tolist(), []
    for category_id, entry in zip(ids, categories, strict=True):
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip() or not is_encodable(name):
            problem = f"category {category_id} has name {name!r:.80}; it must be text"
            raise malformed(source, problem, "Name every category.")
        pairs.append((category_id, printable(name.strip())))
    pairs.sort()
    parents = {entry.get("supercategory") for entry in categories} - {"none"}
    if len(pairs) > 1 and pairs[0][0] == 0 and 0 not in used_ids and parents == {pairs[0][1]}:
        problem = f"category 0 ({pairs[0][1]!r}) only groups the others and has no boxes: no class"
        findings.append(rules.ROOT_CATEGORY.broken(source, problem))
        pairs = pairs[1:]
    for key, values in zip(("id", "name"), zip(*pairs, strict=True), strict=True):
        repeated = ", ".join(str(value) for value, count in Counter(values).items() if count > 1)
        if repeated:
            raise malformed(source, f"several categories have {key} {repeated:.80}; each must be unique", FRESH_COPY)
    return {name: category_id for category_id, name in pairs}


def _labels(
    source: str, annotations: list[JSONDict], category_of_object: npt.NDArray[np.int64], category_ids: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Turn category ids into labels 0..K-1."""
    label_of_id = {category_id: label for label, category_id in enumerate(category_ids)}
    labels = np.array([label_of_id.get(category_id, -1) for category_id in category_of_object.tolist()], dtype=np.int64)
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        annotation = annotations[unknown[0]]
        problem = f"annotation {annotation.get('id')} has category_id {annotation['category_id']}"
        ids = ", ".join(map(str, category_ids[:100]))
        remedy = "Add the category to 'categories', or remove its annotations."
        raise malformed(source, f"{problem} ({len(unknown)} such annotations); the categories are {ids}", remedy)
    return labels


def _read_images(
    source: str, images: list[JSONDict], image_root: Path, findings: list[Finding]
) -> tuple[ImageColumns, dict[int, int]]:
    """Return the images that are on disk, and image id -> row (-1: not on disk, which is a finding)."""
    ids = _integer_column(source, images, "id", "image", findings)
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        repeated = int(values[counts > 1][0])
        files = [str(images[n].get("file_name")) for n in np.flatnonzero(ids == repeated)[:2]]
        problem = f"image id {repeated} belongs to {files[0]!r} and {files[1]!r}; ids must be unique"
        raise malformed(source, problem, FRESH_COPY)
    sizes = np.array([[_side(source, image, key) for key in ("height", "width")] for image in images], dtype=np.int32)
    names = [image.get("file_name") for image in images]
    paths = find_files(source, names, image_root)
    found = np.array([path is not None for path in paths])
    findings += [
        rules.IMAGE_MISSING.broken(f"{source}: image {ids[n]}", f"{names[n]!r} is not in {printable(image_root)}")
        for n in np.flatnonzero(~found)
    ]
    rows = np.where(found, np.cumsum(found) - 1, -1)
    columns = ImageColumns([path for path in paths if path is not None], ids[found], sizes[found])
    return columns, dict(zip(ids.tolist(), rows.tolist(), strict=True))


def _side(source: str, image: JSONDict, key: str) -> int:
    """Return the image's height or width; 0 if the file gives none."""
    value = image.get(key) or 0
    if isinstance(value, int | float) and value == value and 0 <= value < 1 << 31 and int(value) == value:
        return int(value)
    problem = f"image {image.get('id')} has {key} {value!r:.80}; it must be a whole number >= 0"
    raise malformed(source, problem, f"Give the {key} of the image file in pixels, or leave it out.")


def _read_objects(
    source: str,
    annotations: list[JSONDict],
    labels: npt.NDArray[np.int64],
    images: ImageColumns,
    row_of_id: Mapping[int, int],
    findings: list[Finding],
) -> tuple[ObjectColumns, npt.NDArray[np.int64]]:
    """Return the objects of the images that are on disk, and the position of each in `annotations`.

    An annotation whose image the file does not list is a bad box; one whose image is not on disk is skipped with it.
    """
    image_ids = _integer_column(source, annotations, "image_id", "annotation", findings)
    unlisted, missing = -2, -1
    rows = np.array([row_of_id.get(image_id, unlisted) for image_id in image_ids.tolist()], dtype=np.int64)
    numbers = np.flatnonzero(rows != missing)
    kept = [annotations[number] for number in numbers]
    rows, labels = rows[numbers], labels[numbers]
    boxes, problems = _read_boxes(kept)
    problems |= {int(row): "the file lists no image of that id" for row in np.flatnonzero(rows == unlisted)}
    rows = np.maximum(rows, 0)
    _refuse_xyxy(source, boxes, images.sizes[rows])
    areas = _read_areas(source, kept, boxes[:, 2] * boxes[:, 3], findings)
    boxes[:, 2:] += boxes[:, :2]
    is_crowd = np.array([entry.get("iscrowd") == 1 for entry in kept], dtype=np.bool_)
    is_difficult = np.array([entry.get("difficult") == 1 for entry in kept], dtype=np.bool_)  # not COCO's own
    return ObjectColumns(rows, boxes, labels, problems, areas, is_crowd, is_difficult), numbers


def _read_boxes(annotations: list[JSONDict]) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
    """Return [T, 4] (x, y, width, height), and row -> problem where the file has something else."""
    problems: dict[int, str] = {}
    boxes: list[Sequence[float]] = []
    for row, annotation in enumerate(annotations):
        box = annotation.get("bbox")
        if isinstance(box, list) and len(box) == 4 and {int, float}.issuperset(map(type, box)):
            boxes.append(box)
        else:
            boxes.append((np.nan,) * 4)
            problems[row] = "bbox must be a list of 4 numbers [x, y, width, height]"
            problems[row] += "; outlines are not read" if box is None else ""
    return _floats([number for box in boxes for number in box]).reshape(-1, 4), problems


def _read_areas(
    source: str, annotations: list[JSONDict], box_areas: npt.NDArray[np.float64], findings: list[Finding]
) -> npt.NDArray[np.float64]:
    """Return the areas [T]; NaN, for the box's own, where an object of that box cannot have the given area.

    An area smaller than the box's is that of the outline, whether or not the file still has it.
    """
    values = [entry.get("area") for entry in annotations]
    areas = _floats([value if isinstance(value, int | float) and value is not True else np.nan for value in values])
    with np.errstate(invalid="ignore"):
        is_wrong = (areas <= 0) | (areas > (1 + AREA_TOLERANCE) * box_areas + 1)
        is_wrong = is_wrong & (box_areas > 0)  # a bad box is a finding of its own
    if num_wrong := int(np.count_nonzero(is_wrong)):
        problem = f"the area of {num_wrong} objects is 0 or more than their box's; the box's is used"
        findings.append(rules.AREA_WRONG.broken(source, problem, num_wrong))
    areas[is_wrong] = np.nan
    return areas


def _floats(numbers: list[float]) -> npt.NDArray[np.float64]:
    """Return the numbers as an array. An integer of hundreds of digits, which no float can hold, becomes infinite."""
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError:
        return np.array([number if abs(number) < sys.float_info.max else np.inf for number in numbers])


def _refuse_xyxy(source: str, boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32]) -> None:
    """Raise if boxes ([T, 4] as written) make sense as two corners and not as corner and size."""
    is_known = (sizes > 0).all(axis=1) & np.isfinite(boxes).all(axis=1)
    boxes, limits = boxes[is_known], sizes[is_known][:, ::-1] + 1  # 1 px: rounding
    leaves = (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1)
    fits = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)).all(axis=1)
    if np.count_nonzero(leaves) < max(XYXY_MINIMUM, XYXY_FRACTION * len(boxes)) or fits.mean() < 1 - XYXY_FRACTION / 10:
        return
    problem = f"{np.count_nonzero(leaves)} of {len(boxes)} boxes leave their image as [x, y, width, height]"
    remedy = "Write bbox as [x1, y1, x2 - x1, y2 - y1], in pixels."
    raise malformed(source, f"{problem}, and nearly all fit as [x1, y1, x2, y2]: this looks like xyxy", remedy)
