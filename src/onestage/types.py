"""Tensors and arrays that travel between stages; the legend of axes.

B images   C channels   H, W rows and columns   L levels   A anchors of all levels together
K classes (background never counted)   M objects of one image   D detections of one image   T objects of a whole set

Boxes are float32 xyxy *edges*, so `width = x2 - x1`, in network-input pixels unless the name says otherwise.
Sizes are (height, width). Labels are 0..K-1; a data set's own category ids stay in `AnnotationSet.category_ids`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from onestage.errors import ConfigError, require

PADDING = -1  # label of a row that holds no object or no detection
BACKGROUND = -1  # match of an anchor without object
IGNORE = -2  # match of an anchor, or label of a region, that the loss ignores

Stage = Literal["train", "val", "test", "predict"]


class Targets(NamedTuple):
    """The objects of a batch, padded to a multiple of 16, so that shapes seldom change."""

    boxes: Tensor  # [B, M, 4] float32 xyxy; zeros where the label is PADDING
    labels: Tensor  # [B, M] int64: 0..K-1, PADDING, or IGNORE for a region without loss (a crowd)


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
    divisor: Tensor | None = None  # scalar > 0 that divided the sums in evaluation; None: `num_positives`


class AnchorLosses(NamedTuple):
    """The classification loss of every anchor of a batch, without gradient, for diagnostics."""

    labels: Tensor  # [B, A] int64: 0..K-1, BACKGROUND or IGNORE
    losses: Tensor  # [B, A] float32, not divided by the number of positives; 0 where an anchor is ignored
    true_probabilities: Tensor  # [B, A] float32, 0..1: p_t of RetinaNet eq. 2


class Detections(NamedTuple):
    """The D best boxes of each image, best first; padded with score 0 and label PADDING."""

    boxes: Tensor  # [B, D, 4] float32 xyxy
    scores: Tensor  # [B, D] float32, 0..1
    labels: Tensor  # [B, D] int64


Effect = Literal["error", "skipped", "warning", "note"]  # on a training, worst first


class Finding(NamedTuple):
    """A violation of a rule of `onestage.data.annotations`, or a remark on a data set."""

    rule: str
    effect: Effect
    place: str  # the file, and the image, object or line in it
    problem: str  # actual and expected
    remedy: str
    num_items: int = 1  # number of boxes or images

    @property
    def line(self) -> str:
        """Return place and problem."""
        return f"{self.place}: {self.problem}"


@dataclass(frozen=True, eq=False)
class AnnotationSet:
    """All annotations of one split as flat arrays, shared by workers without copies.

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
    findings: tuple[Finding, ...] = ()  # of the parser, one per skipped object or image

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line with the reason for each skipped object or image."""
        return tuple(finding.line for finding in self.findings if finding.effect == "skipped")

    @property
    def image_rows(self) -> npt.NDArray[np.int64]:
        """The image of each object, [T]."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets))

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
        """Raise ConfigError unless the detector takes images of this (height, width)."""
        side, multiple = self.image_size, self.size_multiple
        is_taken = tuple(canvas) == (side, side) if side is not None else not any(s % multiple for s in canvas)
        rule = f"({side}, {side})" if side is not None else f"multiples of {multiple}"
        size = side if side is not None else -(-max(canvas) // multiple) * multiple
        remedy = f"Set this size to {size} (of data.resize its own sizes), or choose another model.detector."
        place = f"data.image_size or model.multi_scale.sizes: (height, width) of images for {type(self).__name__}"
        require(is_taken, place, tuple(canvas), rule, remedy)

    @abstractmethod
    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB of a canvas that `require_canvas` accepts."""

    @abstractmethod
    def loss(self, predictions: Predictions, targets: Targets) -> Losses:
        """Return the terms, sums over the batch divided by `Losses.divisor` or, in training, by its mean."""

    @abstractmethod
    def detect(self, predictions: Predictions, content_sizes: Tensor | None = None) -> Detections:
        """Decode, clip to `content_sizes` ([B, 2] (height, width), px; None: the canvas), threshold and suppress."""

    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses | None:
        """Return the loss of every anchor in the term that all anchors share; None: not available."""
        return None

    def published_state(self, key: str, value: str) -> Mapping[str, Tensor]:
        """Return published weights under the names of this detector; their shapes may be those of other classes.

        key: of the configuration, for messages. value: the name of the weights, or the path of a state dict.
        """
        problem = f"{key} must be a checkpoint: {type(self).__name__} has no published weights, got {value!r}"
        raise ConfigError(f"{problem}.\nGive a .ckpt or .safetensors file.")

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
    canvases: tuple[tuple[int, int], ...]  # (height, width) of the images it delivers, px
    num_classes: int  # K
    class_names: list[str]  # [K]
    category_ids: list[int]  # [K] the data set's own id of each label
    seed: int  # of the order, the augmentation and the input size

    def annotations(self, stage: Stage) -> AnnotationSet:
        """Return the split that `stage` reads; `Batch.image_indices` are rows of it."""

    def read_image(self, stage: Stage, index: int) -> npt.NDArray[np.uint8]:
        """Decode image `index` of that split: [H, W, 3] RGB in original pixels."""


Metrics = dict[str, float]
JSONDict = dict[str, Any]
