"""Rules of annotations, and the checks that turn parsed columns into an `AnnotationSet`. No file is read here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from onestage.errors import AnnotationError, DataError
from onestage.files import printable
from onestage.types import AnnotationSet, Effect, Finding

BAD_FRACTION_KEY = "data.max_bad_fraction:"  # the option, for messages
ALWAYS_ALLOWED = 2  # bad items stop no run, unless max_bad_fraction is 0: in a set of ten, one is already 10 %
NUM_EXAMPLES = 5  # bad items that an error message quotes
NUM_QUOTED = 3  # skipped items that a training quotes when it starts
CLIP_NOTICE = 1.0  # px; rounding explains less
OTHER_KINDS = {  # by a key of their first entry
    "image_id": "a detections (results) file", "shapes": "labelme's files", "regions": "files of VIA",
    "_via_img_metadata": "files of VIA", "tags": "Supervisely's files", "data": "Label Studio's own JSON",
    "categories": "COCO's JSON", "annotations": "CreateML's annotations",
}  # fmt: skip


class Rule(NamedTuple):
    """A kind of finding: its effect on a training, and a remedy."""

    name: str
    effect: Effect
    remedy: str

    def broken(self, place: str, problem: str, num_items: int = 1) -> Finding:
        """Return the finding. place: a file, and an item in it; problem: the actual and the expected value."""
        return Finding(self.name, self.effect, place, problem, self.remedy, num_items)

    def counted(self, place: str, problem: str, num_items: int) -> list[Finding]:
        """Return the finding for so many items, if there are any."""
        return [self.broken(place, problem, num_items)] if num_items else []

    def broken_by(self, file: str | Path, reason: DataError) -> Finding:
        """Return the finding for the error of one file: `<file>[:line]: <problem>.`, examples, and a remedy."""
        first, *lines = str(reason).splitlines()
        place, remedy = printable(file), lines.pop() if lines else self.remedy
        if first.startswith(place):
            line, _, first = first.removeprefix(place).partition(": ")
            place += line
        problem = "\n  ".join([first, *lines]).rstrip(".")
        return self.broken(place, problem)._replace(remedy=remedy)


# Errors stop a training. Most errors of a file are raised by its parser, with a remedy of their own.
FILE = Rule("annotation file", "error", "Correct the file.")
CLASSES_DIFFER = Rule("classes differ", "error", "Give every split the same categories: ids, names and order.")
CLASSES_MISSING = Rule("classes missing", "warning", "Nothing needs to be done if there is no such object.")
UNKNOWN_CLASS = Rule("class unknown in training", "error", "Correct the names, or set data.class_names to all classes.")
NO_OBJECTS = Rule("no objects", "error", "Check that this is the annotation file of the training split.")

NO_TRAINING_SPLIT = Rule("no training split", "error", "Name the training split: train in its folder, file or list.")
NOT_DIVISIBLE = Rule("too few images", "error", "Give more images, or a validation split.")

# One box is skipped. `onestage convert --to coco` writes a copy without these.
BOX_NOT_FINITE = Rule("box not finite", "skipped", "Correct the box, or remove it from the file.")
BOX_EMPTY = Rule("box without size", "skipped", "Draw the box again, or remove it from the file.")
BOX_OUTSIDE = Rule("box outside", "skipped", "Correct the box, or the image's width and height.")
OBJECT_MALFORMED = Rule("object malformed", "skipped", "Correct the object, or remove it from the file.")

# One image is skipped.
IMAGE_MISSING = Rule("image missing", "skipped", "Put the image there, or remove it from the annotations or the list.")
LABEL_MALFORMED = Rule("label file malformed", "skipped", "Export the file again, in UTF-8.")
IMAGE_UNREADABLE = Rule("image unreadable", "skipped", "Replace the file, or remove it from the data set.")
IMAGE_TOO_SMALL = Rule("image too small", "skipped", "Replace the file, or remove it from the data set.")
IMAGE_SIZE_DIFFERS = Rule("image size", "skipped", "Restore the original image, or annotate this one again.")

# Training continues as the problem says.
LEAKED_COPY = Rule("copy in two splits", "warning", "Remove it from one split, or scores are too high.")
NOT_READ = Rule("image type not read", "warning", "Save these images as JPEG or PNG.")
NOT_SEARCHED = Rule("linked folder", "warning", "Give that folder itself, or put its images there.")
NO_NAMES = Rule("no class names", "warning", "Write classes.txt there, with a class name on each line.")
NOT_USED = Rule("not used", "note", "Nothing needs to be done, unless a split should hold them.")
DEEP_IMAGE = Rule("16 bits", "warning", "Scale the values to 0..65535 first if they end below.")
TRANSPARENT = Rule("transparency", "note", "Nothing needs to be done, unless the shapes are drawn in it.")
FIRST_FRAME = Rule("animation", "warning", "Only the first frame is used; save the others as separate images.")
IMAGE_REPEATED = Rule("image listed twice", "warning", "List each image once, with all its objects.")
ROOT_CATEGORY = Rule("root category", "note", "Nothing needs to be done.")
BOX_CLIPPED = Rule("box clipped", "warning", "Check the width and height of these images.")
BOX_REPEATED = Rule("box repeated", "warning", "Remove the copies; each is one more object to find.")
BOX_TINY = Rule("box under 1 px", "warning", "Train at a larger image_size, or in tiles.")
ZERO_BASED = Rule("zero-based boxes", "warning", "Export boxes as VOC has them, counted from 1.")
POLYGON = Rule("outline", "note", "Nothing needs to be done: the box around it is used.")
NO_LABEL = Rule("image without label file", "note", "They are trained on as background; check that this is meant.")
NO_OBJECT_IMAGES = Rule("image without objects", "note", "They are trained on as background; check that this is meant.")
MANY_OBJECTS = Rule(
    "many objects", "warning", "Raise max_detections above it; COCO's metrics count 100 detections an image."
)
SIMILAR_NAMES = Rule("similar class names", "warning", "Write the class in one way.")
ONE_SPLIT_CLASS = Rule("class in one split", "warning", "Split again, by class: a class in one split is not measured.")
RARE_CLASS = Rule("rare class", "warning", "Collect more, or drop the class; its score will be mostly chance.")
SAME_SPLIT = Rule("same images in two splits", "warning", "Give each split its own images.")
LEAKED_LIKENESS = Rule("near copy in two splits", "warning", "Compare the pair; remove one if it is one scene.")
EXTREME_SHAPE = Rule("extreme shape", "warning", "It is squeezed into a square: cut it into tiles.")
UNREACHED_BOX = Rule("box no anchor reaches", "warning", "Try `onestage anchors`, a larger image_size, or tiles.")

BOX_RULES = {rule.name for rule in (BOX_NOT_FINITE, BOX_EMPTY, BOX_OUTSIDE, OBJECT_MALFORMED)}


class ImageColumns(NamedTuple):
    """The images of a split, in the order of the file."""

    paths: Sequence[str]  # N
    ids: npt.NDArray[np.int64]  # [N]
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width); 0, 0 where unknown


class ObjectColumns(NamedTuple):
    """The objects of a split as written in its files: nothing checked, any order."""

    image_rows: npt.NDArray[np.int64]  # [T] row of the image in `ImageColumns`
    boxes: npt.NDArray[np.float64]  # [T, 4] xyxy edges, px
    labels: npt.NDArray[np.int64]  # [T] 0..K-1
    problems: Mapping[int, str] = {}  # row -> rule that the parser saw broken; the row's other values are not used
    areas: npt.NDArray[np.float64] | None = None  # [T] px^2; NaN or None: that of the box
    is_crowd: npt.NDArray[np.bool_] | None = None  # [T]
    is_difficult: npt.NDArray[np.bool_] | None = None  # [T]


def build_annotation_set(
    source: str,
    images: ImageColumns,
    objects: ObjectColumns,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    *,
    describe: Callable[[int], str],
    findings: Sequence[Finding] = (),
) -> AnnotationSet:
    """Check every box, clip it to its image, skip boxes that cannot be objects, and group the rest by image.

    A box is skipped if a coordinate is not finite, if its width or height is <= 0, or if it does not overlap its image.
    Each gives a finding. Images without objects stay. Raises AnnotationError if all boxes are fractions of their image.

    source: file or folder, for messages. images: without those that the parser skipped. class_names, category_ids: [K]
    in label order. describe: row of an object -> its file, image, id and values as written, for messages. findings: the
    parser's; each with the effect "skipped" stands for one image.
    """
    _refuse_fractions(source, objects.boxes)
    boxes, clipped = _clip(source, objects, images.sizes)
    broken_rules = _broken_rules(boxes, objects)
    bad_boxes = [rule.broken(describe(row), problem) for row, (rule, problem) in sorted(broken_rules.items())]
    rows = np.setdiff1d(np.arange(len(boxes)), list(broken_rules))
    rows = rows[np.argsort(objects.image_rows[rows], kind="stable")]
    counts = np.bincount(objects.image_rows[rows], minlength=len(images.paths))
    box_areas, no_flags = np.prod(boxes[rows, 2:] - boxes[rows, :2], axis=1), np.zeros(len(boxes), dtype=np.bool_)
    areas = box_areas if objects.areas is None else objects.areas[rows]
    return AnnotationSet(
        source=source,
        image_paths=np.array(images.paths, dtype=np.str_),
        image_ids=images.ids,
        sizes=images.sizes,
        box_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes[rows],
        labels=objects.labels[rows],
        areas=np.where(np.isfinite(areas) & (areas > 0), areas, box_areas).astype(np.float32),
        is_crowd=(no_flags if objects.is_crowd is None else objects.is_crowd)[rows],
        is_difficult=(no_flags if objects.is_difficult is None else objects.is_difficult)[rows],
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        findings=(*findings, *clipped, *bad_boxes),
    )


def select_images(annotations: AnnotationSet, rows: npt.NDArray[np.int64]) -> AnnotationSet:
    """Return the images `rows` ([n] of 0..N-1), in this order, with their objects."""
    counts = np.diff(annotations.box_offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    objects = np.repeat(annotations.box_offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
    per_image = {name: getattr(annotations, name)[rows] for name in ("image_paths", "image_ids", "sizes")}
    names = ("boxes", "labels", "areas", "is_crowd", "is_difficult")
    per_object = {name: getattr(annotations, name)[objects] for name in names}
    return replace(annotations, box_offsets=offsets, **per_image, **per_object)


def require_few_skipped(
    source: str,
    num_images: int,
    num_boxes: int,
    findings: Sequence[Finding],
    max_bad_fraction: float,
    option: str = BAD_FRACTION_KEY,
) -> None:
    """Raise AnnotationError if all images or boxes, or more than `max_bad_fraction` in [0, 1], are skipped.

    Two bad items pass among others, because in a small set they say nothing about the rest; with max_bad_fraction = 0
    none passes. num_images, num_boxes: those that are used; findings: each with the effect "skipped" stands for one;
    option: that raises the fraction, for the message.
    """
    skipped = [finding for finding in findings if finding.effect == "skipped"]
    for noun, num_used in (("images", num_images), ("boxes", num_boxes)):
        bad = [finding.line for finding in skipped if (finding.rule in BOX_RULES) == (noun == "boxes")]
        total = num_used + len(bad)
        allowed = num_allowed(max_bad_fraction, total)
        if bad and not num_used and (noun == "images" or len(bad) > allowed):
            problem = f"none of its {total} {noun} can be used"
            raise malformed(source, problem, f"Correct the {noun}, or data.path.", bad)
        if len(bad) > allowed:
            rule = f"at most {max_bad_fraction:.4g} of them may be skipped"
            remedy = f"Correct them, or allow more: {option} {enough_allowed(len(bad), total)}"
            raise malformed(source, f"{len(bad)} of {total} {noun} cannot be used; {rule}", remedy, bad)


def num_allowed(max_bad_fraction: float, total: int) -> float:
    """Return how many of `total` items may be bad."""
    # 0.29 * 100 is 28.999999999999996.
    return max(max_bad_fraction * total + 1e-6, ALWAYS_ALLOWED) if max_bad_fraction > 0 else 0


def enough_allowed(num_bad: int, total: int) -> float:
    """Return a fraction, in whole percent, with which so many bad items pass."""
    return math.ceil(100 * num_bad / total) / 100


def require_known_names(source: str, found: Sequence[str], expected: Sequence[str]) -> list[Finding]:
    """Raise AnnotationError if a class of a file is not expected. Expected classes may be missing: a finding."""
    only_found, only_expected = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if only_found:
        raise AnnotationError(
            f"{source}: the classes differ from the expected ones.\n"
            f"  here: {shortened(found, 100)}\n  expected: {shortened(expected, 100)}\n"
            f"  only here: {shortened(only_found)}; only expected: {shortened(only_expected) or 'none'}\n"
            "Set data.class_names to all classes, or remove the others from the file."
        )
    return missing_classes(source, only_expected)


def missing_classes(source: str, names: Sequence[str]) -> list[Finding]:
    """Return the finding for classes that a file does not have."""
    problem = f"the file does not name {shortened(names)}: no object of that class"
    return CLASSES_MISSING.counted(source, problem, len(names))


def fill_category_ids(annotations: AnnotationSet, ids: Sequence[int] = ()) -> AnnotationSet:
    """Replace the ids < 0, of classes that the file does not name, by those in `ids` ([K]) or by unused ones."""
    own = annotations.category_ids
    spare = ids or range(max(own) + 1, max(own) + 1 + len(own))
    filled = tuple(spare[label] if category < 0 else category for label, category in enumerate(own))
    return replace(annotations, category_ids=filled)


def require_same_categories(train: AnnotationSet, other: AnnotationSet) -> None:
    """Raise AnnotationError, with both tables, if two splits have different class names or category ids.

    An id < 0 stands for a class that the file of `other` does not name.
    """
    own, tables = dict(zip(train.class_names, train.category_ids, strict=True)), []
    others = {name: number for name, number in zip(other.class_names, other.category_ids, strict=True) if number >= 0}
    if train.class_names != other.class_names or not others.items() <= own.items():
        for source, ids in ((train.source, own), (other.source, others)):
            tables.append(f"{source}: {shortened([f'{number} {name}' for name, number in ids.items()], 100)}")
        problem = "The splits have different categories; ids and names must be the same in all."
        remedy = "Correct the 'categories' of one of the files, or set data.class_names: classes then go by name."
        raise AnnotationError("\n".join([problem, *tables, remedy]))


def require_objects(annotations: AnnotationSet) -> AnnotationSet:
    """Return the training set; raise AnnotationError if it holds no object, or only crowds."""
    if annotations.is_crowd.all():  # also true for an empty array
        problem = f"none of its {len(annotations)} training images has an object to learn from; crowds do not count"
        raise malformed(annotations.source, problem, NO_OBJECTS.remedy)
    return annotations


def start_messages(findings: Sequence[Finding], source: str) -> list[str]:
    """Return what a training prints when it starts: the first warnings of each rule, and the first skipped items."""
    kinds = grouped(findings).items()
    messages = [quoted([one.line for one in members]) for (effect, _), members in kinds if effect == "warning"]
    if skipped := [finding.line for finding in findings if finding.effect == "skipped"]:
        messages.append(quoted([f"{source}: {len(skipped)} boxes or images were skipped:", *skipped], NUM_QUOTED + 1))
    return messages


def grouped(findings: Iterable[Finding]) -> dict[tuple[Effect, str], list[Finding]]:
    """Group findings by effect and rule, most severe first, in the order in which they were found."""
    groups: dict[tuple[Effect, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: get_args(Effect).index(finding.effect)):
        groups.setdefault((finding.effect, finding.rule), []).append(finding)
    return groups


def quoted(lines: Sequence[str], num_quoted: int = NUM_QUOTED) -> str:
    """Return the first lines of a list below each other, and how many more there are."""
    more = [f"and {len(lines) - num_quoted} more"] if len(lines) > num_quoted else []
    return "\n  ".join([*lines[:num_quoted], *more])


def shortened(names: Sequence[str], num_named: int = 8) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:num_named]) + (f" and {len(names) - num_named} more" if len(names) > num_named else "")


def _refuse_fractions(source: str, boxes: npt.NDArray[np.float64]) -> None:
    """Raise if all boxes are fractions of their image: as pixels each would be too small to train on."""
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    if len(boxes) and boxes.max() <= 1 and (boxes % 1 > 0).any():
        problem = f"all of the {len(boxes)} boxes lie within 0..1, like fractions of an image; they must be in pixels"
        raise malformed(source, problem, "Multiply them by the size of their image.")


def _clip(
    source: str, objects: ObjectColumns, sizes: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], list[Finding]]:
    """Clip boxes to their image where its size is known, else only at 0; report how many moved."""
    height_width = sizes[objects.image_rows].astype(np.float64)
    limits = np.where(height_width > 0, height_width, np.inf)[:, [1, 0, 1, 0]]
    clipped = np.clip(objects.boxes, 0.0, limits)  # NaN stays NaN
    with np.errstate(invalid="ignore", over="ignore"):  # a coordinate beyond float32 becomes infinite; see below
        moved = np.nanmax(np.abs(clipped - objects.boxes), axis=1, initial=0.0)
        overlaps = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        num_far = int(np.count_nonzero(np.isfinite(moved) & (moved > CLIP_NOTICE) & overlaps))
        problem = f"{num_far} of {len(clipped)} boxes reach out of their image and are clipped to it"
        return clipped.astype(np.float32), BOX_CLIPPED.counted(source, problem, num_far)


def _broken_rules(clipped: npt.NDArray[np.float32], objects: ObjectColumns) -> dict[int, tuple[Rule, str]]:
    """Return row -> broken rule and its text, for every box that cannot be used."""
    written = objects.boxes
    is_finite = (np.isfinite(written) & np.isfinite(clipped)).all(axis=1)
    checks = (  # the last broken rule counts
        (BOX_OUTSIDE, "the box must overlap its image", (clipped[:, 2:] > clipped[:, :2]).all(axis=1)),
        (BOX_EMPTY, "width and height must be > 0", (written[:, 2:] > written[:, :2]).all(axis=1)),
        (BOX_NOT_FINITE, "every coordinate must be a finite number", is_finite),
    )
    rules: dict[int, tuple[Rule, str]] = {}
    for rule, problem, holds in checks:
        rules |= dict.fromkeys(np.flatnonzero(~holds).tolist(), (rule, problem))
    return rules | {row: (OBJECT_MALFORMED, problem) for row, problem in objects.problems.items()}


def kind_of(parsed: object) -> str:
    """Return of which tool the content of a JSON file is, for messages; empty if unknown."""
    entries = parsed if isinstance(parsed, list) else [parsed, *parsed.values()] if isinstance(parsed, dict) else []
    keys = {key for entry in entries[:2] if isinstance(entry, dict) for key in entry}
    return next((kind for key, kind in OTHER_KINDS.items() if key in keys), "")


def malformed(place: str, problem: str, remedy: str, lines: Sequence[str] = ()) -> AnnotationError:
    """Return the error to raise for bad annotations; it quotes the first few lines."""
    more = "; see all: onestage doctor" if len(lines) > NUM_EXAMPLES else ""
    return AnnotationError(f"{quoted([f'{place}: {problem}.', *lines], NUM_EXAMPLES + 1)}{more}\n{remedy}")
