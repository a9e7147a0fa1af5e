"""SSD: Single Shot MultiBox Detector (arXiv:1512.02325) on VGG16, with exchangeable losses."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from onestage.boxes.anchors import SSD160 as SSD160_ANCHORS
from onestage.boxes.anchors import SSD300_COCO, SSD300_VOC, SSD512_COCO, SSD512_VOC, AnchorLevel, make_anchors
from onestage.boxes.coders import DeltaBoxCoder
from onestage.boxes.iou import paired_iou
from onestage.boxes.matchers import IoUMatcher, assign
from onestage.boxes.nms import select_detections
from onestage.errors import ConfigError
from onestage.losses import (
    BoxLoss,
    ClassificationLoss,
    PositiveNormaliser,
    SigmoidFocalLoss,
    SmoothL1Loss,
    SoftmaxClassificationLoss,
)
from onestage.models.extras import ExtraLayer, extra_block
from onestage.models.heads import AnchorHead
from onestage.models.vgg import VGG
from onestage.models.weights import PIXEL_MEAN, PIXEL_SCALE, load_imagenet_weights, load_torchvision_ssd300
from onestage.types import AnchorLosses, Anchors, Detections, Detector, Predictions, Targets

AnchorTable = Literal["voc", "coco"]


class SSD(Detector):
    """One shot over six or seven feature maps; the subclasses are the published sizes.

    Args:
        num_classes: K, without the background.
        classification_loss: owns the link between logits and scores. None: SigmoidFocalLoss().
        box_loss: None: SmoothL1Loss().
        anchors: which of the paper's tables of default boxes (COCO's objects are smaller); or a table of one's own, as
            `onestage anchors` proposes it: a level for each feature map, finest first.
        backbone_weights: IMAGENET1K_FEATURES, the path of a VGG16's state dict, or None for random weights.
        pretrained: torchvision_coco or the path of a state dict of torchvision's ssd300_vgg16, for SSD300 with
            MinedCrossEntropy and anchors "coco"; it replaces all weights.
        prior: score of every anchor before training, 0..1. RetinaNet's pi.
        positive_iou: overlap that makes an anchor positive, 0..1.
        negative_iou: overlap below which it is background, 0..positive_iou.
        normaliser_momentum: of the mean of positive anchors that divides the losses; 0: each batch's own number. 0..1.
        score_threshold: detections score more than this, 0..1.
        nms_threshold: overlap by more than this suppresses the lower score of a class, 0..1.
        candidates_per_class: boxes of a class that enter suppression, at least 1.
        max_detections: D, at least 1.

    Raises:
        ConfigError: if an argument is out of its range or does not go with another.
        CheckpointError: if weights cannot be fetched or read, or do not fit.
    """

    anchor_tables: ClassVar[Mapping[AnchorTable, Sequence[AnchorLevel]]]
    extra_layers: ClassVar[Sequence[ExtraLayer]]

    pixel_mean: Tensor
    anchor_boxes: Tensor
    anchor_strides: Tensor

    def __init__(
        self,
        num_classes: int,
        classification_loss: ClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        anchors: AnchorTable | list[AnchorLevel] = "voc",
        backbone_weights: str | None = None,
        pretrained: str | None = None,
        prior: float = 0.01,
        positive_iou: float = 0.5,
        negative_iou: float = 0.5,
        normaliser_momentum: float = 0.0,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        candidates_per_class: int = 400,
        max_detections: int = 200,
    ) -> None:
        super().__init__()
        self._require(num_classes >= 1, "num_classes", num_classes, "at least 1")
        levels = self._anchor_levels(anchors)
        self._require(0 < prior < 1, "prior", prior, "between 0 and 1; RetinaNet's is 0.01")
        self._require(0 <= score_threshold < 1, "score_threshold", score_threshold, "0 or more and less than 1")
        self._require(0 <= nms_threshold <= 1, "nms_threshold", nms_threshold, "in 0..1; SSD's is 0.45")
        self._require(candidates_per_class >= 1, "candidates_per_class", candidates_per_class, "at least 1")
        self._require(max_detections >= 1, "max_detections", max_detections, "at least 1")
        self.num_classes = num_classes
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.candidates_per_class = candidates_per_class
        self.max_detections = max_detections
        self.matcher = IoUMatcher(positive_iou, negative_iou)
        self.box_coder = DeltaBoxCoder(variances=(0.1, 0.2))
        self.classification_loss = classification_loss or SigmoidFocalLoss()
        self.box_loss = box_loss or SmoothL1Loss()
        self.normaliser = PositiveNormaliser(normaliser_momentum)

        self._build_network(levels, prior)
        self._load_weights(anchors, backbone_weights, pretrained)

    def forward(self, images: Tensor) -> Predictions:
        """Predict for every anchor. images: [B, 3, H, W] uint8 RGB, H = W = image_size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"{type(self).__name__}: the images have (height, width) {tuple(images.shape[-2:])}; this detector "
                f"takes {self.image_size} x {self.image_size} px.\nSet the data's image_size to {self.image_size}"
            )
        feature_maps: list[Tensor] = self.backbone(self.normalise(images))
        for extra in self.extras:
            feature_maps.append(extra(feature_maps[-1]))
        return Predictions(
            class_logits=self.class_head(feature_maps),
            box_deltas=self.box_head(feature_maps),
            anchors=Anchors(self.anchor_boxes, self.anchor_strides),
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, which is `forward`, and the classification loss, which that does not call; in place."""
        super().compile(*args, **kwargs)
        self.classification_loss.compile(*args, **kwargs)

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the scale: [B, 3, H, W] uint8, 0..255, to float32 around 0."""
        return (images.float() - self.pixel_mean) / PIXEL_SCALE

    def loss(self, predictions: Predictions, targets: Targets) -> dict[str, Tensor]:
        """Return the two terms of SSD eq. 1, each a sum divided by the number of positive anchors, and `num_positives`.

        The terms are divided by what `PositiveNormaliser` makes of that number, in training mode averaged over the
        processes of a distributed run, as the gradients are. `num_positives` is this batch's own, 0 without objects.
        Images without objects count in `classification`. Nothing here waits for the device, and B and M do not change
        the number of operations.
        """
        class_logits, box_deltas, anchors, _ = predictions
        with torch.autocast(box_deltas.device.type, enabled=False):
            labels, gt_boxes = assign(self.matcher, targets, anchors)
            is_positive = labels >= 0
            normaliser = self.normaliser(is_positive, is_training=self.training)
            box_quality = self._box_quality(predictions, gt_boxes, is_positive)
        classification = self.classification_loss(class_logits, labels, box_quality)
        box = self.box_loss(box_deltas, gt_boxes, anchors.boxes, self.box_coder, is_positive)
        terms = {"classification": classification / normaliser, "box": box / normaliser}
        return {**terms, "num_positives": is_positive.sum()}

    @torch.no_grad()
    def _box_quality(self, predictions: Predictions, gt_boxes: Tensor, is_positive: Tensor) -> Tensor | None:
        """Return the IoU of positive anchors' predicted boxes with their objects, 0 elsewhere, if the loss asks."""
        if not self.classification_loss.uses_box_quality:
            return None
        boxes = self.box_coder.decode(predictions.box_deltas.float(), predictions.anchors.boxes)
        return torch.where(is_positive, paired_iou(boxes, gt_boxes), 0.0)

    @torch.no_grad()
    def anchor_losses(self, predictions: Predictions, targets: Targets) -> AnchorLosses:
        """Return the parts of `classification`, anchor by anchor."""
        class_logits, _, anchors, _ = predictions
        with torch.autocast(class_logits.device.type, enabled=False):
            labels, gt_boxes = assign(self.matcher, targets, anchors)
            box_quality = self._box_quality(predictions, gt_boxes, labels >= 0)
            losses = self.classification_loss.anchor_costs(class_logits, labels, box_quality)
            return AnchorLosses(labels, losses, self.classification_loss.true_probability(class_logits, labels))

    @torch.no_grad()
    def detect(self, predictions: Predictions) -> Detections:
        """Decode, threshold and suppress. Boxes are in network-input pixels, clipped to the image."""
        class_logits, box_deltas, anchors, _ = predictions
        with torch.autocast(box_deltas.device.type, enabled=False):
            boxes = self.box_coder.decode(box_deltas.float(), anchors.boxes).clamp(min=0, max=self.image_size)
            return select_detections(
                boxes,
                self.classification_loss.scores(class_logits),
                score_threshold=self.score_threshold,
                iou_threshold=self.nms_threshold,
                candidates_per_class=self.candidates_per_class,
                max_detections=self.max_detections,
            )

    @property
    def weighs_classes(self) -> bool:
        """Whether the loss does."""
        return self.classification_loss.class_weights is not None

    def use_class_counts(self, class_counts: Tensor) -> None:
        """Hand the number of training objects of each class, [K], to a loss that weighs classes."""
        if self.classification_loss.class_weights is not None:
            self.classification_loss.class_weights.set_class_counts(class_counts)

    def make_backbone(self) -> VGG:
        """Return the network of the first two feature maps, with random weights."""
        return VGG()

    def _anchor_levels(self, anchors: AnchorTable | list[AnchorLevel]) -> Sequence[AnchorLevel]:
        """Return the table of that name, or the given one, checked to fit the feature maps."""
        if isinstance(anchors, str):
            self._require(anchors in self.anchor_tables, "anchors", anchors, f"one of {', '.join(self.anchor_tables)}")
            return self.anchor_tables[anchors]
        maps = [(level.side, level.stride) for level in next(iter(self.anchor_tables.values()))]
        given = [(level.side, level.stride) for level in anchors]
        self._require(given == maps, "anchors", given, f"a level for each feature map, (side, stride) {maps}")
        for level in anchors:
            is_valid = level.size > 0 and level.next_size > 0 and all(ratio > 0 for ratio in level.aspect_ratios)
            self._require(is_valid, "anchors", level, "of positive sizes and ratios")
        return anchors

    def _build_network(self, levels: Sequence[AnchorLevel], prior: float) -> None:
        self.backbone = self.make_backbone()
        channels = list(self.backbone.out_channels)
        self.extras = nn.ModuleList()
        for layer in self.extra_layers:
            self.extras.append(extra_block(channels[-1], layer))
            channels.append(layer.out_channels)
        anchors_per_cell = [level.anchors_per_cell for level in levels]
        num_logits = self.classification_loss.num_logits(self.num_classes)
        # The box head first: so one seed gives all of the network but the class head the same weights for any loss.
        self.box_head = AnchorHead(channels, anchors_per_cell, num_outputs=4)
        self.class_head = AnchorHead(channels, anchors_per_cell, num_logits)
        self.class_head.start_at_prior(self.classification_loss.prior_bias(self.num_classes, prior))

        # Derived from the class, hence not in the state dict.
        anchors = make_anchors(levels, self.image_size)
        self.register_buffer("anchor_boxes", anchors.boxes, persistent=False)
        self.register_buffer("anchor_strides", anchors.strides, persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)

    def _load_weights(
        self, anchors: AnchorTable | list[AnchorLevel], backbone_weights: str | None, pretrained: str | None
    ) -> None:
        if pretrained is not None:
            loss = self.classification_loss
            if not (isinstance(self, SSD300) and anchors == "coco" and isinstance(loss, SoftmaxClassificationLoss)):
                raise ConfigError(
                    f"{type(self).__name__}: pretrained is {pretrained}; torchvision's SSD is an SSD300 with COCO's "
                    f"anchors (now {anchors}) and a softmax (now {type(loss).__name__}).\n"
                    "Set anchors: coco and classification_loss: onestage.losses.MinedCrossEntropy, or pretrained: null"
                )
            load_torchvision_ssd300(self, pretrained, self.num_classes)
        elif backbone_weights is not None:
            if self.backbone.batch_norm:
                raise ConfigError(
                    f"{type(self).__name__}: backbone_weights is {backbone_weights}; published weights fit the plain "
                    "VGG16 of SSD300 and SSD512 only.\nSet backbone_weights: null"
                )
            load_imagenet_weights(self.backbone, backbone_weights)

    def _require(self, is_met: bool, key: str, value: object, rule: str) -> None:
        if not is_met:
            raise ConfigError(f"{type(self).__name__}: {key} is {value!r}; it must be {rule}")


class SSD300(SSD):
    """SSD300: 8732 anchors on maps of 38, 19, 10, 5, 3 and 1 cells. VOC07 77.2 mAP, COCO 25.1 (SSD table 1 and 5)."""

    image_size = 300
    anchor_tables: ClassVar = {"voc": SSD300_VOC, "coco": SSD300_COCO}
    extra_layers: ClassVar = (
        ExtraLayer(256, 512),  # conv8_2
        ExtraLayer(128, 256),  # conv9_2
        ExtraLayer(128, 256, stride=1, padding=0),  # conv10_2
        ExtraLayer(128, 256, stride=1, padding=0),  # conv11_2
    )


class SSD512(SSD):
    """SSD512: 24564 anchors on maps of 64, 32, 16, 8, 4, 2 and 1 cells. VOC07 79.8 mAP, COCO 28.8."""

    image_size = 512
    anchor_tables: ClassVar = {"voc": SSD512_VOC, "coco": SSD512_COCO}
    extra_layers: ClassVar = (
        ExtraLayer(256, 512),
        ExtraLayer(128, 256),
        ExtraLayer(128, 256),
        ExtraLayer(128, 256),
        ExtraLayer(128, 256, kernel_size=4),  # 2 cells, padded to 4, give 1
    )


class SSD160(SSD):
    """A small SSD for CPUs: 2390 anchors on maps of 20, 10, 5, 3 and 1 cells, a narrow VGG11 with batch norm.

    Ours, not published; it trains from random weights. One table of anchors serves both names.
    """

    image_size = 160
    anchor_tables: ClassVar = {"voc": SSD160_ANCHORS, "coco": SSD160_ANCHORS}
    extra_layers: ClassVar = (
        ExtraLayer(64, 128),
        ExtraLayer(64, 128),
        ExtraLayer(64, 128, stride=1, padding=0),
    )

    def make_backbone(self) -> VGG:
        """Return configuration A of the paper at a quarter of its widths: 60 img/s for training on one core in bf16."""
        widths = (16, 32, 64, 128, 128)
        return VGG(depths=(1, 1, 2, 2, 2), widths=widths, fc_width=256, fc6_dilation=2, batch_norm=True)
