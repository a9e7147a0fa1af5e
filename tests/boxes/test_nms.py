from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection import _utils, ssd
from torchvision.ops import box_convert

from onestage.boxes.nms import select_detections
from onestage.boxes.placement import to_original
from onestage.types import PADDING, Detections


def select(boxes, scores, **changes) -> Detections:
    settings = {"score_threshold": 0.01, "iou_threshold": 0.45, "candidates_per_class": 400, "max_detections": 200}
    return select_detections(boxes, scores, **(settings | changes))


def test_overlapping_box_of_the_same_class_is_suppressed_and_of_another_class_is_kept() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]]])
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.005, 0.6]]])
    found = select(boxes, scores, max_detections=5)
    assert_close(found.scores, torch.tensor([[0.9, 0.7, 0.6, 0.0, 0.0]]))
    assert found.labels.tolist() == [[0, 1, 1, PADDING, PADDING]]
    assert found.boxes.tolist() == [[[0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 0, 0], [0, 0, 0, 0]]]


def test_overlap_equal_to_the_threshold_is_kept_as_is_a_score_above_but_not_at_the_threshold() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [30, 0, 40, 10]]])
    scores = torch.tensor([[[0.75], [0.5], [0.25]]])
    assert select(boxes, scores, iou_threshold=0.5, score_threshold=0.25).scores[0, :3].tolist() == [0.75, 0.5, 0.0]
    assert select(boxes, scores, iou_threshold=0.49, score_threshold=0.2).scores[0, :3].tolist() == [0.75, 0.25, 0.0]


def test_candidates_per_class_are_cut_before_suppression() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 0, 60, 10]]])
    scores = torch.tensor([[[0.9], [0.8], [0.7]]])
    found = select(boxes, scores, candidates_per_class=2, max_detections=3)
    assert_close(found.scores, torch.tensor([[0.9, 0.0, 0.0]]))  # 0.8 took the second place, then was suppressed


def test_no_score_above_the_threshold_gives_padding_alone() -> None:
    found = select(torch.rand(2, 5, 4), torch.zeros(2, 5, 3), max_detections=4)
    assert (found.labels == PADDING).all()
    assert (found.scores == 0).all()
    assert (found.boxes == 0).all()


def test_equal_scores_are_ordered_by_label_then_anchor() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    found = select(boxes, torch.full((1, 3, 2), 0.5), max_detections=4)
    assert found.labels.tolist() == [[0, 0, 0, 1]]
    assert found.boxes[0, :, 0].tolist() == [0, 20, 40, 0]


def torchvision_select(boxes, scores, settings):
    """torchvision's postprocess_detections on boxes and scores: deltas of 0 to anchors that are the boxes."""
    model = SimpleNamespace(
        box_coder=_utils.BoxCoder((10.0, 10.0, 5.0, 5.0)),
        score_thresh=0.01,
        nms_thresh=0.45,
        detections_per_img=settings["max_detections"],
        topk_candidates=settings["candidates_per_class"],
    )
    background = 1 - scores.sum(dim=-1, keepdim=True)
    outputs = {"cls_logits": torch.cat([background, scores], dim=-1).log(), "bbox_regression": torch.zeros_like(boxes)}
    return ssd.SSD.postprocess_detections(model, outputs, list(boxes), [(300, 300)] * len(boxes))


@pytest.mark.parametrize(
    ("num_anchors", "num_classes", "spread", "settings"),
    [
        (2000, 20, 2.0, {"candidates_per_class": 400, "max_detections": 200}),  # the shortlist is enough
        (2000, 20, 0.1, {"candidates_per_class": 400, "max_detections": 200}),  # untrained: all pass the threshold
        (3000, 3, 3.0, {"candidates_per_class": 400, "max_detections": 200}),  # few classes: more than the shortlist
        (3000, 1, 1.0, {"candidates_per_class": 100, "max_detections": 100}),
        (3000, 2, 1.0, {"candidates_per_class": 5, "max_detections": 50}),  # the limit per class decides
        (50, 3, 1.0, {"candidates_per_class": 400, "max_detections": 200}),  # fewer anchors than asked for
    ],
)
def test_selection_equals_torchvision(num_anchors, num_classes, spread, settings) -> None:
    generator = torch.Generator().manual_seed(num_anchors + num_classes)
    centres = torch.rand(2, num_anchors, 2, generator=generator) * 300
    sizes = torch.rand(2, num_anchors, 2, generator=generator) * 80 + 20
    boxes = box_convert(torch.cat([centres, sizes], dim=-1), "cxcywh", "xyxy").clamp(0, 300)
    logits = torch.randn(2, num_anchors, num_classes + 1, generator=generator, dtype=torch.float64) * spread
    scores = logits.softmax(dim=-1)[..., 1:]  # float64, so that no two are equal: torchvision's order of ties is random
    found = select(boxes, scores, **settings)
    for image, expected in enumerate(torchvision_select(boxes.double(), scores, settings)):
        num_found = len(expected["scores"])
        assert (found.labels[image, :num_found] + 1).tolist() == expected["labels"].tolist()
        assert_close(found.scores[image, :num_found].double(), expected["scores"], atol=1e-6, rtol=0)
        assert_close(found.boxes[image, :num_found].double(), expected["boxes"], atol=1e-3, rtol=0)
        assert (found.labels[image, num_found:] == PADDING).all()


def test_equal_scores_everywhere_find_the_same_boxes_as_distinct_ones() -> None:
    # 40 places, at each of them 50 equal boxes: whatever the order, one box of each place survives.
    places = torch.arange(40, dtype=torch.float32) * 20
    low = torch.stack([places, torch.zeros(40)], dim=-1).repeat(50, 1)
    boxes = torch.cat([low, low + 10], dim=-1)[None]
    found = select(boxes, torch.full((1, 2000, 2), 0.3), candidates_per_class=2000, max_detections=100)
    assert (found.scores > 0).sum() == 80
    assert found.boxes[0, :40, 0].tolist() == places.tolist()


def test_to_original_undoes_a_stretch() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 300.0, 300.0], [30.0, 60.0, 150.0, 90.0]]])
    original = to_original(boxes, torch.tensor([[2.0, 0.5, 0.0, 0.0]]), torch.tensor([[600, 150]]))  # height, width
    assert original.tolist() == [[[0, 0, 150, 600], [15, 120, 75, 180]]]
