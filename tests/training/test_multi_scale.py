from typing import ClassVar

import pytest
import torch
from tiny_training import TinyData, TinyDetector, quiet_trainer, tiny_batch

from onestage.errors import ConfigError
from onestage.models import Darknet53, YOLOv3
from onestage.training.module import DetectionModule
from onestage.training.multi_scale import MultiScale
from onestage.training.optimization import WarmupSchedule
from onestage.training.trainer import DetectionTrainer

SIZES = MultiScale([32, 64], every_n_steps=2)


class SeededData(TinyData):
    seed = 5


class Recorder(YOLOv3):
    """A tiny YOLO that notes the size of its images."""

    sides: ClassVar[list[int]] = []

    def forward(self, images):
        self.sides.append(images.shape[-1])
        return super().forward(images)


def train(folder, max_epochs: int, checkpoint=None) -> dict[str, torch.Tensor]:
    """Two steps an epoch."""
    torch.manual_seed(0)
    detector = Recorder(2, backbone=Darknet53(2, (1, 1, 1, 1, 1)))
    schedule = WarmupSchedule(warmup_steps=0, kind="constant")
    optimizer = lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9)  # noqa: E731
    module = DetectionModule(detector, optimizer, schedule, multi_scale=MultiScale([32, 64], every_n_steps=1))
    trainer = quiet_trainer(DetectionTrainer, folder, max_epochs=max_epochs, precision="32-true")
    trainer.fit(module, datamodule=SeededData(num_images=4, batch_size=2), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.state_dict()


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


def test_stopped_run_continues_with_the_same_sizes_and_ends_with_the_same_weights(tmp_path) -> None:
    Recorder.sides.clear()
    whole = train(tmp_path, max_epochs=4)
    expected = [MultiScale([32, 64], 1).size_at(step, seed=5) for step in range(8)]
    assert Recorder.sides == expected
    assert len(set(expected)) == 2
    Recorder.sides.clear()
    train(tmp_path, max_epochs=2)
    resumed = train(tmp_path, max_epochs=4, checkpoint=tmp_path / "last.ckpt")
    assert Recorder.sides == expected
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert int(resumed["detector.images_seen"]) == 16


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
