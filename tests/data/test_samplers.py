"""The order of the images, how often an epoch shows each, and the rules that decide it."""

import logging
import math
from collections import Counter
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
from annotation_sets import annotation_set
from data_modules import yolo_data
from layout_files import write_yolo
from torch.utils.data import BatchSampler

from onestage.data import ClassBalancedSampling, DetectionDataModule, RepeatFactorSampling, Sampling
from onestage.data.samplers import EvaluationSampler, TrainingSampler, draw_copies
from onestage.errors import ConfigError, DataError

REPEATS = np.array([0.25, 1.0, 2.5, 0.75, 1.0, 3.0, 1.5])  # 10 images an epoch


class Images:
    """A data set of which only the length matters, and the images of each canvas."""

    def __init__(self, number: int, canvases: tuple[int, ...] = (0,)) -> None:
        self.number = number
        self.canvases = np.resize(canvases, number)  # of images 0, 1, 2, ...
        self.annotations = self
        self.image_ids = np.arange(number)
        self.source = "some/folder"

    def __len__(self) -> int:
        return self.number

    def rows_by_canvas(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.canvases == canvas) for canvas in np.unique(self.canvases)]


def epoch_of(num_images, batch_size, world_size=1, *, epoch=0, seed=0, repeats=None) -> list[list[tuple[int, int]]]:
    """What each process gets in an epoch."""
    shares = []
    for rank in range(world_size):
        settings = {"batch_size": batch_size, "seed": seed, "rank": rank, "world_size": world_size, "repeats": repeats}
        sampler = TrainingSampler(Images(num_images), **settings)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


@pytest.mark.parametrize("repeats", [None, REPEATS])
def test_training_order_depends_on_seed_and_epoch_only(repeats) -> None:
    orders = [epoch_of(7, 2, epoch=e, seed=s, repeats=repeats)[0] for s in range(3) for e in range(3)]
    assert len({tuple(index for _, index in order) for order in orders}) == 9
    assert epoch_of(7, 2, epoch=2, seed=1, repeats=repeats)[0] == orders[5]


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), [(23, 4, 1), (23, 4, 2), (23, 2, 3), (24, 4, 3)])
def test_training_shards_have_equal_batches_and_no_image_twice(num_images, batch_size, world_size) -> None:
    shares = epoch_of(num_images, batch_size, world_size)
    batches = num_images // (batch_size * world_size)
    assert [len(share) for share in shares] == [batches * batch_size] * world_size
    assert max(Counter(index for share in shares for _, index in share).values()) == 1


@pytest.mark.parametrize(("repeats", "num_images"), [(None, 40), (np.tile(REPEATS, 4), 28)])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_training_step_has_the_same_images_for_any_number_of_processes(world_size, repeats, num_images) -> None:
    (alone,) = epoch_of(num_images, 12, repeats=repeats)
    size = 12 // world_size
    shares = epoch_of(num_images, size, world_size, repeats=repeats)
    for step in range(3):
        together = [item for share in shares for item in share[step * size : (step + 1) * size]]
        assert sorted(together) == sorted(alone[step * 12 : (step + 1) * 12])


@pytest.mark.parametrize("repeats", [None, np.resize(REPEATS, 60)])
def test_every_step_of_all_processes_has_images_of_one_canvas(repeats) -> None:
    images, seen, orders = Images(60, canvases=(0, 0, 1)), set(), []
    for epoch in range(6):
        shares = []
        for rank in range(2):
            sampler = TrainingSampler(images, batch_size=3, seed=0, rank=rank, world_size=2, repeats=repeats)
            sampler.set_epoch(epoch)
            shares.append(np.array([item % 60 for _, item in sampler]).reshape(-1, 3))
            assert len(shares[-1]) == sampler.num_batches == sum(size // 6 for size in sampler._sizes)
        steps = images.canvases[np.concatenate(shares, axis=1)]
        assert (steps == steps[:, :1]).all()
        orders.append(tuple(steps[:, 0]))
        seen |= set(np.concatenate(shares).flat)
    assert len(set(orders)) > 1  # the canvases are mixed, differently in every epoch
    assert repeats is not None or seen == set(range(60))  # what one epoch leaves out comes in another


def test_images_of_a_canvas_with_fewer_than_a_step_takes_are_named(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = TrainingSampler(Images(12, canvases=(0, 0, 0, 1)), batch_size=2, seed=0, world_size=2)
    assert (sampler.num_batches, caplog.messages[0].partition(":")[0]) == (2, "3 images are never trained on")


def test_training_split_smaller_than_a_batch_names_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"(?s)data.batch_size is 8, .*only 7 images.*at most 7"):
        TrainingSampler(Images(7), batch_size=8, seed=0)
    with pytest.raises(ConfigError, match=r"(?s)on each of 4 processes.*only 7 images.*at most 1"):
        TrainingSampler(Images(7), batch_size=8, seed=0, world_size=4)


def test_repeated_images_come_as_often_as_asked_on_average_and_never_off_by_more_than_one() -> None:
    counts = np.zeros((400, 7))
    for epoch in range(400):
        items = [item for _, item in epoch_of(7, 2, epoch=epoch, seed=1, repeats=REPEATS)[0]]
        assert len(set(items)) == 10  # each copy has an item of its own, so it is augmented in its own way
        counts[epoch] = np.bincount([item % 7 for item in items], minlength=7)
    assert (counts >= np.floor(REPEATS)).all()
    assert (counts <= np.ceil(REPEATS)).all()
    assert counts.mean(axis=0) == pytest.approx(REPEATS, abs=0.08)  # three standard deviations of 400 coins


@pytest.mark.parametrize("fraction", [1 / 3, 0.1, 0.7])
def test_copies_add_up_whatever_rounding_does_to_the_sum(fraction) -> None:
    repeats = np.full(30_000, fraction)
    for seed in range(5):
        number = len(draw_copies(repeats, np.random.default_rng(seed)))
        assert number >= int(repeats.sum() + 1e-6)


@pytest.mark.parametrize("canvases", [(0,), (0, 2, 2, 1, 0)])  # 17, or 7 + 3 + 7 images
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("is_even", [False, True])
def test_evaluation_visits_every_image_once_in_batches_of_one_canvas(world_size, batch_size, is_even, canvases) -> None:
    images, shares, counts = Images(17, canvases), [], []
    for rank in range(world_size):
        settings = {"rank": rank, "world_size": world_size, "is_even": is_even}
        sampler = EvaluationSampler(images, batch_size=batch_size, **settings)
        assert len(sampler) == len([*sampler])
        batches = [[i for i in batch if i is not None] for batch in BatchSampler(sampler, batch_size, drop_last=False)]
        assert all(len(set(images.canvases[batch])) == 1 for batch in batches)
        counts.append(len(batches))
        shares.append([index for batch in batches for index in batch])
    lengths, seen = [*map(len, shares)], sorted(index for share in shares for index in share)
    if is_even:  # every process takes the same number of steps
        assert len(set(lengths)) == len(set(counts)) == 1
        sizes = np.bincount(images.canvases)
        assert len(seen) == len(set(seen)) == sum(sizes // world_size * world_size)
    else:
        assert seen == list(range(17))
        assert max(lengths) - min(lengths) <= 1
    assert [*EvaluationSampler(Images(7, canvases=(0, 1)), batch_size=3)] == [0, 2, 4, 6, None, None, 1, 3, 5]


def test_evaluation_of_fewer_images_than_processes_is_refused() -> None:
    with pytest.raises(DataError, match=r"(?s)some/folder has 3 images for 4 processes.*trainer.devices to at most 3"):
        EvaluationSampler(Images(3), batch_size=1, rank=0, world_size=4)
    with pytest.raises(DataError, match=r"has 2 images of one canvas for 3 processes"):
        EvaluationSampler(Images(3, canvases=(0, 0, 1)), batch_size=1, rank=0, world_size=3, is_even=True)


def test_repeat_factor_is_lvis_formula_worked_out_by_hand() -> None:
    # 16 images: class 0 on 15 of them, class 1 on one (twice, which counts once), class 2 on four, the last is empty
    images = [[0], [0, 1, 1], *[[0, 2]] * 4, *[[0]] * 9, []]
    repeats = RepeatFactorSampling(threshold=0.5).repeats(annotation_set(images))
    # f_0 = 15/16 > t: r = 1    f_1 = 1/16: sqrt(0.5 * 16) = 2.83    f_2 = 1/4: sqrt(2) = 1.41
    assert repeats.tolist() == pytest.approx([1, math.sqrt(8), *[math.sqrt(2)] * 4, *[1] * 9, 1])


def test_class_balanced_shows_every_class_equally_often() -> None:
    # class 0 on 6 images, class 1 on 2; one is empty. 8 / 2 / 6 = 2/3 and 8 / 2 / 2 = 2
    annotations = annotation_set([*[[0]] * 6, [1], [1], []])
    repeats = ClassBalancedSampling().repeats(annotations)
    assert repeats.tolist() == pytest.approx([*[2 / 3] * 6, 2, 2, 1])
    assert repeats.sum() == pytest.approx(9)  # an epoch is as long as before


def test_classes_that_do_not_occur_and_crowds_do_not_count() -> None:
    annotations = annotation_set([[0], [1], [0, 2]], num_classes=5, crowds=[3])  # the only object of class 2
    assert ClassBalancedSampling().repeats(annotations).tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert np.isfinite(RepeatFactorSampling(1.0).repeats(annotations)).all()
    expected = [math.sqrt(1.5), math.sqrt(3), math.sqrt(1.5)]
    assert RepeatFactorSampling(1.0).repeats(annotations).tolist() == pytest.approx(expected)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images with a cat, one with a dog."""
    line = "{} 0.5 0.5 0.25 0.5\n"
    write_yolo(tmp_path, {f"{n}": line.format(0) for n in range(8)} | {"rare": line.format(1)})
    return tmp_path


def data_module(root: Path, sampling: Sampling | None, batch_size: int = 4, seed: int = 0) -> DetectionDataModule:
    transforms = [A.RandomBrightnessContrast(p=1.0)]
    settings = {"image_size": 32, "num_workers": 0, "train_transforms": transforms, "seed": seed}
    return yolo_data(root, sampling=sampling, batch_size=batch_size, **settings)


def test_rare_class_is_shown_as_often_as_the_frequent_one(root) -> None:
    (batch,) = data_module(root, ClassBalancedSampling(), batch_size=9).train_dataloader()
    labels = batch.targets.labels[:, 0].tolist()
    assert abs(labels.count(0) - labels.count(1)) == 1  # 4.5 each of 9
    copies = [image for image, label in zip(batch.images, labels, strict=True) if label == 1]
    assert len({image.numpy().tobytes() for image in copies}) == len(copies)  # of one file, augmented in many ways


def test_epoch_with_sampling_is_resumed_and_another_sampling_refused(root) -> None:
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
    assert resumed.state_dict() == state
    assert [batch.images.numpy().tobytes() for batch in resumed.train_dataloader()] == whole[2:]
    for other in (RepeatFactorSampling(threshold=0.9), ClassBalancedSampling(), None):
        changed = data_module(root, other, batch_size=2)
        changed.load_state_dict(state)
        with pytest.raises(ConfigError, match=r"in an epoch was 11|data\.sampling and the like"):
            changed.train_dataloader()


def test_sampling_without_effect_is_reported(root, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        data_module(root, RepeatFactorSampling()).train_dataloader()
    assert "data.sampling has no effect" in caplog.text


class Wrong(Sampling):
    def __init__(self, values: object) -> None:
        self.values = values

    def repeats(self, annotations: object) -> np.ndarray:
        return np.array(self.values, dtype=float)


@pytest.mark.parametrize("values", [[1.0], [[1.0] * 9], [0.0] * 9, [-1.0] + [1.0] * 8, [math.nan] * 9])
def test_rule_that_gives_no_numbers_of_times_is_refused(root, values) -> None:
    with pytest.raises(ConfigError, match="repeats of Wrong must be one number >= 0 for each of the 9 images"):
        data_module(root, Wrong(values)).train_dataloader()
