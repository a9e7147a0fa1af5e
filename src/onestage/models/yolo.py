"""YOLOv2 (arXiv:1612.08242) and YOLOv3 (arXiv:1804.02767), on Darknet or another backbone."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torchvision.ops import box_convert

from onestage.boxes.anchors import AnchorGrid, AnchorShapes, named_levels
from onestage.boxes.cell_matcher import CellMatcher
from onestage.boxes.coders import GridBoxCoder
from onestage.boxes.matchers import image_chunks
from onestage.boxes.nms import Selection
from onestage.errors import require
from onestage.losses.box import BoxLoss
from onestage.losses.classification import ClassificationLoss, SigmoidClassificationLoss, one_hot
from onestage.losses.focal import SigmoidCrossEntropy
from onestage.losses.normaliser import ImageNormaliser, num_processes
from onestage.losses.yolo import GridBoxLoss, ObjectSoftmaxLoss, SquaredGridBoxLoss, SquaredObjectnessLoss
from onestage.models import darknet
from onestage.models.darknet import DarknetPyramid, Passthrough
from onestage.models.detector import AnchorDetector, Backbone
from onestage.models.heads import AnchorHead
from onestage.types import BACKGROUND, IGNORE, Losses, Predictions, Targets

STRIDE = 32  # px of YOLOv2's cells; its published anchors are in cells


class YOLO(AnchorDetector):
    """The parts that the YOLOs share: one class, box and objectness prediction for every anchor, three loss terms.

    Score = objectness x class score. Terms are sums divided by the number of images, as in darknet. Subclasses add
    their network, their anchors and their weights of the box loss. Arguments: see `YOLOv3`; levels: anchors of each
    map, finest first.
    """

    loss_terms = ("classification", "box", "objectness")
    size_multiple = 32
    file_version: ClassVar[tuple[int, int, int]]  # of darknet's files
    neck: Passthrough | DarknetPyramid
    class_head: AnchorHead
    box_head: AnchorHead
    quality_head: AnchorHead
    matcher: CellMatcher
    images_seen: Tensor  # scalar int64: training images so far, of all processes

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        neck: Passthrough | DarknetPyramid,
        levels: Sequence[AnchorShapes],
        classification_loss: ClassificationLoss,
        box_loss: BoxLoss,
        objectness_loss: SigmoidClassificationLoss,
        matcher: CellMatcher,
        selection: Selection,
        prior: float,
        pretrained: str | None,
    ) -> None:
        name = type(self).__name__
        require(num_classes >= 1, f"{name}: num_classes", num_classes, ">= 1")
        require(0 < prior < 1, f"{name}: prior", prior, "in (0, 1)", "Try 0.01.")
        has_weights, place = objectness_loss.class_weights is not None, f"{name}: class_weights of objectness_loss"
        require(not has_weights, place, "weights", "null: objectness knows no class")
        kind, place = type(classification_loss).__name__, f"{name}: classification_loss"
        require(not classification_loss.uses_box_quality, place, kind, "a loss that does not use the IoU of the boxes")
        strides, given = backbone.strides[-len(neck.out_channels) :], tuple(level.stride for level in levels)
        require(given == strides, f"{name}: anchors, strides", given, f"{strides}, one level for each feature map")
        in_middle = all(level.offset == 0.5 for level in levels)
        require(in_middle, f"{name}: anchors, offsets", [level.offset for level in levels], "0.5")
        anchors_per_cell, coder = [len(level.shapes) for level in levels], GridBoxCoder()
        outputs = (classification_loss.num_logits(num_classes), coder.num_outputs, 1)
        # Three 1 x 1 convolutions with the rows of darknet's one.
        class_head, box_head, quality_head = (
            AnchorHead(neck.out_channels, anchors_per_cell, count, kernel_size=1) for count in outputs
        )
        class_head.start_at_prior(torch.zeros(outputs[0]))
        box_head.start_at_prior(torch.zeros(outputs[1]))
        quality_head.start_at_prior(objectness_loss.prior_bias(1, prior))
        super().__init__(
            num_classes,
            backbone=backbone,
            neck=neck,
            class_head=class_head,
            box_head=box_head,
            quality_head=quality_head,
            anchor_grid=AnchorGrid(levels),
            classification_loss=classification_loss,
            box_loss=box_loss,
            box_coder=coder,
            matcher=matcher,
            normaliser=ImageNormaliser(),
            selection=selection,
        )
        self.objectness_loss = objectness_loss
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        if pretrained is not None:
            self.images_seen.fill_(darknet.load_darknet(pretrained, "pretrained", self.darknet_tensors()))

    def loss(self, predictions: Predictions, targets: Targets) -> Losses:
        """Return the three terms, divided by the number of images. Never waits for the device."""
        _, box_outputs, anchors, _ = predictions
        with torch.autocast(box_outputs.device.type, enabled=False):
            labels, gt_boxes = self.assign(predictions, targets)
            divisor = self.normaliser(labels >= 0)
            weights, gt_boxes = self._box_targets(labels, gt_boxes, predictions)
            box = self.box_loss.per_anchor_loss(box_outputs, gt_boxes, anchors, self.box_coder, weights > 0)
            objectness_loss, logits, labels_of_term = self.shared_term(predictions, labels)
            quality = self.box_quality(objectness_loss, predictions, gt_boxes, labels >= 0)
            terms = {
                "classification": self._classification(predictions, targets),
                "box": (box * weights).sum(),
                "objectness": objectness_loss(logits, labels_of_term, quality),
            }
        if self.training:
            self.images_seen += len(labels) * num_processes()
        terms = {name: value / divisor for name, value in terms.items()}
        return Losses(terms, (labels >= 0).sum(), divisor)

    def shared_term(self, predictions: Predictions, labels: Tensor) -> tuple[ClassificationLoss, Tensor, Tensor]:
        """Return the objectness loss, its logits [B, A, 1] and its labels [B, A]: 0, BACKGROUND or IGNORE."""
        assert predictions.quality_logits is not None
        return self.objectness_loss, predictions.quality_logits[..., None], labels.clamp(max=0)

    def scores(self, predictions: Predictions) -> Tensor:
        """Return objectness x class score, [B, A, K] in [0, 1]."""
        assert predictions.quality_logits is not None
        return self.objectness_loss.scores(predictions.quality_logits[..., None]) * super().scores(predictions)

    def darknet_tensors(self) -> list[Tensor]:
        """Return all weights in the order of darknet's files, as views: a change of them changes the detector.

        ConfigError if the backbone is not of darknet: the file would be without its weights.
        """
        place, kind = f"{type(self).__name__}: backbone of a darknet file", type(self.backbone).__name__
        remedy = "Leave the backbone out, or use a checkpoint of a training."
        require(isinstance(self.backbone, darknet.Darknet), place, kind, "Darknet's own", remedy)
        tensors = list(darknet.block_tensors(self.backbone))
        branches = [*self.neck.levels] if isinstance(self.neck, DarknetPyramid) else [self.neck]  # coarsest first
        for level, branch in zip(reversed(range(len(branches))), branches, strict=True):
            tensors += darknet.block_tensors(branch)
            heads = [head.levels[level] for head in (self.box_head, self.quality_head, self.class_head)]
            for name in ("bias", "weight"):  # rows by anchor: t_x, t_y, t_w, t_h, objectness, classes
                num_anchors = len(self.anchor_grid.levels[level].shapes)
                by_anchor = [head.get_parameter(name).detach().chunk(num_anchors) for head in heads]
                tensors += [part for anchor in zip(*by_anchor, strict=True) for part in anchor]
        return tensors

    def save_darknet(self, path: Path) -> None:
        """Write all weights to a `.weights` file of darknet. ResourceError if it cannot be written."""
        tensors = self.darknet_tensors()
        darknet.save_darknet(path, self.file_version, int(self.images_seen), tensors)

    @abstractmethod
    def _box_targets(self, labels: Tensor, gt_boxes: Tensor, predictions: Predictions) -> tuple[Tensor, Tensor]:
        """Return weight [B, A] and target [B, A, 4] xyxy, px, of the box of every anchor."""

    @abstractmethod
    def _classification(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Return the class loss of all objects, a sum."""

    def _object_rows(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the class loss needs of the N = n M anchors of the objects, not of all anchors.

        Class logits [B, N, C'], the objects' labels [B, N], whether the object is the one that the anchor keeps [B, N],
        and whether another object has the same anchor [B, N, N].
        """
        parts = (Targets(targets.boxes[i], targets.labels[i]) for i in image_chunks(targets, predictions.anchors))
        best = torch.cat([self.matcher.best_anchors(part, predictions.anchors) for part in parts])
        logits = predictions.class_logits
        logits = logits.gather(1, best.clamp(min=0)[..., None].expand(-1, -1, logits.shape[2]))
        has_same = (best[:, :, None] == best[:, None, :]) & (best >= 0)[:, None, :]
        is_kept = (best >= 0) & ~has_same.triu(diagonal=1).any(dim=2)
        return logits, targets.labels.repeat(1, self.matcher.anchors_per_object), is_kept, has_same


class YOLOv3(YOLO):
    """YOLOv3: nine anchors on three maps. 62.0 million numbers with 80 classes; COCO 31.0 mAP at 416 px, 33.0 at 608.

    Args:
        num_classes: K.
        objectness_loss: of all anchors; its target is 1, or the IoU if it uses quality. None: SigmoidCrossEntropy().
        classification_loss: of the K sigmoids of each object; without class weights. None: SigmoidCrossEntropy().
        box_loss: None: GridBoxLoss(). Weighted by 2 - the object's share of the canvas.
        anchors: "coco", or one `AnchorShapes` for each of the strides 8, 16, 32, as `onestage anchors` proposes them.
        backbone: maps of strides 8, 16 and 32; None: Darknet53(). Its channels set the neck's.
        pretrained: path of a darknet file of all weights, such as yolov3.weights, for the same K and a Darknet53.
        prior: objectness of every anchor before training, in (0, 1); 0.5 in darknet.
        ignore_iou: a predicted box that overlaps an object by more is no background, in [0, 1].
        anchors_per_object: anchors that each object trains, >= 1; see `CellMatcher`.
        score_threshold: detections score more than this, in [0, 1).
        nms_threshold: overlap by more than this suppresses the lower score of a class, in [0, 1].
        max_detections: D, >= 1.
    """

    file_version = (0, 2, 0)
    anchors_coco = (  # yolov3.cfg, px at every input size
        AnchorShapes(8, ((10, 13), (16, 30), (33, 23))),
        AnchorShapes(16, ((30, 61), (62, 45), (59, 119))),
        AnchorShapes(32, ((116, 90), (156, 198), (373, 326))),
    )

    def __init__(
        self,
        num_classes: int,
        objectness_loss: SigmoidClassificationLoss | None = None,
        classification_loss: SigmoidClassificationLoss | None = None,
        box_loss: BoxLoss | None = None,
        anchors: Literal["coco"] | list[AnchorShapes] = "coco",
        backbone: Backbone | None = None,
        pretrained: str | None = None,
        prior: float = 0.01,
        ignore_iou: float = 0.7,
        anchors_per_object: int = 1,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        max_detections: int = 100,
    ) -> None:
        loss, backbone = classification_loss or SigmoidCrossEntropy(), backbone or darknet.Darknet53()
        # Its labels are those of single sigmoids, so weights of classes would be those of class 0.
        require(loss.class_weights is None, "YOLOv3: class_weights of classification_loss", "weights", "null")
        require(backbone.strides == (8, 16, 32), "YOLOv3: strides of the backbone", backbone.strides, "(8, 16, 32)")
        levels = named_levels("YOLOv3: anchors", anchors, {"coco": self.anchors_coco})
        losses = (loss, box_loss or GridBoxLoss(), objectness_loss or SigmoidCrossEntropy())
        neck, matcher = DarknetPyramid(backbone.out_channels), CellMatcher(ignore_iou, anchors_per_object)
        selection = Selection(score_threshold, nms_threshold, max_detections)
        super().__init__(num_classes, backbone, neck, levels, *losses, matcher, selection, prior, pretrained)

    def _box_targets(self, labels: Tensor, gt_boxes: Tensor, predictions: Predictions) -> tuple[Tensor, Tensor]:
        canvas, sides = self._canvas(predictions)[:2], gt_boxes[..., 2:] - gt_boxes[..., :2]
        return torch.where(labels >= 0, 2 - (sides / canvas).prod(dim=-1), 0.0), gt_boxes

    def _classification(self, predictions: Predictions, targets: Targets) -> Tensor:
        """Every sigmoid is asked on its own: an anchor with two objects has both classes (yolo_layer.c)."""
        logits, labels, is_kept, has_same = self._object_rows(predictions, targets)
        has_class = (has_same.to(logits.dtype) @ one_hot(labels, logits)) > 0  # [B, N, K]
        labels = torch.where(has_class, 0, BACKGROUND).masked_fill(~is_kept[..., None], IGNORE)
        return cast(Tensor, self.classification_loss(logits.flatten(1)[..., None], labels.flatten(1)))


class YOLOv2(YOLO):
    """YOLOv2: five anchors on one map of stride 32. 50.7 million numbers with 20 classes; VOC07 76.8 mAP at 416 px.

    Args:
        objectness_loss: None: SquaredObjectnessLoss().
        classification_loss: of objects; None: ObjectSoftmaxLoss(), with alpha 0.5 and gamma 2 darknet's focal loss.
        box_loss: None: SquaredGridBoxLoss().
        anchors: a table of darknet, or one `AnchorShapes` of the last stride, as `onestage anchors` proposes it.
        backbone: maps of strides 16 and 32, for small objects 8 and 16; None: Darknet19(). Its channels set the neck's.
        pretrained: path of a darknet file such as yolov2-voc.weights, for the same K, a Darknet19, and the
            anchors of its cfg.
        prior: not 0.01, because the squared error has little slope near 0 and 1.
        anchor_images: >= 0; in so many images at first, anchors without an object learn themselves with weight 0.01.

    The other arguments are those of `YOLOv3`.
    """

    file_version = (0, 1, 0)
    anchor_tables: ClassVar = {  # yolov2-voc.cfg and yolov2.cfg, cells
        "voc": ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053), (11.2364, 10.0071)),
        "coco": ((0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778), (9.77052, 9.16828)),
    }

    def __init__(
        self,
        num_classes: int,
        objectness_loss: SigmoidClassificationLoss | None = None,
        classification_loss: ObjectSoftmaxLoss | None = None,
        box_loss: BoxLoss | None = None,
        anchors: Literal["voc", "coco"] | list[AnchorShapes] = "voc",
        backbone: Backbone | None = None,
        pretrained: str | None = None,
        prior: float = 0.1,
        ignore_iou: float = 0.6,
        anchors_per_object: int = 1,
        anchor_images: int = 12_800,
        score_threshold: float = 0.005,
        nms_threshold: float = 0.45,
        max_detections: int = 100,
    ) -> None:
        require(anchor_images >= 0, "YOLOv2: anchor_images", anchor_images, ">= 0")
        backbone = backbone or darknet.Darknet19()
        fits = backbone.strides in ((8, 16), (16, STRIDE))
        require(fits, "YOLOv2: strides of the backbone", backbone.strides, "(16, 32) or (8, 16)")
        tables = {
            name: (AnchorShapes(STRIDE, tuple((w * STRIDE, h * STRIDE) for w, h in cells)),)
            for name, cells in self.anchor_tables.items()
        }
        levels = named_levels("YOLOv2: anchors", anchors, tables)
        box_loss, objectness_loss = box_loss or SquaredGridBoxLoss(), objectness_loss or SquaredObjectnessLoss()
        losses = (classification_loss or ObjectSoftmaxLoss(), box_loss, objectness_loss)
        neck, matcher = Passthrough(backbone.out_channels), CellMatcher(ignore_iou, anchors_per_object)
        selection = Selection(score_threshold, nms_threshold, max_detections)
        super().__init__(num_classes, backbone, neck, levels, *losses, matcher, selection, prior, pretrained)
        self.anchor_images = anchor_images

    def _box_targets(self, labels: Tensor, gt_boxes: Tensor, predictions: Predictions) -> tuple[Tensor, Tensor]:
        is_early = (self.images_seen < self.anchor_images) & self.training
        weights = torch.where(labels >= 0, 1.0, 0.01 * is_early)
        anchor_boxes: Tensor = box_convert(predictions.anchors.boxes, "cxcywh", "xyxy")
        return weights, torch.where((labels >= 0)[..., None], gt_boxes, anchor_boxes)

    def _classification(self, predictions: Predictions, targets: Targets) -> Tensor:
        logits, labels, is_kept, _ = self._object_rows(predictions, targets)
        return cast(Tensor, self.classification_loss(logits, torch.where(is_kept, labels, IGNORE)))
