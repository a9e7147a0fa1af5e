"""Coverage and proposals of anchors, against the anchors that the models tile and the matcher that trains them."""

import inspect
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_data import coco_content, write_coco

from onestage.boxes.anchors import AnchorGrid, AnchorShapes
from onestage.boxes.matchers import IoUMatcher
from onestage.cli import main
from onestage.doctor.anchor_table import find_anchors, write_yaml
from onestage.doctor.anchors import cluster_shapes, propose_anchors
from onestage.doctor.coverage import (
    IMAGE_SIZES,
    TABLES,
    AnchorLevel,
    DetectorAnchors,
    best_overlaps,
    count_positives,
    measure_coverage,
    ssd_level,
)
from onestage.doctor.doctor_options import DETECTORS
from onestage.doctor.statistics import MAX_DETECTIONS
from onestage.errors import ConfigError
from onestage.models import SSD160, SSD300, SSD512
from onestage.types import Targets

ONE_LEVEL = DetectorAnchors("toy", 40, (AnchorLevel(side=4, stride=10, size=10, next_size=40, aspect_ratios=()),))


def tile(levels, image_size: int):
    grid = AnchorGrid([level.as_shapes for level in levels], max_side=image_size)
    return grid([(level.side, level.side) for level in levels])


def random_boxes(num: int, side: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    corners = draw.uniform(0, side, (num, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[: num // 2, 2:] = boxes[: num // 2, :2] + draw.uniform(2, side / 6, (num // 2, 2))
    return boxes.clip(0, side) + np.array([0, 0, 1, 1])


def test_best_overlaps_of_boxes_that_a_pencil_can_check() -> None:
    # Squares of 10 and sqrt(10 * 40) = 20 px around 5, 15, 25, 35.
    boxes = np.array([
        [10.0, 10, 20, 20],  # the anchor of 10 px around (15, 15)
        [10, 10, 20, 15],  # half of it
        [0, 0, 20, 20],  # 225 px^2 in common with the one of 20 px around (5, 5) or (15, 15): 225 / 575
        [12, 10, 22, 20],  # 2 px beside it: 80 / 120
    ])  # fmt: skip
    assert best_overlaps(boxes, ONE_LEVEL).tolist() == pytest.approx([1, 0.5, 225 / 575, 80 / 120])
    assert count_positives(boxes, ONE_LEVEL).tolist() == [1, 1, 0, 1]


def test_coverage_counts_by_size_and_class() -> None:
    boxes = np.array([[10.0, 10, 20, 20], [0, 0, 20, 20], [10, 10, 20, 15]])
    coverage = measure_coverage(boxes, np.array([0, 0, 2]), 3, ONE_LEVEL)
    assert coverage.share == pytest.approx(2 / 3)
    assert coverage.num_unreached == 1
    assert coverage.by_class[0] == 0.5
    assert np.isnan(coverage.by_class[1])
    assert coverage.by_class[2] == 1
    assert coverage.by_size[:2] == [1, 0]  # under 16 px; 16 to 32
    assert coverage.positives_per_object == 1  # the second has its forced match


@pytest.mark.parametrize("detector", ["SSD160", "SSD300"])
def test_coverage_agrees_with_the_tiled_anchors_and_the_matcher(detector: str) -> None:
    anchors = find_anchors(detector, "coco")
    boxes = random_boxes(60, anchors.image_size)
    tiled = tile(anchors.levels, anchors.image_size)
    low, high = tiled.boxes[:, :2] - tiled.boxes[:, 2:] / 2, tiled.boxes[:, :2] + tiled.boxes[:, 2:] / 2
    gt = torch.from_numpy(boxes).float()[:, None]
    overlap = (torch.minimum(gt[..., 2:], high) - torch.maximum(gt[..., :2], low)).clamp(min=0).prod(dim=-1)
    iou = overlap / ((gt[..., 2:] - gt[..., :2]).prod(dim=-1) + tiled.boxes[:, 2:].prod(dim=-1) - overlap)
    assert best_overlaps(boxes, anchors) == pytest.approx(iou.max(dim=1).values.numpy(), abs=1e-5)
    assert count_positives(boxes, anchors).tolist() == (iou >= 0.5).sum(dim=1).tolist()
    for row in range(20):  # one object alone: all its anchors are its own
        targets = Targets(gt[row : row + 1], torch.zeros(1, 1, dtype=torch.int64))
        num_matched = int((IoUMatcher()(targets, tiled) >= 0).sum())
        assert num_matched == max(1, int(count_positives(boxes[row : row + 1], anchors)[0]))


@pytest.mark.parametrize("model", [SSD160, SSD300, SSD512])
def test_the_tables_and_the_most_detections_are_those_of_the_models(model: type) -> None:
    assert IMAGE_SIZES[model.__name__] == model.image_size
    for name, levels in model.anchor_tables.items():
        assert TABLES[model.__name__, name] == tuple(ssd_level(level, model.image_size) for level in levels)
    assert inspect.signature(model).parameters["max_detections"].default == MAX_DETECTIONS


def test_the_commands_know_the_same_detectors() -> None:
    assert set(DETECTORS) == set(IMAGE_SIZES)


def test_clusters_find_two_shapes() -> None:
    sides = np.array([[10.0, 10]] * 30 + [[40, 20]] * 10) + np.linspace(0, 0.4, 40)[:, None]
    shapes, shares = cluster_shapes(sides, 2, np.random.default_rng(1))
    assert shapes == pytest.approx(np.array([[10.15, 10.15], [40.35, 20.35]]), abs=0.06)
    assert shares.tolist() == [0.75, 0.25]


def test_a_proposal_reaches_boxes_that_the_published_table_does_not() -> None:
    draw = np.random.default_rng(3)
    corners = draw.uniform(0, 260, (500, 2))
    boxes = np.concatenate([corners, corners + draw.uniform([8, 24], [12, 36], (500, 2))], axis=1)  # small and tall
    before = find_anchors("SSD300", "voc")
    levels = propose_anchors(boxes, before)
    old, new = (
        (best_overlaps(boxes, before._replace(levels=table)) >= 0.5).mean() for table in (before.levels, levels)
    )
    assert old < 0.2
    assert new > 0.7
    assert [(level.side, level.stride, len(level.aspect_ratios)) for level in levels] == [
        (level.side, level.stride, len(level.aspect_ratios)) for level in before.levels
    ]
    assert all(level.next_size == following.size for level, following in pairwise(levels))
    assert propose_anchors(boxes, before) == levels  # the seed decides


def test_the_command_writes_a_table_that_detector_and_doctor_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_coco(tmp_path, coco_content())
    out = tmp_path / "anchors.yaml"
    assert main(["anchors", str(file), "--detector", "SSD160", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "# before: " in text
    assert "# after: " in text
    detector = yaml.safe_load(out.read_text())["model"]["detector"]
    assert detector["class_path"] == "onestage.models.SSD160"
    levels = [AnchorShapes(**row) for row in detector["init_args"]["anchors"]]
    model = SSD160(num_classes=2, anchors=levels)
    predictions = model(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))
    assert predictions.class_logits.shape[1] == len(predictions.anchors.boxes)
    assert find_anchors("SSD160", str(out)).levels == tuple(ssd_level(level, 160) for level in levels)
    assert main(["doctor", str(file), "--detector", "SSD160", "--anchors", str(out)]) == 0
    assert main(["anchors", str(file), "--detector", "SSD160", "--out", str(out)]) == 2  # nothing is overwritten


def test_the_written_table_goes_over_a_config_and_keeps_the_rest(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningArgumentParser

    from onestage.types import Detector

    out = tmp_path / "anchors.yaml"
    before = find_anchors("SSD300", "voc")
    own = before._replace(levels=(before.levels[0]._replace(size=12.5), *before.levels[1:]))
    out.write_text(write_yaml(own))
    shared = tmp_path / "shared.yaml"
    shared.write_text(
        "model:\n  detector:\n    class_path: onestage.models.SSD300\n    init_args:\n      num_classes: 3\n"
        "      anchors: voc\n      score_threshold: 0.2\n"
    )
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Detector, "model.detector")
    config = parser.parse_args(["--config", str(shared), "--config", str(out)])
    model = parser.instantiate_classes(config).model.detector
    assert model.selection.score_threshold == 0.2
    assert model.anchor_grid.shapes[0].tolist() == [12.5, 12.5]


@pytest.mark.parametrize(
    "text", ["", "[]", "model: 5", "model: {detector: {init_args: {anchors: [{side: 1}]}}}", "a: [", "model: &a [*a]"]
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        find_anchors("SSD300", str(file))


def test_a_table_of_another_detector_is_refused_by_doctor_and_by_the_model(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(write_yaml(find_anchors("SSD160", "voc")))
    with pytest.raises(ConfigError, match="not those of SSD300"):
        find_anchors("SSD300", str(file))
    with pytest.raises(ConfigError, match="a level for each feature map"):
        SSD300(num_classes=2, anchors=list(SSD160.anchor_tables["voc"]))
    with pytest.raises(ConfigError, match="> 0, px"):
        SSD160(num_classes=2, anchors=[level._replace(shapes=((-1, 1),)) for level in SSD160.anchor_tables["voc"]])
