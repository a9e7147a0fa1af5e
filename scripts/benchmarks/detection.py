"""From the network's outputs to detections: torchvision's `postprocess_detections`, and `SSD300.detect`.

Three kinds of outputs: of a trained network with about 20 anchors of each class above the score threshold, of a less
certain one with 200, and of an untrained one, where every anchor passes for every class. The logits are normal with
deviation 1.5 and a background bias that is found by bisection.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from benchmarks.timing import compare
from onestage.losses import MinedCrossEntropy
from onestage.models import SSD300
from onestage.types import Anchors, Detections, Predictions

NUM_CLASSES = 90  # of torchvision's weights, without the background
SCORE_THRESHOLD = 0.01
FEATURE_SIDES = (38, 19, 10, 5, 3, 1)


class BackgroundFirst(MinedCrossEntropy):
    """torchvision's order of the logits, so that both sides see scores equal to the last bit."""

    def scores(self, class_logits: Tensor) -> Tensor:
        """Return the softmax without its first column, the background."""
        return class_logits.softmax(dim=-1)[..., 1:]


def run(rounds: int, quick: bool) -> None:
    """Compare on three kinds of outputs, at batch sizes 8 and 1."""
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1).eval()
    ours = SSD300(NUM_CLASSES, BackgroundFirst(), anchors="coco").eval()
    # The very same anchors, because the two tables differ by rounding and an IoU of 0.45 may turn on that.
    anchors = _torchvision_anchors(theirs)
    corners = torch.cat([anchors[:, :2] + anchors[:, 2:], anchors[:, 2:] - anchors[:, :2]], dim=1) / 2
    centres = torch.cat([corners[:, :2], corners[:, 2:] * 2], dim=1)
    for batch_size in (1,) if quick else (8, 1):
        for candidates in (20,) if quick else (20, 200, None):
            logits, deltas = synthetic_outputs(batch_size, len(anchors), candidates)
            outputs = {"cls_logits": logits, "bbox_regression": deltas}
            predictions = Predictions(logits, deltas, Anchors(centres, torch.ones(len(anchors)), (len(anchors),)))

            def with_torchvision(outputs: dict[str, Tensor] = outputs) -> list[dict[str, Tensor]]:
                count = len(outputs["cls_logits"])
                return theirs.postprocess_detections(outputs, [anchors] * count, [(300, 300)] * count)

            def with_onestage(predictions: Predictions = predictions) -> Detections:
                return ours.detect(predictions)

            with torch.no_grad():
                difference = largest_difference(with_torchvision(), with_onestage())
                kind = "untrained" if candidates is None else f"{candidates} candidates per class"
                contestants: dict[str, Callable[[], object]] = {
                    "torchvision": with_torchvision,
                    "onestage": with_onestage,
                }
                compare(f"detections of {batch_size} images, {kind}", contestants, rounds)
            print(f"asserted: same labels in the same order; scores and boxes differ by {difference:.1e} at most")


def _torchvision_anchors(model: SSD) -> Tensor:
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    return model.anchor_generator(images, [torch.zeros(1, 1, side, side) for side in FEATURE_SIDES])[0]


def synthetic_outputs(batch_size: int, num_anchors: int, candidates: int | None) -> tuple[Tensor, Tensor]:
    """Return class logits [B, A, K + 1], background first, and box deltas [B, A, 4].

    candidates: anchors of each class that exceed the score threshold, on average; None for an untrained network.
    """
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(batch_size, num_anchors, 4, generator=generator) * 0.7
    logits = torch.randn(batch_size, num_anchors, NUM_CLASSES + 1, generator=generator)
    if candidates is None:
        return logits * 0.1, deltas
    logits *= 1.5
    low, high = -20.0, 40.0
    for _ in range(30):
        logits[..., 0] += (low + high) / 2
        passing = (logits.softmax(dim=-1)[..., 1:] > SCORE_THRESHOLD).sum() / (batch_size * NUM_CLASSES)
        logits[..., 0] -= (low + high) / 2
        low, high = ((low + high) / 2, high) if passing > candidates else (low, (low + high) / 2)
    logits[..., 0] += high
    return logits, deltas


def largest_difference(theirs: list[dict[str, Tensor]], ours: Detections) -> float:
    """Return the largest difference of scores (0..1) and boxes (px), if the labels are the same one by one."""
    differences = []
    for image, expected in enumerate(theirs):
        count = len(expected["scores"])
        assert (ours.scores[image] > 0).sum() == count, f"image {image}: not {count} detections"
        assert torch.equal(ours.labels[image, :count] + 1, expected["labels"]), f"image {image}: other labels"
        differences.append((ours.scores[image, :count] - expected["scores"]).abs().max().item())
        differences.append((ours.boxes[image, :count] - expected["boxes"]).abs().max().item())
    assert max(differences) < 1e-3, f"scores or boxes differ by {max(differences)}"
    return max(differences)
