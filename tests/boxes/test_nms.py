"""Selection by hand; models/test_weights.py and, by level, test_pyramids.py compare it with torchvision's."""

import torch
from torchvision.ops import box_convert

import onestage.boxes.nms
from onestage.boxes.nms import Selection, select_detections
from onestage.types import PADDING, Detections

SSD = Selection(score_threshold=0.01, nms_threshold=0.45, max_detections=200, candidates_per_class=400)


def select(boxes, scores, level_sizes=None, **changes) -> Detections:
    return select_detections(boxes, scores, level_sizes or (scores.shape[1],), SSD._replace(**changes))


def test_iou_at_the_threshold_is_kept_and_score_at_the_threshold_is_not() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [30, 0, 40, 10]]])
    scores = torch.tensor([[[0.75], [0.5], [0.25]]])
    assert select(boxes, scores, nms_threshold=0.5, score_threshold=0.25).scores[0, :3].tolist() == [0.75, 0.5, 0.0]
    found = select(boxes, scores, nms_threshold=0.49, score_threshold=0.2)
    assert found.scores[0, :3].tolist() == [0.75, 0.25, 0.0]
    assert found.labels[0].tolist() == [0, 0, *[PADDING] * 198]  # more places than anchors


def test_equal_scores_are_ordered_by_label_then_anchor() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]])
    found = select(boxes, torch.full((1, 3, 2), 0.5), max_detections=4)
    assert found.labels.tolist() == [[0, 0, 0, 1]]
    assert found.boxes[0, :, 0].tolist() == [0, 20, 40, 0]


def random_candidates() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images with 500 anchors and 5 classes."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.rand(2, 500, 2, generator=generator) * n + m for n, m in ((300, 0), (80, 20))], dim=-1)
    logits = torch.randn(2, 500, 6, generator=generator) * 2
    return box_convert(boxes, "cxcywh", "xyxy").clamp(0, 300), logits.softmax(dim=-1)[..., 1:]


def test_suppressing_all_images_in_one_call_changes_nothing(monkeypatch) -> None:
    boxes, scores = random_candidates()
    expected = select(boxes, scores)
    monkeypatch.setattr(onestage.boxes.nms, "IMAGES_PER_CALL", {})  # as on a GPU
    for found, wanted in zip(select(boxes, scores), expected, strict=True):
        assert torch.equal(found, wanted)


def test_box_that_is_not_a_number_changes_no_other_image_and_nothing_else_of_its_own() -> None:
    boxes, scores = random_candidates()
    scores[1, 7] = 0.0  # not among the candidates
    expected = select(boxes, scores)
    boxes[1, 7, 2] = torch.nan
    for found, wanted in zip(select(boxes, scores), expected, strict=True):
        assert torch.equal(found, wanted)
