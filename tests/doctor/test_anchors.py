"""Coverage and fitted anchors, against hand-computed IoUs, placed anchors, the matcher and the detectors."""

import numpy as np
import pytest
import torch
import yaml
from bad_data import coco_content, write_coco
from command_line import message_of
from torchvision.ops import box_convert

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.geometry import pairwise_overlap
from onestage.boxes.matchers import IoUMatcher
from onestage.cli import main
from onestage.doctor.anchors import (
    DetectorAnchors,
    best_ious,
    cluster_shapes,
    count_positives,
    find_anchors,
    mean_shape_iou,
    measure_coverage,
    propose_anchors,
    propose_shapes,
    write_table,
)
from onestage.errors import ConfigError
from onestage.types import Detector, Targets

# Squares of 10 and 20 px around 5, 15, 25, 35.
SMALL = DetectorAnchors("toy", 40, (AnchorShapes(10, ((10.0, 10.0), (20.0, 20.0))),), ((4, 4),), 200)


class WithoutAnchors(Detector):
    """A detector of any canvas that has no anchors."""

    image_size = None

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    forward = loss = detect = None


def test_coverage_is_counted_by_size_and_class():
    boxes = np.array([[10.0, 10, 20, 20], [0, 0, 20, 20], [10, 10, 20, 15]])
    coverage = measure_coverage(boxes, np.array([0, 0, 2]), 3, SMALL)
    assert coverage.share == pytest.approx(2 / 3)
    assert (coverage.num_unreached, coverage.poor_share) == (1, 0)  # 225 / 575 of the 20 px square is its best IoU
    small = np.array([[0.0, 0, 5, 5], [0, 0, 6, 6]])  # IoU 0.25 and 0.36 with a square of 10 px
    assert measure_coverage(small, np.array([0, 0]), 3, SMALL).poor_share == 0.5
    assert coverage.by_class == pytest.approx([0.5, np.nan, 1], nan_ok=True)
    assert coverage.by_size[:2] == [1, 0]  # under 16 px; 16 to 32
    assert coverage.positives_per_object == 1  # the second object has its forced match


@pytest.mark.parametrize(("detector", "num_anchors"), [("SSD160", None), ("SSD300", 8732)])
def test_coverage_agrees_with_placed_anchors_and_the_matcher(detector, num_anchors):
    anchors = find_anchors(detector, "coco")
    placed = AnchorGrid(anchors.levels)(anchors.grids)
    assert num_anchors in (None, len(placed.boxes))
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=draw) * (anchors.image_size - 40)
    boxes = torch.cat([corners, corners + 4 + 36 * torch.rand(60, 2, generator=draw)], dim=1)
    iou = pairwise_overlap(boxes, box_convert(placed.boxes, "cxcywh", "xyxy"))[1]
    assert torch.allclose(best_ious(boxes, anchors), iou.amax(dim=1), rtol=1e-4, atol=1e-5)
    assert count_positives(boxes, anchors).tolist() == (iou >= 0.5).sum(dim=1).tolist()
    for row in range(10):
        targets = Targets(boxes[row].view(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64))
        num_matched = int((IoUMatcher()(targets, placed, None) >= 0).sum())
        assert num_matched == max(1, int(count_positives(boxes[row : row + 1], anchors)[0]))


def test_clusters_find_two_shapes():
    sides = torch.tensor([[10.0, 10]] * 31 + [[40, 20]] * 11) + torch.linspace(0, 0.41, 42)[:, None]
    shapes = cluster_shapes(sides, 2, torch.Generator().manual_seed(1))
    assert shapes.tolist() == [pytest.approx([10.15, 10.15]), pytest.approx([40.36, 20.36])]  # medians


def test_fitted_anchors_reach_boxes_that_the_published_ones_miss():
    draw = np.random.default_rng(3)
    corners = draw.uniform(0, 260, (300, 2))
    sides = draw.uniform([8, 24], [12, 36], (300, 2))  # small and tall
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], axis=1))
    before = find_anchors("SSD300")
    after = propose_anchors(boxes, before)
    old, new = ((best_ious(boxes, table) >= 0.5).double().mean() for table in (before, after))
    assert old < 0.2
    assert new > 0.7
    layouts = [[(level.stride, len(level.shapes)) for level in table.levels] for table in (before, after)]
    assert layouts[0] == layouts[1]
    assert propose_anchors(boxes, before) == after  # the seed decides


def test_mean_shape_iou_compares_sides_alone():
    boxes = torch.tensor([[100.0, 100, 110, 110], [0, 0, 10, 20]])
    # 10 x 10 in 10 x 10, and 10 x 20 over 20 x 20
    assert mean_shape_iou(boxes, SMALL) == pytest.approx((1 + 200 / 400) / 2)


@pytest.mark.parametrize(("detector", "num_shapes", "counts"), [("YOLOv3", 9, [3, 3, 3]), ("YOLOv2", 5, [5])])
def test_clusters_are_dealt_to_the_levels_by_area(detector, num_shapes, counts):
    draw = torch.Generator().manual_seed(3)
    sides = 8 + 60 * torch.rand(400, 2, generator=draw)
    boxes = torch.cat([torch.zeros(400, 2), sides], dim=1)
    before = find_anchors(detector, None, 416)
    after = propose_shapes(boxes, before, num_shapes)
    assert [len(level.shapes) for level in after.levels] == counts
    areas = [width * height for level in after.levels for width, height in level.shapes]
    assert areas == sorted(areas)
    assert mean_shape_iou(boxes, after) > max(0.6, mean_shape_iou(boxes, before))
    assert find_anchors(detector, after.levels, 416).grids == before.grids
    assert propose_shapes(boxes, before, num_shapes) == after  # the seed decides


def test_shapes_that_the_levels_cannot_share_or_the_boxes_do_not_have_are_refused(tmp_path, capsys):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 10]])
    with pytest.raises(ConfigError, match=r"shapes must be at most 2, the different shapes found, got 3"):
        propose_shapes(boxes, SMALL, 3)
    words = [str(write_coco(tmp_path, coco_content())), "--detector", "YOLOv3", "--image_size", "416"]
    assert main(["anchors", *words, "--shapes", "10"]) == 2
    assert "shapes must be a multiple of 3, the levels of YOLOv3, got 10.\nTry: --shapes 9" in capsys.readouterr().err
    words[2] = "YOLOv2"
    assert main(["anchors", *words, "--shapes", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("mean best shape IoU") == 2
    assert yaml.safe_load(shown)["model"]["detector"]["class_path"] == "onestage.models.YOLOv2"


def test_command_writes_a_table_that_config_detector_and_doctor_take(tmp_path, capsys):
    from lightning.pytorch.cli import LightningArgumentParser

    file = write_coco(tmp_path, coco_content())
    out, shared = tmp_path / "anchors.yaml", tmp_path / "shared.yaml"
    assert main(["anchors", str(file), "--detector", "SSD160", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "# before: " in text
    assert "# after: " in text
    shared.write_text(
        "model:\n  detector:\n    class_path: onestage.models.SSD160\n    init_args:\n      num_classes: 3\n"
        "      anchors: voc\n      score_threshold: 0.2\n"
    )
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Detector, "model.detector")
    config = parser.parse_args(["--config", str(shared), "--config", str(out)])
    model = parser.instantiate(config).model.detector
    assert model.selection.score_threshold == 0.2  # the rest of the configuration stays
    assert model.anchor_grid.levels == find_anchors("SSD160", str(out)).levels
    assert model.anchor_grid.levels != find_anchors("SSD160").levels
    assert main(["doctor", str(file), "--detector", "onestage.models.SSD160", "--anchors", str(out)]) == 0
    assert main(["anchors", str(file), "--detector", "SSD160", "--out", str(out)]) == 2  # nothing is overwritten


def test_detector_without_anchors_is_checked_without_coverage(tmp_path, capsys):
    file = write_coco(tmp_path, coco_content())
    words = [str(file), "--detector", f"{__name__}.WithoutAnchors", "--image_size", "64"]
    assert main(["doctor", *words]) == 0
    text = capsys.readouterr().out
    assert "boxes of train at 64 x 64 px" in text
    assert "anchors of" not in text
    assert "must be a detector with anchors" in message_of(capsys, "anchors", *words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("YOLO9000",), "onestage.models.YOLO9000 cannot be imported"),
        (("pathlib.Path",), "must be the path of a Detector class"),
        ((f"{__name__}.WithoutAnchors", "voc", 64), "cannot be built with num_classes and anchors"),
        ((f"{__name__}.WithoutAnchors",), "image_size must be > 0"),
        (("SSD300", "mine"), "anchors must be one of voc, coco"),
        (("SSD300", None, 512), "300"),
    ],
)
def test_unusable_detector_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        find_anchors(*arguments)


@pytest.mark.parametrize(
    "text", ["", "[]", "model: 5", "model: {detector: {init_args: {anchors: [{side: 1}]}}}", "a: [", "model: &a [*a]"]
)
def test_file_without_an_anchor_table_is_refused(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        find_anchors("SSD300", str(file))


def test_table_of_another_detector_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(write_table(find_anchors("SSD160")))
    assert yaml.safe_load(file.read_text())["model"]["detector"]["class_path"] == "onestage.models.SSD160"
    with pytest.raises(ConfigError, match="one level for each feature map"):
        find_anchors("SSD300", str(file))
    assert find_anchors("SSD160", str(file)).grids == find_anchors("SSD160").grids
