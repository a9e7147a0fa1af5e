"""Reads COCO instance annotations (arXiv:1405.0312; the "object detection" format) into an `AnnotationSet`."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import (
    AREA_WRONG,
    ID_ZERO,
    IDS_REPEATED,
    IMAGE_MISSING,
    ROOT_CATEGORY,
    ImageColumns,
    ObjectColumns,
    build_annotation_set,
    require_same_names,
)
from onestage.data.coco_file import FRESH_COPY, integer_column, load_tables, malformed
from onestage.data.source import Source, Split, role_of
from onestage.files import find_files, is_encodable, printable
from onestage.types import AnnotationSet, Finding, JSONDict

XYXY_FRACTION = 0.2  # more boxes than this that leave their image as [x, y, width, height] are no accident
AREA_TOLERANCE = 0.01  # of the box's area, and 1 px^2; more is no rounding
ROBOFLOW_FILE = "_annotations.coco.json"
HEAD_BYTES = 4 << 20  # of a JSON file, searched for the first file name
FIRST_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
XYXY_MINIMUM = 4  # and so many must do so, or one careless box would condemn a small file


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
        self._given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test}
        self._image_folders: dict[Split, str | Path | None] = {
            "train": train_images,
            "val": val_images,
            "test": test_images,
        }

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that were named or found."""
        found = self._found()
        return tuple(split for split, given in self._given.items() if given is not None or split in found)

    def read(
        self, split: Split, class_names: Sequence[str] | None = None, *, max_bad_fraction: float = 0.01
    ) -> AnnotationSet:
        """Read the JSON file of a split."""
        return parse_coco(
            self.annotation_file(split),
            self.image_folder(split),
            class_names=class_names,
            max_bad_fraction=max_bad_fraction,
        )

    def describe(self, split: Split) -> str:
        """Return the JSON file of a split."""
        return printable(self.annotation_file(split))

    def annotation_file(self, split: Split) -> Path:
        """Return the JSON file of a split; the usual name where there is none."""
        given = self._given[split]
        if given is None:
            return self._found().get(split, self._root / "annotations" / f"instances_{split}.json")
        if str(given).endswith(".json"):
            return self._root / given
        return self._root / "annotations" / f"instances_{given}.json"

    def image_folder(self, split: Split) -> Path:
        """Return the folder that the file names of a split are relative to."""
        given, file = self._image_folders[split], self.annotation_file(split)
        return self._root / given if given is not None else find_image_folder(file, self._root)

    @property
    def _root(self) -> Path:
        return self.path.parent if self.path.suffix.lower() == ".json" else self.path

    def _found(self) -> dict[Split, Path]:
        """Return the files of the folder by role. Of several for one role, that of 2017 counts, or the last."""
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
    patterns = ("annotations/instances_*.json", f"*/{ROBOFLOW_FILE}", "annotations/*.json", "*.json")
    return next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])


def split_name(file: Path) -> str:
    """Return what a COCO file calls its split: `train2017`, or the folder of Roboflow's file."""
    return file.parent.name if file.name == ROBOFLOW_FILE else file.stem.removeprefix("instances_")


def find_image_folder(file: Path, root: Path | None = None) -> Path:
    """Return the first likely folder that holds the first image of a COCO file."""
    above, name = file.parent.parent, split_name(file)
    likely = [
        *([root / name, root / "images" / name] if root else []), above / name, file.parent / name,
        above / "images" / name, above / "images", file.parent / "images", file.parent, above / "JPEGImages", above,
    ]  # fmt: skip
    present = [folder for folder in likely if folder.is_dir()] or likely
    if not file.is_file():
        return present[0]
    try:
        with file.open("rb") as stream:
            found = FIRST_FILE_NAME.search(stream.read(HEAD_BYTES))
        first = str(json.loads(found[1])) if found else ""
        return next((folder for folder in present if first and (folder / first).is_file()), present[0])
    except (OSError, ValueError):  # the parser reports it
        return present[0]


class Categories(NamedTuple):
    """The classes of a file, in label order."""

    ids: list[int]  # [K]
    names: list[str]  # [K]


def parse_coco(
    annotation_file: Path,
    image_root: Path,
    *,
    class_names: Sequence[str] | None = None,
    max_bad_fraction: float = 0.01,
) -> AnnotationSet:
    """Read a COCO instances file. Images without objects stay.

    Labels are 0..K-1 in order of category id, or in the order of `class_names`. A box that cannot be used, and an
    image that is not on disk, is left out and named in `AnnotationSet.skipped`. A category 0 that only names the
    export (Roboflow's root category: the supercategory of the others, without boxes) is not a class.

    Args:
        annotation_file: JSON with `images`, `annotations` and `categories`; `annotations` may be an empty list.
        image_root: the folder that `file_name` is relative to. No file outside it is ever opened.
        class_names: [K] names that the file must have, in any order: those of a checkpoint or of the training split.
        max_bad_fraction: 0..1, the fraction of boxes, and of images, that may be left out; two always may, unless 0.

    Raises:
        AnnotationError: the file is not what it should be, or too much of it cannot be used.
    """
    source = printable(annotation_file)
    images, annotations, categories = load_tables(annotation_file, with_outlines=False)
    findings = _check_ids(source, annotations)
    category_of_object = integer_column(source, annotations, "category_id", "annotation", findings)
    classes = _read_categories(source, categories, set(category_of_object.tolist()), findings)
    if class_names is not None:
        require_same_names(source, classes.names, class_names)
        order = [classes.names.index(name) for name in class_names]
        classes = Categories([classes.ids[i] for i in order], [classes.names[i] for i in order])
    labels = _labels(source, annotations, category_of_object, classes)
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
        classes.names,
        classes.ids,
        describe=describe,
        findings=findings,
        max_bad_fraction=max_bad_fraction,
    )


def _check_ids(source: str, annotations: list[JSONDict]) -> list[Finding]:
    """Say which annotation ids other tools would trip over. Nothing here depends on them."""
    ids = [entry.get("id") for entry in annotations]
    findings = []
    num_none = sum(1 for value in ids if value is None or value == 0)
    if num_none:
        problem = f"{num_none} annotations have id 0 or none; ids are numbered anew"
        findings.append(ID_ZERO.broken(source, problem, num_none))
    given = [value for value in ids if value is not None]
    try:
        num_repeated = len(given) - len(set(given))
    except TypeError:  # a list or an object for an id
        num_repeated = len(given) - len(set(map(str, given)))
    if num_repeated:
        problem = f"{num_repeated} annotations have the id of an earlier one; ids are numbered anew"
        findings.append(IDS_REPEATED.broken(source, problem, num_repeated))
    return findings


def _read_categories(
    source: str, categories: list[JSONDict], used_ids: set[int], findings: list[Finding]
) -> Categories:
    """Return the classes in order of id."""
    ids = integer_column(source, categories, "id", "category", findings).tolist()
    names = [entry.get("name") for entry in categories]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or not is_encodable(name):
            raise malformed(
                source, f"category {ids[number]} has name {name!r:.80}; it must be text", "Name every category."
            )
    parents = {entry.get("supercategory") for entry in categories if entry.get("supercategory") != "none"}
    rows = sorted(range(len(ids)), key=ids.__getitem__)
    if len(rows) > 1 and ids[rows[0]] == 0 and 0 not in used_ids and parents == {names[rows[0]]}:
        problem = f"category 0 ({names[rows[0]]!r}) only groups the others and has no boxes: no class"
        findings.append(ROOT_CATEGORY.broken(source, problem))
        rows = rows[1:]
    classes = Categories([ids[row] for row in rows], [str(names[row]).strip() for row in rows])
    for key, values in (("id", list(map(str, classes.ids))), ("name", classes.names)):
        repeated = ", ".join(sorted({value for value in values if values.count(value) > 1})[:5])
        if repeated:
            raise malformed(
                source, f"several categories have {key} {repeated}; each must be unique", f"Correct the {key}s."
            )
    return classes


def _labels(
    source: str, annotations: list[JSONDict], category_of_object: npt.NDArray[np.int64], classes: Categories
) -> npt.NDArray[np.int64]:
    """Turn category ids into labels 0..K-1."""
    known = np.array(classes.ids, dtype=np.int64)
    order = np.argsort(known)
    place = np.searchsorted(known[order], category_of_object).clip(max=len(known) - 1)
    labels = order[place]
    unknown = np.flatnonzero(known[labels] != category_of_object)
    if len(unknown):
        annotation = annotations[unknown[0]]
        problem = f"annotation {annotation.get('id')} has category_id {annotation['category_id']}"
        ids = ", ".join(map(str, classes.ids[:100]))
        remedy = "Add the category to 'categories', or remove its annotations."
        raise malformed(source, f"{problem} ({len(unknown)} such annotations); the file's categories are {ids}", remedy)
    return np.asarray(labels, dtype=np.int64)


def _read_images(
    source: str, images: list[JSONDict], image_root: Path, findings: list[Finding]
) -> tuple[ImageColumns, dict[int, int]]:
    """Return the images that are on disk, and the row of every image id (-1: not on disk, which is a finding)."""
    ids = integer_column(source, images, "id", "image", findings)
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        repeated = int(values[counts > 1][0])
        files = [str(images[n].get("file_name")) for n in np.flatnonzero(ids == repeated)[:2]]
        raise malformed(
            source, f"image id {repeated} belongs to {files[0]!r} and {files[1]!r}; ids must be unique", FRESH_COPY
        )
    sizes = np.array([[_side(source, image, key) for key in ("height", "width")] for image in images], dtype=np.int32)
    names = [image.get("file_name") for image in images]
    paths = find_files(source, names, image_root)
    found = np.array([path is not None for path in paths])
    findings += [
        IMAGE_MISSING.broken(f"{source}: image {ids[n]}", f"{names[n]!r} is not in {printable(image_root)}")
        for n in np.flatnonzero(~found)
    ]
    rows = np.where(found, np.cumsum(found) - 1, -1)
    columns = ImageColumns([path for path in paths if path is not None], ids[found], sizes[found])
    return columns, dict(zip(ids.tolist(), rows.tolist(), strict=True))


def _side(source: str, image: JSONDict, key: str) -> int:
    """Return the image's height or width; 0 where the file gives none."""
    value = image.get(key) or 0
    if isinstance(value, int | float) and value == value and 0 <= value < 1 << 31 and int(value) == value:
        return int(value)
    remedy = f"Give the {key} of the image file in pixels, or leave it out."
    raise malformed(source, f"image {image.get('id')} has {key} {value!r:.80}; it must be a whole number >= 0", remedy)


def _read_objects(
    source: str,
    annotations: list[JSONDict],
    labels: npt.NDArray[np.int64],
    images: ImageColumns,
    row_of_id: Mapping[int, int],
    findings: list[Finding],
) -> tuple[ObjectColumns, npt.NDArray[np.int64]]:
    """Return the objects of the images that are on disk, and the place of each in `annotations`.

    An annotation whose image the file does not list is a bad box; one whose image is not on disk went with its image.
    """
    image_ids = integer_column(source, annotations, "image_id", "annotation", findings)
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
    objects = ObjectColumns(
        image_rows=rows,
        boxes=boxes,
        labels=labels,
        areas=areas,
        is_crowd=np.array([entry.get("iscrowd") == 1 for entry in kept], dtype=np.bool_),
        is_difficult=np.array([entry.get("difficult") == 1 for entry in kept], dtype=np.bool_),  # not COCO's own
        problems=problems,
    )
    return objects, numbers


def _read_boxes(annotations: list[JSONDict]) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
    """Return [T, 4] (x, y, width, height), and the rows where the file has something else."""
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
    """Return the areas [T] that an object of that box can have. The others become NaN: the box's own will be taken.

    A smaller area than the box's is its segment's, whether or not the file still has the segment.
    """
    values = [entry.get("area") for entry in annotations]
    areas = _floats([value if isinstance(value, int | float) and value is not True else np.nan for value in values])
    with np.errstate(invalid="ignore"):
        is_wrong = (areas <= 0) | (areas > (1 + AREA_TOLERANCE) * box_areas + 1)
        is_wrong = is_wrong & (box_areas > 0)  # a bad box is a finding of its own
    num_wrong = int(np.count_nonzero(is_wrong))
    if num_wrong:
        problem = f"the area of {num_wrong} objects is 0 or more than their box's; the box's is used"
        findings.append(AREA_WRONG.broken(source, problem, num_wrong))
    areas[is_wrong] = np.nan
    return areas


def _floats(numbers: list[float]) -> npt.NDArray[np.float64]:
    """Return the numbers as an array. An integer of hundreds of digits, which no float can hold, becomes infinite."""
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError:
        return np.array([number if abs(number) < sys.float_info.max else np.inf for number in numbers])


def _refuse_xyxy(source: str, boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32]) -> None:
    """Stop where boxes make sense as two corners and not as corner and size. boxes: [T, 4] as written."""
    is_known = (sizes > 0).all(axis=1) & np.isfinite(boxes).all(axis=1)
    boxes, limits = boxes[is_known], sizes[is_known][:, ::-1] + 1  # 1 px: rounding
    leaves = (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1)
    fits = ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)).all(axis=1)
    if np.count_nonzero(leaves) < max(XYXY_MINIMUM, XYXY_FRACTION * len(boxes)) or fits.mean() < 1 - XYXY_FRACTION / 10:
        return
    problem = f"{np.count_nonzero(leaves)} of {len(boxes)} boxes leave their image as [x, y, width, height]"
    remedy = "Write bbox as [x1, y1, x2 - x1, y2 - y1], in pixels."
    raise malformed(source, f"{problem}, and nearly all fit as [x1, y1, x2, y2]: this looks like xyxy", remedy)
