"""The tensors and arrays that travel between the stages, and the one legend of their axes.

B images   C channels   H, W rows and columns   L levels   A anchors of all levels together
K classes (background never counted)   M objects of one image   D detections of one image   T objects of a whole set

Boxes are float32 xyxy *edges*, so `width = x2 - x1`, in network-input pixels unless the name says otherwise.
Sizes are (height, width). Labels are 0..K-1; a data set's own category ids stay in `AnnotationSet.category_ids`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

PADDING = -1  # label of a row that holds no object or no detection
BACKGROUND = -1  # match of an anchor that answers for no object
IGNORE = -2  # match of an anchor, or label of a region, that the loss leaves out

Stage = Literal["train", "val", "test", "predict"]


class Targets(NamedTuple):
    """The objects of a batch, padded to one length, a multiple of 16, so that shapes seldom change."""

    boxes: Tensor  # [B, M, 4] float32 xyxy; zeros where the label is PADDING
    labels: Tensor  # [B, M] int64: 0..K-1, PADDING, or IGNORE for a region left out of the loss (a crowd)


class Batch(NamedTuple):
    """What the loader hands to a step."""

    images: Tensor  # [B, 3, H, W] uint8, RGB; normalised on the device, inside the detector
    targets: Targets
    image_indices: Tensor  # [B] int64: row of the image in its split's AnnotationSet
    original_sizes: Tensor  # [B, 2] int64 (height, width) of the decoded file


class Anchors(NamedTuple):
    """The default boxes of all levels, first level first, row-major, all anchors of a cell together."""

    boxes: Tensor  # [A, 4] float32 cxcywh, px
    strides: Tensor  # [A] float32, px


class Predictions(NamedTuple):
    """What a detector says about every anchor, before any threshold."""

    class_logits: Tensor  # [B, A, C'] float32, C' = classification_loss.num_logits(K)
    box_deltas: Tensor  # [B, A, 4] float32, in the units of the model's box coder
    anchors: Anchors
    objectness_logits: Tensor | None = None  # [B, A] float32; YOLO family only


class AnchorLosses(NamedTuple):
    """What the classification loss makes of every anchor of a batch. For diagnostics: it has no gradient."""

    labels: Tensor  # [B, A] int64: 0..K-1, BACKGROUND or IGNORE
    losses: Tensor  # [B, A] float32, not divided by the number of positives; 0 where an anchor has no part in the loss
    true_probabilities: Tensor  # [B, A] float32, 0..1: p_t of RetinaNet eq. 2


class Detections(NamedTuple):
    """The D best boxes of each image, best first; rows past the last detection have score 0 and label PADDING."""

    boxes: Tensor  # [B, D, 4] float32 xyxy
    scores: Tensor  # [B, D] float32, 0..1
    labels: Tensor  # [B, D] int64


Effect = Literal["error", "skipped", "warning", "note"]  # what a finding does to a training, from stop it to nothing


class Finding(NamedTuple):
    """Something in a data set that breaks a rule (`onestage.data.annotations`), or that its owner should know."""

    rule: str
    effect: Effect
    place: str  # the file, and the image, object or line in it
    problem: str  # what is there, and what should be
    remedy: str
    num_items: int = 1  # boxes or images that it stands for

    @property
    def line(self) -> str:
        """Return place and problem."""
        return f"{self.place}: {self.problem}"


@dataclass(frozen=True, eq=False)
class AnnotationSet:
    """All annotations of one split as flat arrays, which loader workers share without copying.

    The objects of image i are rows `box_offsets[i]:box_offsets[i + 1]` of the arrays of length T.
    """

    source: str  # the file or folder it was read from, for messages
    image_paths: npt.NDArray[np.str_]  # [N]
    image_ids: npt.NDArray[np.int64]  # [N] the data set's own ids; 1..N where it has none
    sizes: npt.NDArray[np.int32]  # [N, 2] (height, width) as annotated; 0, 0 where the annotation gives none
    box_offsets: npt.NDArray[np.int64]  # [N + 1]
    boxes: npt.NDArray[np.float32]  # [T, 4] xyxy edges in original pixels
    labels: npt.NDArray[np.int64]  # [T] 0..K-1
    areas: npt.NDArray[np.float32]  # [T] px^2: the segment's area where the data set gives it, else the box's
    is_crowd: npt.NDArray[np.bool_]  # [T] a region of many objects: never a target, never a false positive
    is_difficult: npt.NDArray[np.bool_]  # [T] VOC's flag
    class_names: tuple[str, ...]  # [K]
    category_ids: tuple[int, ...]  # [K] the data set's own id of each label
    findings: tuple[Finding, ...] = ()  # what its parser found, one for each object or image that was left out

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line for each object or image that was left out, and why."""
        return tuple(finding.line for finding in self.findings if finding.effect == "skipped")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_paths)

    def objects(self, index: int) -> slice:
        """Return the rows of image `index` in `boxes`, `labels`, `areas`, `is_crowd` and `is_difficult`."""
        return slice(int(self.box_offsets[index]), int(self.box_offsets[index + 1]))


class Detector(nn.Module, ABC):
    """A one-stage detector: three verbs, one return type each, the same in training and in evaluation."""

    image_size: int  # side of the square input, px
    num_classes: int  # K

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB, H = W = image_size."""

    @abstractmethod
    def loss(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar terms `classification` and `box`, and `num_positives`, how many anchors are positive.

        In evaluation both terms are divided by this number, or by 1 if it is 0; in training a detector may divide by
        another one, as by the mean over processes.
        """

    @abstractmethod
    def detect(self, predictions: Predictions) -> Detections:
        """Decode, threshold and suppress. Boxes are in network-input pixels, clipped to the image."""

    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses | None:
        """Return the parts of `classification`, without gradient, or None where a detector does not tell them.

        What is shown about positives and negatives, during training and by `onestage losses`, comes from here.
        """
        return None

    @property
    def weighs_classes(self) -> bool:
        """Whether `use_class_counts` is to be called before training."""
        return False

    def use_class_counts(self, class_counts: Tensor) -> None:
        """Learn, once before training, how many objects of each class the training set has, [K]."""


@runtime_checkable
class DetectionData(Protocol):
    """What training asks of a data module beside its loaders."""

    image_size: int  # side of the square images it delivers, px
    batch_size: int  # images per process and batch

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def class_names(self) -> list[str]:
        """The name of each label, [K]."""

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of each label, [K]."""

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads; `Batch.image_indices` are rows of it."""

    def read_image(self, stage: Stage, index: int) -> npt.NDArray[np.uint8]:
        """Decode image `index` of that split: [H, W, 3] RGB in original pixels."""


Metrics = dict[str, float]
JSONDict = dict[str, Any]
