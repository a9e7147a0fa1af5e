import math

import numpy as np
import pytest
from annotation_sets import annotation_set

from onestage.data import ClassBalancedSampling, RepeatFactorSampling
from onestage.errors import ConfigError


def test_repeat_factor_is_lvis_formula_worked_out_by_hand() -> None:
    # 16 images: class 0 on 15 of them, class 1 on one (twice, which counts once), class 2 on four, the last is empty
    images = [[0], [0, 1, 1], *[[0, 2]] * 4, *[[0]] * 9, []]
    repeats = RepeatFactorSampling(threshold=0.5).repeats(annotation_set(images))
    # f_0 = 15/16 > t: r = 1    f_1 = 1/16: sqrt(0.5 * 16) = 2.83    f_2 = 1/4: sqrt(2) = 1.41
    assert repeats.tolist() == pytest.approx([1, math.sqrt(8), *[math.sqrt(2)] * 4, *[1] * 9, 1])


def test_repeat_factor_of_lvis_threshold_leaves_a_small_set_as_it_is() -> None:
    assert RepeatFactorSampling().repeats(annotation_set([[0], [1], [0]])).tolist() == [1, 1, 1]


def test_class_balanced_shows_every_class_equally_often() -> None:
    # class 0 on 6 images, class 1 on 2; one is empty. 8 / 2 / 6 = 2/3 and 8 / 2 / 2 = 2
    annotations = annotation_set([*[[0]] * 6, [1], [1], []])
    repeats = ClassBalancedSampling().repeats(annotations)
    assert repeats.tolist() == pytest.approx([*[2 / 3] * 6, 2, 2, 1])
    assert repeats.sum() == pytest.approx(9)  # an epoch is as long as before


def test_class_balanced_adds_up_the_classes_of_an_image() -> None:
    # N' = 3, K = 2: class 0 on images 0 and 1, class 1 on images 1 and 2: each gives 3 / 2 / 2
    repeats = ClassBalancedSampling().repeats(annotation_set([[0], [0, 1], [1]]))
    assert repeats.tolist() == pytest.approx([0.75, 1.5, 0.75])


def test_classes_that_do_not_occur_and_crowds_do_not_count() -> None:
    annotations = annotation_set([[0], [1], [0, 2]], num_classes=5, crowds=[3])  # the only object of class 2
    assert ClassBalancedSampling().repeats(annotations).tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert np.isfinite(RepeatFactorSampling(1.0).repeats(annotations)).all()
    assert RepeatFactorSampling(1.0).repeats(annotations).tolist() == pytest.approx(
        [math.sqrt(1.5), math.sqrt(3), math.sqrt(1.5)]
    )


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_repeat_factor_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.sampling\.threshold is"):
        RepeatFactorSampling(threshold)
