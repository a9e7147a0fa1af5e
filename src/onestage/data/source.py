"""The `Source` of a data set: its files, its splits, and reading a split."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from onestage.files import printable
from onestage.types import AnnotationSet

Split = Literal["train", "val", "test"]
ROLE_WORD = re.compile(  # a whole word of a name: train2017, my_train and TrainSet, but not trains or device1
    r"(?<![a-z])(?:(?P<train>train(?:ing|val)?|trn)|(?P<val>(?:mini)?val(?:id|idation)?|evaluation|eval|dev)"
    r"|(?P<test>test(?:ing|dev)?|holdout))(?:sets?|data|images|imgs|list)?(?![a-z])"
)


class ReadImage(NamedTuple):
    """An image, perhaps smaller than in its file."""

    pixels: npt.NDArray[np.uint8]  # [H, W, 3]
    original_size: tuple[int, int]  # (height, width) of the decoded file


ImageReader = Callable[[int], ReadImage]  # from a row; raises ImageError, with the file, if it cannot be decoded


class Source(ABC):
    """A data set on disk. A new format is one file with one subclass; see docs/add_a_dataset.md.

    Constructing a source reads no annotations; `splits` only looks at which files exist.
    """

    format: ClassVar[str]  # for messages: "COCO"
    path: Path  # the file or folder of the data set
    train_difficult: bool = True  # whether objects flagged as difficult are training targets; if not, they are ignored

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The splits that exist, in the order train, val, test."""

    @abstractmethod
    def read(self, split: Split, class_names: Sequence[str] | None = None) -> AnnotationSet:
        """Read the annotations of a split.

        class_names: [K] names in label order; None takes those of the annotations. Raises AnnotationError if the
        annotations are missing, malformed, or of other classes.
        """

    def describe(self, split: Split) -> str:
        """Return the files that a split is read from, for messages: `annotations/instances_train.json`."""
        return printable(self.path)

    @property
    def known_classes(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """Class names and category ids that are known without reading annotations, or None."""
        return None

    def image_reader(self, split: Split, annotations: AnnotationSet) -> ImageReader | None:
        """Return the reader of the images of `annotations`, of that split; None: they are files."""
        return None

    def unused(self) -> list[str]:
        """Return the annotation files or lists that lie there and belong to no split."""
        return []

    def prepare(self) -> None:  # noqa: B027 # a source may have nothing to prepare
        """Create the files if the source can; called once, by one process, before `splits`."""


def role_of(name: str) -> Split | None:
    """Return the role of a split by the first word of its name that says one: mine_train2017, valid, Test."""
    found = ROLE_WORD.search(name.lower())
    return next((role for role in get_args(Split) if found and found[role]), None)


def names_by_role(names: Iterable[str]) -> dict[str, str]:
    """Return the name of each role: the role itself if it is among the names, or else the first in order."""
    ordered = sorted(names, key=lambda name: (name != role_of(name), name))
    found = {role: name for name in reversed(ordered) if (role := role_of(name)) is not None}
    return {role: found[role] for role in get_args(Split) if role in found}
