"""Tiny detector and data module: a few training steps take a tenth of a second."""

from typing import ClassVar

import lightning.pytorch as pl
import torch
from annotation_sets import hand_written
from torch.utils.data import DataLoader

from onestage.models.heads import ExtraLayer
from onestage.models.ssd import SSD, ssd_levels
from onestage.models.vgg import VGG
from onestage.training.optimization import WarmupSchedule
from onestage.types import Batch, Targets

CONSTANT = WarmupSchedule(kind="constant", warmup_steps=0)
LEVELS = ssd_levels((8, 16, 32), (12, 20, 36, 56))


class TinyDetector(SSD):
    """480 anchors on 64 x 64 px, 10,000 weights, no batch norm."""

    image_size = 64
    anchor_tables: ClassVar = {"voc": LEVELS, "coco": LEVELS}
    extra_layers: ClassVar = (ExtraLayer(8, 16),)
    batch_norm: ClassVar = False

    def make_backbone(self) -> VGG:
        return VGG((1, 1, 1, 1, 1), (8, 8, 8, 16, 16), fc_width=16, fc6_dilation=1, batch_norm=self.batch_norm)


class TinyDetectorWithBatchNorm(TinyDetector):
    batch_norm = True


def tiny_batch(indices: list[int]) -> Batch:
    """Return noise images with one bright rectangle each; the index decides its place and label."""
    images = torch.stack([_noise(index) for index in indices])
    boxes = torch.zeros(len(indices), 16, 4)
    labels = torch.full((len(indices), 16), -1)
    for row, index in enumerate(indices):
        x, y = 4 * (index % 7) + 4, 4 * (index // 7 % 7) + 4
        images[row, index % 3, y : y + 24, x : x + 20] = 255
        boxes[row, 0] = torch.tensor([x, y, x + 20, y + 24])
        labels[row, 0] = index % 2
    sizes, placements = torch.full((len(indices), 2), 64), torch.tensor([[1.0, 1.0, 0.0, 0.0]] * len(indices))
    return Batch(images, Targets(boxes, labels), torch.tensor(indices), sizes, placements)


def _noise(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 60, (3, 64, 64), generator=generator, dtype=torch.uint8)


class TinyData(pl.LightningDataModule):
    """`num_images` training images in fixed order, already batched."""

    image_size = 64
    canvases = ((64, 64),)
    num_classes = 2
    class_names: ClassVar = ["even", "odd"]
    category_ids: ClassVar = [1, 2]

    def __init__(self, num_images: int, batch_size: int) -> None:
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        batches = [tiny_batch(part.tolist()) for part in torch.arange(self.num_images).split(self.batch_size)]
        return DataLoader(batches, batch_size=None)


class CrowdedData(TinyData):
    """20 objects in the most crowded image."""

    def annotations(self, stage):
        labels = [[0], [0] * 20, *[[0]] * (self.num_images - 2)]
        return hand_written(labels, [[[0, 0, 9, 9]] * len(image) for image in labels])


def quiet_trainer(trainer_class: type[pl.Trainer], folder: object, **settings: object) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "precision": "32-true"}
    defaults = {"accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    return trainer_class(default_root_dir=folder, **{**quiet, **defaults, **settings})
