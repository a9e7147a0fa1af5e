"""Pictures with boxes, and figures of an evaluation."""

import numpy as np
import pytest
import torch
from evaluation_data import annotation_set, detections, flat, random_evaluation
from PIL import Image

from onestage.evaluation.analysis import analyse
from onestage.evaluation.drawing import _Pen, class_colour, draw_boxes
from onestage.evaluation.figures import draw_confusion, draw_precision_recall, write_figures
from onestage.types import PADDING, Detections

NAMES = ["cat", "dog"]
NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def grey(height, width):
    return np.full((height, width, 3), 127, np.uint8)


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels))


NOTHING = found([], [], [])


def test_detection_is_solid_box_in_colour_of_its_class():
    drawn = draw_boxes(grey(400, 400), NO_BOXES, NO_LABELS, found([[100.0, 150, 300, 350]], [0.9], [1]), NAMES)
    for y, x in [(350, 200), (250, 100), (250, 300)]:  # bottom, left and right edge
        assert tuple(drawn[y, x]) == class_colour(1)
    assert tuple(drawn[250, 200]) == (127, 127, 127)


def test_object_is_dashed_box_in_black_and_white():
    boxes = np.array([[100.0, 150, 300, 350]], np.float32)
    drawn = draw_boxes(grey(400, 400), boxes, np.array([0]), NOTHING, NAMES)
    assert {tuple(pixel) for pixel in drawn[150, 100:301].tolist()} == {(0, 0, 0), (255, 255, 255)}


def test_padding_and_detections_below_threshold_are_not_drawn():
    detections = found([[10.0, 10, 50, 50], [0, 0, 0, 0]], [0.49, 0.0], [0, PADDING])
    drawn = draw_boxes(grey(320, 320), NO_BOXES, NO_LABELS, detections, NAMES, score_threshold=0.5)
    assert (drawn == 127).all()
    drawn = draw_boxes(grey(320, 320), NO_BOXES, NO_LABELS, detections, NAMES, score_threshold=0.0)
    assert tuple(drawn[0, 0]) == (127, 127, 127)  # the padding row


def test_best_ten_detections_are_drawn_while_no_threshold_is_known():
    boxes = [[10.0 + 25 * row, 200, 25.0 + 25 * row, 300] for row in range(11)]
    detections = found(boxes, [0.01] * 11, [0] * 11)
    drawn = draw_boxes(grey(320, 320), NO_BOXES, NO_LABELS, detections, NAMES, score_threshold=None)
    assert tuple(drawn[280, 235]) == class_colour(0)  # the tenth
    assert tuple(drawn[280, 260]) == (127, 127, 127)  # the eleventh


@pytest.mark.parametrize("box", [[-50.0, -50, 900, 900], [300.0, 300, 100, 100], [np.nan, 0, 10, np.inf]])
def test_arbitrary_boxes_and_names_stay_inside_picture(box):
    drawn = draw_boxes(grey(320, 320), np.array([box], np.float32), np.array([0]), found([box], [0.9], [1]), NAMES)
    assert drawn.shape == (320, 320, 3)
    for name in ("w" * 500, "two\nlines", "", "Füchsin", "犬"):
        drawn = draw_boxes(grey(320, 320), NO_BOXES, NO_LABELS, found([[200.0, 5, 310, 310]], [0.9], [0]), [name])
        assert drawn.shape == (320, 320, 3)
        assert (drawn[0:12] != 127).any()  # there is no room above the box, so the name is at the upper border
    missing, *letters = (bytes(_Pen(Image.new("RGB", (320, 320)), 1).font.getmask(sign)) for sign in "\uffffeéßłñΩЖ")
    assert missing not in letters and len(set(letters)) == len(letters)


def test_pictures_are_written_for_any_names_and_for_nothing_found(tmp_path):
    names = ["$x_{", "two\nlines", "w" * 200, "犬", "<b>"]
    annotations, found = random_evaluation(0, num_images=6)
    empty = flat(annotation_set([[]], [[]]), detections([[]], [[]], [[]]))
    for analysis in (analyse(*flat(annotations, found), 5), analyse(*empty, 5)):
        write_figures(tmp_path, analysis, names)
        assert {path.name for path in tmp_path.iterdir()} == {"pr_curves.png", "confusion.png"}
        assert all(Image.open(path).size > (400, 400) for path in tmp_path.iterdir())


def test_figures_show_the_numbers_of_the_analysis():
    box = [0.0, 0.0, 50.0, 50.0]
    annotations = annotation_set([[box], [box]], [[0], [1]])
    analysis = analyse(*flat(annotations, detections([[box], [box]], [[0.9], [0.8]], [[0], [0]])), 3)
    curves = draw_precision_recall(analysis, ["_cat", "dog", "owl"])
    legend = [text.get_text().strip() for text in curves.legends[0].get_texts()]
    assert legend == ["_cat  100.0", "dog  0.0", "all 2 classes  50.0"]
    cells = [(*text.get_position(), text.get_text()) for text in draw_confusion(analysis, list("abc")).axes[0].texts]
    assert cells == [(0, 0, "1"), (3, 1, "1")]  # column, row: the cat is found; the dog is missed at score 0.9
