from evaluation_data import annotation_set, detections, flat, random_evaluation
from PIL import Image

from onestage.evaluation.analysis import analyse
from onestage.evaluation.figures import draw_confusion, draw_precision_recall, write_figures


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
    curves = draw_precision_recall(analysis, annotations.class_names)
    assert [text.get_text() for text in curves.legends[0].get_texts()] == [
        "cat  100.0",
        "dog  0.0",
        "all 2 classes  50.0",
    ]
    cells = [(*text.get_position(), text.get_text()) for text in draw_confusion(analysis, list("abc")).axes[0].texts]
    assert cells == [(0, 0, "1"), (3, 1, "1")]  # column, row: the cat is found; the dog is missed at score 0.9


def test_only_the_classes_with_the_most_objects_are_drawn():
    box = [0.0, 0.0, 50.0, 50.0]
    names = [f"class {label}" for label in range(30)]
    annotations = annotation_set([[box]] * 31, [[label] for label in [*range(30), 29]], class_names=names)
    analysis = analyse(*flat(annotations, detections([[]] * 31, [[]] * 31, [[]] * 31)), 30)
    ticks = [text.get_text() for text in draw_confusion(analysis, names).axes[0].get_yticklabels()]
    assert len(ticks) == 21 and ticks[-2:] == ["class 29", "background"]
