import pytest
import torch
from tiny_training import TinyData, TinyDetector, quiet_trainer, tiny_batch

from onestage.errors import ConfigError
from onestage.models import Darknet53, YOLOv3
from onestage.training.module import DetectionModule
from onestage.training.multi_scale import MultiScale
from onestage.training.trainer import DetectionTrainer

SIZES = MultiScale([32, 64], every_n_steps=2)


class SeededData(TinyData):
    seed = 5


def test_size_is_a_function_of_seed_and_step_and_changes_every_few_steps() -> None:
    sizes = [SIZES.size_at(step, seed=1) for step in range(200)]
    assert sizes[::2] == sizes[1::2]
    assert set(sizes) == {32, 64}
    assert sizes == [SIZES.size_at(step, seed=1) for step in range(200)]
    assert sizes != [SIZES.size_at(step, seed=2) for step in range(200)]


def test_images_boxes_and_placements_shrink_together() -> None:
    batch = tiny_batch([0, 1])
    half = MultiScale([32]).resize(batch, step=0, seed=0)
    assert half.images.shape == (2, 3, 32, 32)
    assert half.images.dtype == torch.uint8
    assert torch.equal(half.targets.boxes, batch.targets.boxes / 2)
    assert half.placements.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 2
    assert MultiScale([64]).resize(batch, step=0, seed=0) is batch
    means = batch.images[0].float().mean(dim=(1, 2)), half.images[0].float().mean(dim=(1, 2))
    assert torch.allclose(*means, atol=1.0)
    assert MultiScale([32]).canvas_at(32, (48, 64)) == (24, 32)


def test_every_step_of_a_training_has_its_size(tmp_path) -> None:
    """Also after a stop: reliability/test_exact_resume.py."""
    sides = []

    class Recorder(YOLOv3):
        def forward(self, images):
            sides.append(images.shape[-1])
            return super().forward(images)

    scales = MultiScale([32, 64], every_n_steps=1)
    module = DetectionModule(Recorder(2, backbone=Darknet53(2, (1, 1, 1, 1, 1))), multi_scale=scales)
    quiet_trainer(DetectionTrainer, tmp_path, max_steps=8).fit(module, datamodule=SeededData(4, 2))
    assert sides == [scales.size_at(step, seed=5) for step in range(8)]
    assert set(sides) == {32, 64}


@pytest.mark.parametrize(
    ("detector", "sizes", "message"),
    [
        (TinyDetector(2), [32], r"must be \(64, 64\), got \(32, 32\)"),
        (YOLOv3(2, backbone=Darknet53(2, (0, 0, 0, 0, 0))), [32, 40], r"must be multiples of 32, got \(40, 40\)"),
        (YOLOv3(2, backbone=Darknet53(2, (0, 0, 0, 0, 0))), [96], r"sizes must be <= data.image_size, 64.*\n.*: 96"),
    ],
)
def test_size_that_detector_or_data_do_not_have_is_refused_before_training(detector, sizes, message, tmp_path) -> None:
    module = DetectionModule(detector, multi_scale=MultiScale(sizes))
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(DetectionTrainer, tmp_path, max_steps=1).fit(module, datamodule=SeededData(2, 1))
