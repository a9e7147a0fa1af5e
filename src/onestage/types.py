"""The tensors and arrays that travel between the stages, and the one legend of their axes.

B images   C channels   H, W rows and columns   L levels   A anchors of all levels together
K classes (background never counted)   M objects of one image   D detections of one image   T objects of a whole set

Boxes are float32 xyxy *edges*, so `width = x2 - x1`, in network-input pixels unless the name says otherwise.
Sizes are (height, width). Labels are 0..K-1; a data set's own category ids stay in `AnnotationSet.category_ids`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from onestage.errors import require

PADDING = -1  # label of a row that holds no object or no detection
BACKGROUND = -1  # match of an anchor that answers for no object
IGNORE = -2  # match of an anchor, or label of a region, that the loss leaves out

Stage = Literal["train", "val", "test", "predict"]


class Targets(NamedTuple):
    """The objects of a batch, padded to one length, a multiple of 16, so that shapes seldom change."""

    boxes: Tensor  # [B, M, 4] float32 xyxy; zeros where the label is PADDING
    labels: Tensor  # [B, M] int64: 0..K-1, PADDING, or IGNORE for a region left out of the loss (a crowd)


class Batch(NamedTuple):
    """One batch as the loader returns it."""

    images: Tensor  # [B, 3, H, W] uint8, RGB; normalised on the device, inside the detector
    targets: Targets
    image_indices: Tensor  # [B] int64: row of the image in its split's AnnotationSet
    original_sizes: Tensor  # [B, 2] int64 (height, width) of the decoded file
    placements: Tensor  # [B, 4] float32 (scale_x, scale_y, left, top): network px = original px * scale + offset


class Anchors(NamedTuple):
    """The anchors of all levels: finest level first, then rows, columns and the anchors of a cell."""

    boxes: Tensor  # [A, 4] float32 cxcywh, px
    strides: Tensor  # [A] float32, px
    level_sizes: tuple[int, ...]  # [L] number of anchors of each level


class Predictions(NamedTuple):
    """Outputs of a detector for every anchor, before any threshold."""

    class_logits: Tensor  # [B, A, C'] float32, C' = classification_loss.num_logits(K)
    box_outputs: Tensor  # [B, A, N] float32, N = box_coder.num_outputs
    anchors: Anchors
    quality_logits: Tensor | None = None  # [B, A] float32: objectness or centerness, of detectors that predict it


class Losses(NamedTuple):
    """The loss of one batch by term."""

    terms: dict[str, Tensor]  # scalars, one for each of the detector's `loss_terms`
    num_positives: Tensor  # scalar int64: positive anchors of this batch


class AnchorLosses(NamedTuple):
    """The classification loss of every anchor of a batch, without gradient, for diagnostics."""

    labels: Tensor  # [B, A] int64: 0..K-1, BACKGROUND or IGNORE
    losses: Tensor  # [B, A] float32, not divided by the number of positives; 0 where an anchor is ignored
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


class BoxCoder(Protocol):
    """Link between the outputs of a box head and the boxes they describe."""

    num_outputs: int  # N, numbers per anchor

    def encode(self, gt_boxes: Tensor, anchors: Anchors) -> Tensor:
        """Return the outputs [..., A, N] that describe boxes [..., A, 4] xyxy, px."""

    def decode(self, box_outputs: Tensor, anchors: Anchors) -> Tensor:
        """Return the boxes [..., A, 4] xyxy, px, that outputs [..., A, N] describe."""


class Detector(nn.Module, ABC):
    """A one-stage detector: three verbs with the same return types in training and evaluation."""

    loss_terms: ClassVar[tuple[str, ...]] = ("classification", "box")
    num_classes: int  # K
    image_size: int | None = None  # side of the only square canvas it takes, px; None: any canvas
    size_multiple: int = 1  # divides the sides of every canvas it takes

    def require_canvas(self, canvas: tuple[int, int]) -> None:
        """Raise ConfigError unless the detector takes images of (height, width) `canvas`."""
        name, side = type(self).__name__, self.image_size
        require(
            side is None or tuple(canvas) == (side, side),
            f"data.image_size: the (height, width) of images for {name}",
            tuple(canvas),
            f"({side}, {side})",
            f"Set data.image_size: {side}, or choose another model.detector.class_path.",
        )
        multiple = self.size_multiple
        require(
            all(length > 0 and length % multiple == 0 for length in canvas),
            f"data.image_size: the (height, width) of images for {name}",
            tuple(canvas),
            f"> 0 and multiples of {multiple}",
            f"Set data.image_size: {max(1, -(-max(canvas) // multiple)) * multiple}.",
        )

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB of a canvas that `require_canvas` accepts."""

    @abstractmethod
    def loss(self, predictions: Predictions, targets: Targets) -> Losses:
        """Return the terms of the loss.

        In evaluation each term is a sum over the batch divided by `num_positives`, or by 1 if that is 0; in training
        a detector may divide by another number, such as the mean over processes.
        """

    @abstractmethod
    def detect(self, predictions: Predictions, content_sizes: Tensor | None = None) -> Detections:
        """Decode, threshold and suppress; boxes are in network-input pixels.

        content_sizes: [B, 2] (height, width) to clip the boxes of each image to, px; None: the canvas.
        """

    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses | None:
        """Return the loss of every anchor in the term that all anchors share, or None if not available.

        The anchor statistics of a training and `onestage losses` are computed from it.
        """
        return None

    @property
    def uses_class_weights(self) -> bool:
        """Whether `set_class_counts` must be called before training."""
        return False

    def set_class_counts(self, class_counts: Tensor) -> None:
        """Receive the number of training objects of each class, [K], once before training."""


@runtime_checkable
class DetectionData(Protocol):
    """Attributes of a data module that training reads, beside its loaders."""

    batch_size: int  # images per process and batch

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of the images it delivers, px."""

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
