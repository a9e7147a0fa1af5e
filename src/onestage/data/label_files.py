"""One annotation file per image, as in VOC and YOLO: read all, skip malformed ones, flatten their objects."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import onestage.data.annotations as rules
from onestage.data.annotations import ImageColumns, ObjectColumns, Rule, count_findings, malformed
from onestage.errors import AnnotationError
from onestage.files import list_files, printable, require_inside
from onestage.types import AnnotationSet, Finding


class LabelledImage(NamedTuple):
    """An image of a split and its annotation file."""

    image: Path
    label: Path  # may not exist: an image without objects
    is_missing: bool = False  # there is no such image


class WrittenObject(NamedTuple):
    """One object as its file gives it."""

    text: str  # place and values, for messages
    class_key: str | float  # its name in VOC, its index in YOLO
    box: tuple[float, ...]  # four numbers as the format defines them; NaN where there is no number
    problem: str | None = None  # the rule that it breaks
    is_difficult: bool = False


class LabelFile(NamedTuple):
    """One annotation file."""

    objects: Sequence[WrittenObject] = ()
    size: tuple[int, int] = (0, 0)  # (height, width); 0, 0 if not given
    notes: Mapping[Rule, int] = {}  # what is read in another way than written -> number of times


class LabelFiles(NamedTuple):
    """The annotation files of a split, flattened."""

    source: str  # file or folder, for messages
    rows: list[int]  # [N] of the images that stay, in the list that was given
    images: ImageColumns  # ids 1..N
    objects: list[WrittenObject]  # [T]
    image_rows: npt.NDArray[np.int64]  # [T] of each object
    boxes: npt.NDArray[np.float64]  # [T, 4] as written
    findings: list[Finding]
    max_bad_fraction: float

    def build(
        self,
        boxes: npt.NDArray[np.float64],
        labels: Sequence[int],
        class_names: Sequence[str],
        unknown_class: str = "",
    ) -> AnnotationSet:
        """Return the annotations. boxes: [T, 4] xyxy edges, px; labels: 0..K-1, or -1 with the rule `unknown_class`."""
        label_array = np.array(labels, dtype=np.int64)
        problems = dict.fromkeys(np.flatnonzero(label_array < 0).tolist(), unknown_class)
        problems |= {row: item.problem for row, item in enumerate(self.objects) if item.problem}
        is_difficult = np.array([item.is_difficult for item in self.objects], dtype=np.bool_)
        return rules.build_annotation_set(
            self.source,
            self.images,
            ObjectColumns(self.image_rows, boxes, label_array, problems, is_difficult=is_difficult),
            class_names,
            range(1, len(class_names) + 1),
            describe=lambda row: self.objects[row].text,
            findings=self.findings,
            max_bad_fraction=self.max_bad_fraction,
        )


def read_label_files(
    source: str,
    root: Path,
    listed: Sequence[LabelledImage],
    bad_images: Mapping[int, Finding],
    read: Callable[[Path], LabelFile],
    no_file: Rule,
    malformed_file: Rule,
    notes: Mapping[Rule, str],
    max_bad_fraction: float,
) -> LabelFiles:
    """Read the annotation file of each image that is not bad. An image without a file is one without objects.

    Args:
        source: file or folder, for messages.
        root: the folder of the data set, which no link may leave.
        listed: the images of a split.
        bad_images: row of an image -> why it is skipped.
        read: reads one file; raises AnnotationError if it is malformed, and its image is skipped.
        no_file: the rule for images without a file.
        malformed_file: the rule for malformed files.
        notes: rule -> problem with {} for the number.
        max_bad_fraction: as in `Source.read`.

    Raises:
        AnnotationError: no image has a file, a link leaves `root`, or too many are skipped.
    """
    files_of_images = [path for item in listed for path in (item.image, item.label)]
    names = {folder: list_files(folder) for folder in {path.parent for path in files_of_images}}
    for path in files_of_images:
        if names[path.parent].get(path.name):  # a link
            require_inside(source, [root, path.parent], path)
    has_file = [item.label.name in names[item.label.parent] for item in listed]
    if len(bad_images) < len(listed) and not any(has_file):
        problem = (
            f"none of its {len(listed)} images has an annotation file (searched {printable(listed[0].label)}, ...)"
        )
        raise malformed(source, problem, "Correct data.path, or put the annotations there.")
    skipped = dict(bad_images)
    files: dict[int, LabelFile] = {}
    counts: Counter[Rule] = Counter()
    for row, (item, is_there) in enumerate(zip(listed, has_file, strict=True)):
        if row not in skipped:
            try:
                files[row] = read(item.label) if is_there else LabelFile(notes={no_file: 1})
                counts.update(files[row].notes)
            except AnnotationError as reason:
                skipped[row] = malformed_file.broken_by(item.label, reason)
    findings = [skipped[row] for row in sorted(skipped)]
    rules.require_few_skipped(source, len(files), 0, findings, max_bad_fraction)
    problems = {no_file: "{} images have no annotation file: without objects", **notes}
    objects = [item for file in files.values() for item in file.objects]
    return LabelFiles(
        source,
        list(files),
        ImageColumns(
            [str(listed[row].image) for row in files],
            np.arange(1, len(files) + 1),
            np.array([file.size for file in files.values()], dtype=np.int32),
        ),
        objects,
        np.repeat(np.arange(len(files)), [len(file.objects) for file in files.values()]).astype(np.int64),
        np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4),
        findings + count_findings(source, {rule: (problem, counts[rule]) for rule, problem in problems.items()}),
        max_bad_fraction,
    )
