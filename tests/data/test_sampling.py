import logging
import math
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import yaml
from annotation_sets import annotation_set
from data_modules import yolo_data
from jsonargparse import ArgumentParser
from yolo_files import write_yolo

from onestage.data import ClassBalancedSampling, DetectionDataModule, RepeatFactorSampling, Sampling
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
    with pytest.raises(ConfigError, match=r"data\.sampling\.threshold must be in \(0, 1\], got"):
        RepeatFactorSampling(threshold)


# In a data module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images with a cat, one with a dog."""
    line = "{} 0.5 0.5 0.25 0.5\n"
    write_yolo(tmp_path, {f"{n}": line.format(0) for n in range(8)} | {"rare": line.format(1)})
    return tmp_path


def data_module(root: Path, sampling: Sampling | None, batch_size: int = 4, seed: int = 0) -> DetectionDataModule:
    flip = [A.RandomBrightnessContrast(p=1.0)]
    settings = {"image_size": 32, "num_workers": 0, "train_transforms": flip, "seed": seed}
    return yolo_data(root, sampling=sampling, batch_size=batch_size, **settings)


def test_rare_class_is_shown_as_often_as_the_frequent_one(root: Path) -> None:
    loader = data_module(root, ClassBalancedSampling(), batch_size=9).train_dataloader()
    (batch,) = loader
    labels = batch.targets.labels[:, 0].tolist()
    assert abs(labels.count(0) - labels.count(1)) == 1  # 4.5 each of 9
    copies = [image for image, label in zip(batch.images, labels, strict=True) if label == 1]
    assert len({image.numpy().tobytes() for image in copies}) == len(copies)  # of one file, augmented in many ways


def test_epoch_with_sampling_is_resumed_and_another_sampling_refused(root: Path) -> None:
    sampling = RepeatFactorSampling(threshold=1.0)  # 8 * sqrt(9 / 8) + 3 = 11.5 images
    data = data_module(root, sampling, batch_size=2)
    loader = data.train_dataloader()
    whole = [batch.images.numpy().tobytes() for batch in loader]
    assert len(whole) == 5
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = data.state_dict()
    resumed = data_module(root, RepeatFactorSampling(threshold=1.0), batch_size=2)
    resumed.load_state_dict(state)
    assert [batch.images.numpy().tobytes() for batch in resumed.train_dataloader()] == whole[2:]
    for other in (RepeatFactorSampling(threshold=0.9), ClassBalancedSampling(), None):
        changed = data_module(root, other, batch_size=2)
        changed.load_state_dict(state)
        with pytest.raises(ConfigError, match=r"in an epoch was 11|data\.sampling and the like"):
            changed.train_dataloader()


def test_sampling_is_built_from_yaml(root: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule, "data")
    sampling = {"class_path": "onestage.data.RepeatFactorSampling", "init_args": {"threshold": 0.5}}
    config = {"path": str(root), "sampling": sampling}
    data = parser.instantiate(parser.parse_string(yaml.safe_dump({"data": config}))).data
    assert isinstance(data.sampling, RepeatFactorSampling)
    assert data.sampling.threshold == 0.5


def test_sampling_without_effect_is_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data_module(root, RepeatFactorSampling()).train_dataloader()
    assert "data.sampling has no effect" in caplog.text
    assert "Raise its threshold" in caplog.text


class Wrong(Sampling):
    def __init__(self, values: object) -> None:
        self.values = values

    def repeats(self, annotations: object) -> np.ndarray:
        return np.array(self.values, dtype=float)


@pytest.mark.parametrize("values", [[1.0], [[1.0] * 9], [0.0] * 9, [-1.0] + [1.0] * 8, [math.nan] * 9])
def test_rule_that_gives_no_numbers_of_times_is_refused(root: Path, values: object) -> None:
    with pytest.raises(ConfigError, match=r"Wrong gives repeats of shape .* for each of the 9 images"):
        data_module(root, Wrong(values)).train_dataloader()
