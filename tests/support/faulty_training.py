"""Detector with faults at given steps. As a program: train two processes, one of which fails."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from annotation_sets import hand_written
from torch import nn
from torch.utils.data import DataLoader

from onestage.reliability.non_finite import NonFiniteGuard
from onestage.training.module import DetectionModule
from onestage.training.optimization import WarmupSchedule
from onestage.training.trainer import DetectionTrainer
from onestage.types import Batch, Detector, Losses, Predictions, Targets

NUM_IMAGES = 24
BATCH_SIZE = 2


class FaultyDetector(Detector):
    """Four anchors on 8 x 8 px behind a batch norm. `faults`: call of `loss`, from 0 -> fault."""

    image_size = 8
    num_classes = 1

    def __init__(self, faults: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.faults = dict(faults or {})
        self.num_calls = 0
        self.conv = nn.Conv2d(3, 4, kernel_size=4, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.class_head = nn.Linear(4, 1)
        self.box_head = nn.Linear(4, 4)
        self.register_buffer("running_loss", torch.zeros(()))  # a state that the forward pass changes

    def forward(self, images):
        features = self.norm(self.conv(images.float() / 255)).flatten(2).transpose(1, 2)  # [B, 4 anchors, 4]
        return Predictions(self.class_head(features).float(), self.box_head(features).float(), anchors=None)

    def loss(self, predictions, targets):
        fault = self.faults.get(self.num_calls, "")
        self.num_calls += 1
        logits, deltas = predictions.class_logits, predictions.box_outputs
        if fault == "inf gradient":
            logits.register_hook(lambda gradient: gradient * torch.inf)
        classification = F.softplus(logits).mean()
        if fault == "nan loss":
            classification = classification * torch.nan
        if fault == "inf loss, finite gradient":
            classification = classification + torch.inf
        if fault == "nan weights":
            with torch.no_grad():
                self.box_head.bias[0] = torch.nan
        self.running_loss.mul_(0.9).add_(0.1 * classification.detach())
        return Losses({"classification": classification, "box": deltas.square().mean()}, torch.tensor(1))

    def detect(self, predictions, content_sizes=None):
        raise NotImplementedError


class TinyData(pl.LightningDataModule):
    """Batches of two images of noise. Image i has the id 100 + i and one box of 2 + i / 10 by 3 px."""

    image_size = 8
    canvases = ((8, 8),)
    num_classes = 1
    class_names: ClassVar = ["thing"]
    category_ids: ClassVar = [1]

    def annotations(self, stage):
        ids, sizes = np.arange(100, 100 + NUM_IMAGES), np.full((NUM_IMAGES, 2), 8, np.int32)
        return hand_written([[]] * NUM_IMAGES, [], image_ids=ids, sizes=sizes, class_names=["thing"])

    def train_dataloader(self):
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        parts = torch.arange(NUM_IMAGES).split(BATCH_SIZE)[rank::world_size]
        return DataLoader([tiny_batch(part) for part in parts], batch_size=None)


def tiny_batch(indices: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(int(indices[0]))
    images = torch.randint(0, 256, (len(indices), 3, 8, 8), generator=generator, dtype=torch.uint8)
    boxes = torch.zeros(len(indices), 16, 4)
    boxes[:, 0, 2], boxes[:, 0, 3] = 2 + indices / 10, 3.0
    labels = torch.full((len(indices), 16), -1)
    labels[:, 0] = 0
    sizes, placements = torch.full((len(indices), 2), 8), torch.tensor([[1.0, 1.0, 0.0, 0.0]] * len(indices))
    return Batch(images, Targets(boxes, labels), indices, sizes, placements)


def train(
    folder: Path, faults: Mapping[int, str] | None = None, num_steps: int = 4, guard: NonFiniteGuard | None = None,
    callbacks: tuple[pl.Callback, ...] = (), detector: FaultyDetector | None = None, is_fused: bool = False, **settings,
) -> DetectionModule:  # fmt: skip
    """Train for a few steps with SGD and momentum; the trainer is the module's."""
    torch.manual_seed(0)
    module = DetectionModule(
        detector or FaultyDetector(faults),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, fused=is_fused),
        schedule=WarmupSchedule(kind="constant", warmup_steps=0),
    )
    defaults = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    all_settings = {**defaults, **quiet, "max_steps": num_steps, "default_root_dir": folder, **settings}
    trainer = DetectionTrainer(callbacks=[guard or NonFiniteGuard(), *callbacks], **all_settings)
    trainer.fit(module, datamodule=TinyData())
    return module


class FailsInSecondProcess(FaultyDetector):
    """A NaN loss with finite gradients in one of two processes."""

    def loss(self, predictions, targets):
        losses = super().loss(predictions, targets)
        if self.num_calls == 2 and torch.distributed.get_rank() == 1:
            losses.terms["box"] = losses.terms["box"] + torch.tensor(torch.nan)  # a constant: gradients stay finite
        return losses


if __name__ == "__main__":
    own_guard = NonFiniteGuard()
    settings = {"precision": sys.argv[2], "devices": 2, "strategy": "ddp", "num_steps": 3}
    trained = train(Path(sys.argv[1]), detector=FailsInSecondProcess(), guard=own_guard, **settings)
    state = {"skipped": own_guard.num_skipped, "weights": trained.state_dict()}
    torch.save(state, Path(sys.argv[1]) / f"process_{trained.trainer.global_rank}.pt")
