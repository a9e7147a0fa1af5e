"""YOLO's own losses: boxes in grid cells, YOLOv2's objectness, and a softmax over classes without background."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from onestage.losses.box import BoxLoss
from onestage.losses.class_weights import Weights
from onestage.losses.classification import SigmoidClassificationLoss, one_hot
from onestage.losses.focal import SoftmaxFocalLoss
from onestage.types import Anchors, BoxCoder


class GridBoxLoss(BoxLoss):
    """YOLOv3's: cross-entropy of the centre's two sigmoids, half the squared error of the size's two logarithms.

    The paper (arXiv:1804.02767, section 2.1) speaks of squared error, but darknet's yolo_layer.c passes the difference
    of target and sigmoid on as the gradient of the logit, which is the gradient of cross-entropy.
    """

    def per_anchor_loss(
        self, box_outputs: Tensor, gt_boxes: Tensor, anchors: Anchors, box_coder: BoxCoder, is_positive: Tensor
    ) -> Tensor:
        """Return the loss of box outputs and encoded objects, [B, A]."""
        encoded = box_coder.encode(gt_boxes, anchors)
        target = torch.where(is_positive[..., None], encoded, box_outputs.detach())
        sizes = 0.5 * (box_outputs[..., 2:] - target[..., 2:]).square()
        centres = self._centre_losses(box_outputs[..., :2], target[..., :2].sigmoid())
        # The cross-entropy of a target with itself is not flat around a prediction that equals it only by rounding.
        return torch.where(is_positive, (centres + sizes).sum(dim=-1), 0.0)

    def _centre_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class SquaredGridBoxLoss(GridBoxLoss):
    """YOLOv2's: half the squared error of the centre's two sigmoids and of the size's two logarithms."""

    def _centre_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (logits.sigmoid() - targets).square()


class SquaredObjectnessLoss(SigmoidClassificationLoss):
    """YOLOv2's objectness: half the squared error of a sigmoid; the target of an object is its box's IoU.

    darknet's region_layer.c with rescore=1, object_scale=5 and noobject_scale=1.
    """

    uses_box_quality: ClassVar[bool] = True

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the weighted squared error summed over the sigmoids of each anchor, [B, A]."""
        is_object = one_hot(labels, class_logits)
        weight = torch.where(is_object == 1, 5.0, 1.0)
        return (0.5 * weight * (class_logits.sigmoid() - is_object * box_quality[..., None]).square()).sum(dim=2)


class ObjectSoftmaxLoss(SoftmaxFocalLoss):
    """FL(p_t) = -alpha (1 - p_t)^gamma log(p_t) of objects, with p_t from a softmax over K classes, no background.

    YOLOv2's class loss, for detectors that score "object or not" apart. darknet's `focal_loss=1` is alpha 0.5, gamma 2.

    Args:
        alpha: weight of all objects, in [0, 1]; None: 1.
        gamma: focus on hard examples, in [0, 100]; 0 is cross-entropy.
        label_smoothing: see `SoftmaxFocalLoss`.
    """

    has_background: ClassVar[bool] = False

    def __init__(
        self,
        alpha: float | None = None,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Weights = None,
    ) -> None:
        super().__init__(alpha, gamma, label_smoothing, class_weights)

    def num_logits(self, num_classes: int) -> int:
        """Return K."""
        return num_classes

    def scores(self, class_logits: Tensor) -> Tensor:
        """Return the softmax."""
        return class_logits.to(torch.promote_types(class_logits.dtype, torch.float32)).softmax(dim=-1)

    def prior_bias(self, num_classes: int, prior: float) -> Tensor:
        """Return zeros: the classes of an object are equally likely."""
        return torch.zeros(num_classes)

    def per_anchor_loss(self, class_logits: Tensor, labels: Tensor, box_quality: Tensor) -> Tensor:
        """Return the focal loss of each object's class, [B, A]; 0 without an object."""
        return torch.where(labels >= 0, super().per_anchor_loss(class_logits, labels, box_quality), 0.0)
