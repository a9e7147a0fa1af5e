"""Read COCO instance annotations (arXiv:1405.0312, the "object detection" format)."""

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onestage.data.annotations as rules
from onestage.data.annotations import ImageColumns, ObjectColumns, build_annotation_set, malformed
from onestage.data.source import Source, Split, role_of
from onestage.errors import AnnotationError
from onestage.files import (
    as_path,
    find_files,
    foreign_parts,
    is_hidden,
    printable,
    read_file,
    refuse_repeated_keys,
    spellings,
    to_flag,
    to_number,
)
from onestage.types import AnnotationSet, Finding, JSONDict

TABLES = ("images", "annotations", "categories")
ROBOFLOW_FILE = "_annotations.coco.json"
MANY_BYTES = 8 << 20  # smaller files are parsed with their outlines
# A list of numbers and lists, up to the comma before the next key. Never part of a text: there a quote is escaped.
OUTLINES = re.compile(rb'"segmentation"\s*:\s*\[[-+0-9eE.,\s\[\]]*\]\s*,(?=\s*")')
MAX_SEARCHED = 500  # folders of a data set whose images are in none of the usual ones
MAX_TRIED = 5  # images, evenly spaced, of which one must be on disk, to find their folder
AREA_TOLERANCE = 0.01  # of the box's area, and 1 px^2; more is not rounding
FRESH_COPY = "Take a fresh copy of the file, or export it again as COCO JSON, in UTF-8."
EXPORT = "Export the data set as COCO, VOC or YOLO."
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
        self.path = as_path(path)
        self._root = self.path.parent if self.path.suffix.lower() == ".json" else self.path
        self._given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
        self._images: dict[Split, str | Path | None] = {"train": train_images, "val": val_images, "test": test_images}

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that were named or found."""
        found = self._found()
        return tuple(split for split, given in self._given.items() if given is not None or split in found)

    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the JSON file of a split."""
        file, images = self.annotation_file(split), self._images[split]
        folders = _image_folders(file, self._root) if images is None else [self._root / as_path(images)]
        return parse_coco(file, folders, class_names)

    def describe(self, split: Split) -> str:
        """Return the JSON file of a split."""
        return printable(self.annotation_file(split))

    def annotation_file(self, split: Split) -> Path:
        """Return the JSON file of a split; the usual name if there is none."""
        given = self._given[split]
        if str(given).lower().endswith(".json"):
            return self._root / as_path(str(given))
        usual = self._root / "annotations" / f"instances_{given or split}.json"
        return usual if given is not None else self._found().get(split, usual)

    def unused(self) -> list[str]:
        """Return the annotation files of the folder that belong to no split."""
        used = {self.annotation_file(split) for split in self.splits}
        return [printable(file) for file in list_annotation_files(self.path) if file not in used]

    def _found(self) -> dict[Split, Path]:
        """Return the files of the folder by role. Of several, 2017 counts, not trainval, else the last."""
        if self.path.suffix.lower() == ".json":
            return {"train": self.path}
        files = list_annotation_files(self.path)
        files.sort(key=lambda file: ("2017" in file.name, "trainval" not in file.name, file.name))
        by_role = {role: file for file in files if (role := role_of(split_name(file, self.path))) is not None}
        return by_role or ({"train": files[0]} if len(files) == 1 else {})


def list_annotation_files(folder: Path) -> list[Path]:
    """Return the COCO annotation files of a folder: instances, or else Roboflow's, or else any JSON files."""
    below, json_files = "[aA]nnotations", "*.[jJ][sS][oO][nN]"
    instances = f"instances_{json_files}"
    patterns = (f"{below}/{instances}", f"*/{ROBOFLOW_FILE}", instances, f"{below}/{json_files}", json_files)
    found = ([file for file in sorted(folder.glob(pattern)) if not is_hidden(file.name)] for pattern in patterns)
    of_splits = (file for file in sorted(folder.glob(f"*/{json_files}")) if role_of(file.parent.name))
    return next((files for files in found if files), None) or list(of_splits)


def split_name(file: Path, root: Path | None = None) -> str:
    """Return what a COCO file calls its split: `train2017`, or its folder below `root` if that says more."""
    name = file.stem.removeprefix("instances_")
    folder_names_split = root is not None and role_of(file.parent.name) and not role_of(name)
    return file.parent.name if file.parent != root and (file.name == ROBOFLOW_FILE or folder_names_split) else name


def _image_folders(file: Path, root: Path) -> Iterator[Path]:
    """Yield the folders that may hold the images of a COCO file of the data set in `root`, likeliest first.

    The last are the folders below it, without those of another split.
    """
    above, name = file.parent.parent, split_name(file, root)
    yield from (
        root / name, root / "images" / name, above / name, file.parent / name, above / "images" / name,
        above / "images", file.parent / "images", file.parent / "data", file.parent, above / "JPEGImages", above,
    )  # fmt: skip
    below = [Path(parent) for parent, _, _ in islice(os.walk(root), MAX_SEARCHED)]
    yield from sorted(folder for folder in below if role_of(folder.name) == role_of(name))
    yield from sorted(folder for folder in below if role_of(folder.name) is None)


def parse_coco(
    annotation_file: Path, image_folders: Path | Iterable[Path], class_names: Sequence[str] | None = None
) -> AnnotationSet:
    """Read a COCO instances file. Images without objects stay; outlines are not read.

    Labels are 0..K-1 in order of category id, or in the order of `class_names`. A category 0 that only names the export
    (Roboflow's root category: the supercategory of the others, without boxes) is not a class.

    image_folders: the folder that `file_name` is relative to; of several, the first one that holds one of a few images.
    No file outside it is ever opened. class_names: as in `Source.read`; the file may lack some, whose ids are then < 0.
    """
    source = printable(annotation_file)
    content = _load(annotation_file)
    images, annotations, categories = (_table(source, content, name) for name in TABLES)
    findings: list[Finding] = []
    category_ids = _integer_column(source, annotations, "category_id").tolist()
    classes = _read_categories(source, categories, set(category_ids), findings)
    ids = set(classes.values())
    if class_names is not None:
        findings += rules.require_known_names(source, list(classes), class_names)
        classes = {name: classes.get(name, -1 - label) for label, name in enumerate(class_names)}  # -1, ...: missing
    label_of_id = {category_id: label for label, category_id in enumerate(classes.values()) if category_id in ids}
    labels = np.array([label_of_id.get(category_id, -1) for category_id in category_ids], dtype=np.int64)
    for annotation in (annotations[row] for row in np.flatnonzero(labels < 0)):
        problem = f"annotation {annotation.get('id')} has category_id {annotation['category_id']}"
        known = ", ".join(map(str, list(label_of_id)[:100]))
        remedy = "Add the category to 'categories', or remove its annotations."
        raise malformed(source, f"{problem}; the categories are {known}", remedy)
    folders = [image_folders] if isinstance(image_folders, Path) else image_folders
    columns, row_of_id = _read_images(source, images, folders, findings)
    objects, numbers = _read_objects(source, annotations, labels, columns, row_of_id)

    def describe(row: int) -> str:
        annotation = annotations[numbers[row]]
        place = f"annotation {annotation.get('id', f'number {numbers[row]}')} (image {annotation['image_id']})"
        return f"{source}: {place}, bbox {annotation.get('bbox')!r:.80}"

    return build_annotation_set(
        source, columns, objects, list(classes), list(classes.values()), describe=describe, findings=findings
    )


def _load(annotation_file: Path) -> JSONDict:
    """Parse the file. Large files are parsed without outlines, in a third of the time and memory."""
    read = partial(read_file, annotation_file, AnnotationError, "a COCO annotation file (JSON)", OTHER_PATH)
    source, content = printable(annotation_file), read()
    # Only the last of two equal keys would count. Searching all objects for them is slow.
    hook = refuse_repeated_keys if any(content.count(f'"{name}"'.encode()) > 1 for name in TABLES) else None
    if len(content) < MANY_BYTES or hook:
        return _parse_json(source, content, hook)
    try:
        content = OUTLINES.sub(b"", content)
        return _parse_json(source, content)
    except AnnotationError:
        return _parse_json(source, read())  # the whole file, for the right line and column


def _parse_json(source: str, content: bytes, hook: Any = None) -> JSONDict:
    """Parse JSON whose top level is an object. hook: as `object_pairs_hook` of `json.loads`."""
    if content[:2] in (b"PK", b"\x1f\x8b"):
        raise malformed(source, "is compressed; it must be JSON text", "Unpack it first (unzip, gunzip).")
    is_collecting = gc.isenabled()
    gc.disable()  # there is no garbage, and searching a million new objects for it doubles the time
    try:
        parsed = json.loads(content, object_pairs_hook=hook)
    except (ValueError, RecursionError) as reason:  # also for other encodings and integers of thousands of digits
        place, text = getattr(reason, "pos", 0), getattr(reason, "doc", "")
        is_cut = text and ("Unterminated" in str(reason) or len(text) - place < 16)
        problem = f"is not JSON: {reason}{'; the file ends there, so it was cut off' if is_cut else ''}"
        raise malformed(source, problem, FRESH_COPY) from None
    finally:
        if is_collecting:
            gc.enable()
    kind = rules.kind_of(parsed)
    if not isinstance(parsed, dict):
        problem = f"the top level is a {type(parsed).__name__}{f', as in {kind}' * bool(kind)}"
        remedy = OTHER_PATH if kind in ("", rules.OTHER_KINDS["image_id"]) else EXPORT
        raise malformed(source, f"{problem}; it must be an object with {', '.join(TABLES)}", remedy)
    if kind and not parsed.keys() & {*TABLES}:
        raise malformed(source, f"is not COCO JSON, it looks like {kind}", EXPORT)
    return parsed


def _table(source: str, content: JSONDict, name: str) -> list[JSONDict]:
    """Return one of the three lists, checked to hold objects."""
    table = content.get(name)
    if isinstance(table, list) and set(map(type, table)) <= {dict} and (table or name == "annotations"):
        return table
    found = "null" if table is None else f"a {type(table).__name__} that is empty or holds other values"
    found = found if name in content else "no such key"
    problem = f"{name!r} must be a list of objects, got {found}"
    raise malformed(source, problem, f'{FRESH_COPY} A set without boxes has "annotations": [].')


def _integer_column(source: str, table: list[JSONDict], key: str) -> npt.NDArray[np.int64]:
    """Return one key of every entry as int64. Strings of digits are read if all entries have them; 3.0 is 3."""
    values = [entry.get(key) for entry in table]
    kinds = set(map(type, values))
    if float in kinds:  # as pandas writes integers once one of the column is missing
        values = [int(value) if type(value) is float and value.is_integer() else value for value in values]
        kinds = set(map(type, values))
    with suppress(ValueError, OverflowError):
        if kinds <= {int} or kinds == {str}:
            return np.array(values, dtype=np.int64)
    wanted = str if kinds == {str} else int
    is_right = [type(value) is wanted and str(value).lstrip("-").isdigit() for value in values]
    entry = table[is_right.index(False) if False in is_right else 0]
    problem = f"{key} {entry.get(key)!r:.80} must be a 64-bit integer, in {entry!s:.120}"
    raise malformed(source, problem, f"Write every {key} of the file as an integer.")


def _read_categories(
    source: str, categories: list[JSONDict], used_ids: set[int], findings: list[Finding]
) -> dict[str, int]:
    """Return class name -> category id, in order of id."""
    ids, pairs = _integer_column(source, categories, "id").tolist(), []
    for category_id, entry in zip(ids, categories, strict=True):
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            problem = f"category {category_id} has name {name!r:.80}; it must be text"
            raise malformed(source, problem, "Name every category.")
        pairs.append((category_id, printable(name.strip())))
    pairs.sort()
    parents = [entry.get("supercategory") for entry in categories if entry.get("supercategory") != "none"]
    first_id, first_name = pairs[0]
    if first_id == 0 and 0 not in used_ids and parents and all(parent == first_name for parent in parents):
        problem = f"category 0 ({first_name!r}) only groups the others and has no boxes: no class"
        findings.append(rules.ROOT_CATEGORY.broken(source, problem))
        pairs = pairs[1:]
    repeated = [value for value, count in Counter(value for pair in pairs for value in pair).items() if count > 1]
    if repeated:
        problem = f"several categories have the id or name {repeated[0]!r:.80}; each must be unique"
        raise malformed(source, problem, FRESH_COPY)
    return {name: category_id for category_id, name in pairs}


def _read_images(
    source: str, images: list[JSONDict], folders: Iterable[Path], findings: list[Finding]
) -> tuple[ImageColumns, dict[int, int]]:
    """Return the images that are on disk, and image id -> row (-1: not on disk, which is a finding)."""
    ids = _integer_column(source, images, "id")
    repeated, count = Counter(ids.tolist()).most_common(1)[0]
    if count > 1:
        first, second, *_ = (images[n].get("file_name") for n in np.flatnonzero(ids == repeated))
        problem = f"image id {repeated} belongs to {first!r:.80} and {second!r:.80}; ids must be unique"
        raise malformed(source, problem, FRESH_COPY)
    sizes = np.stack([_floats([image.get(side) or 0 for image in images]) for side in ("height", "width")], axis=1)
    is_size = ((sizes >= 0) & (sizes < 1 << 31) & (sizes == np.floor(sizes))).all(axis=1)
    for image in (images[n] for n in np.flatnonzero(~is_size)):
        problem = f"image {image.get('id')} has width {image.get('width')!r:.80} and height {image.get('height')!r:.80}"
        remedy = "Give the size of the image file in pixels, or leave it out."
        raise malformed(source, f"{problem}; both must be whole numbers >= 0", remedy)
    names: Sequence[object] = [image.get("file_name") for image in images]
    root, names = _find_root(folders, names)
    paths = find_files(source, names, root)
    number_of_path: dict[str, int] = {}  # of the first entry of an image
    for n, path in enumerate(paths):
        if path is not None:
            number_of_path.setdefault(path, n)
        else:
            problem = f"{names[n]!r} is not in {printable(root)}"
            findings.append(rules.IMAGE_MISSING.broken(f"{source}: image {ids[n]}", problem))
    num_again = len(paths) - paths.count(None) - len(number_of_path)
    problem = f"{num_again} images are listed again under another id: read as one image, with all its objects"
    findings += rules.IMAGE_REPEATED.counted(source, problem, num_again)
    kept, row_of_path = list(number_of_path.values()), {path: row for row, path in enumerate(number_of_path)}
    rows = (-1 if path is None else row_of_path[path] for path in paths)
    columns = ImageColumns(list(number_of_path), ids[kept], sizes[kept].astype(np.int32))
    return columns, dict(zip(ids.tolist(), rows, strict=True))


def _find_root(folders: Iterable[Path], names: Sequence[object]) -> tuple[Path, Sequence[object]]:
    """Return the folder that holds one of a few images, or else the first folder, and the names relative to it.

    The first parts of the names may be those of another machine: all lose as many as that name must.
    """
    searched = list[Path]()
    for number, name in enumerate(names[:: len(names) // MAX_TRIED + 1]):  # the first ones may all be missing
        parts = foreign_parts(name)
        for start in range(max(len(parts), 1)):
            for folder in folders if number == start == 0 else searched:
                searched += [folder] if number == start == 0 else []
                if any(folder.joinpath(*parts[start:-1], form).is_file() for form in spellings("".join(parts[-1:]))):
                    is_plain = start == 0 and str(name).replace("\\", "/") == "/".join(parts)
                    return folder, names if is_plain else ["/".join(foreign_parts(n)[start:]) for n in names]
    return next((folder for folder in searched if folder.is_dir()), searched[0]), names


def _read_objects(
    source: str,
    annotations: list[JSONDict],
    labels: npt.NDArray[np.int64],
    images: ImageColumns,
    row_of_id: Mapping[int, int],
) -> tuple[ObjectColumns, npt.NDArray[np.int64]]:
    """Return the objects of the images that are on disk, and the position of each in `annotations`.

    An annotation whose image the file does not list is a bad box; one whose image is not on disk is skipped with it.
    """
    image_ids = _integer_column(source, annotations, "image_id")
    unlisted, missing = -2, -1
    rows = np.array([row_of_id.get(image_id, unlisted) for image_id in image_ids.tolist()], dtype=np.int64)
    numbers = np.flatnonzero(rows != missing)
    kept = [annotations[number] for number in numbers]
    rows, labels = rows[numbers], labels[numbers]
    nothing = [np.nan] * 4
    fours = [box if isinstance(box := entry.get("bbox"), list) and len(box) == 4 else nothing for entry in kept]
    boxes = _floats(list(chain.from_iterable(fours))).reshape(-1, 4)
    rule = "bbox must be a list of 4 numbers [x, y, width, height]; outlines are not read"
    problems = {row: rule for row, box in enumerate(fours) if box is nothing}
    problems |= dict.fromkeys(np.flatnonzero(rows == unlisted).tolist(), "the file lists no image of that id")
    rows = np.maximum(rows, 0)
    _refuse_corners(source, boxes, images.sizes[rows])
    areas = _floats([entry.get("area") for entry in kept])
    with np.errstate(invalid="ignore"):
        is_wrong = areas > (1 + AREA_TOLERANCE) * boxes[:, 2] * boxes[:, 3] + 1  # no outline is larger than its box
    areas[is_wrong] = np.nan  # the box's own
    boxes[:, 2:] += boxes[:, :2]
    is_crowd = np.array([to_flag(entry.get("iscrowd")) for entry in kept], dtype=np.bool_)
    is_difficult = np.array([to_flag(entry.get("difficult")) for entry in kept], dtype=np.bool_)  # not COCO's own
    return ObjectColumns(rows, boxes, labels, problems, areas, is_crowd, is_difficult), numbers


def _floats(values: list[Any]) -> npt.NDArray[np.float64]:
    """Return [T] numbers; NaN for anything else."""
    if {int, float}.issuperset(map(type, values)):
        with suppress(OverflowError):  # an integer of hundreds of digits
            return np.array(values, dtype=np.float64)
    return np.array(list(map(to_number, values)), dtype=np.float64)


def _refuse_corners(source: str, boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32]) -> None:
    """Raise if boxes ([T, 4] as written) make sense as [x1, y1, x2, y2] and not as [x, y, width, height]."""
    is_known = (sizes > 0).all(axis=1) & np.isfinite(boxes).all(axis=1)
    boxes, limits = boxes[is_known], sizes[is_known][:, ::-1] + 1  # 1 px: rounding
    leaves = (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1)
    are_corners = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)).all(axis=1)
    if np.count_nonzero(leaves) >= max(4, 0.2 * len(boxes)) and are_corners.mean() >= 0.98:  # not a few slips
        problem = f"{np.count_nonzero(leaves)} of {len(boxes)} boxes leave their image as [x, y, width, height]"
        remedy = "Write bbox as [x1, y1, x2 - x1, y2 - y1], in pixels."
        raise malformed(source, f"{problem}, and nearly all fit as [x1, y1, x2, y2]: this looks like xyxy", remedy)
