"""Detector with faults at given steps. As a program: train two processes, one of which fails."""

import sys
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from annotation_sets import hand_written
from tiny_training import CONSTANT, TinyData, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from onestage.reliability.non_finite import NonFiniteGuard
from onestage.training.module import DetectionModule
from onestage.training.trainer import DetectionTrainer
from onestage.types import Detector, Losses, Predictions

NUM_IMAGES = 24
BATCH_SIZE = 2


class FaultyDetector(Detector):
    """Four anchors on 64 x 64 px behind a batch norm. `faults`: call of `loss`, from 0 -> fault."""

    image_size = 64
    num_classes = 2

    def __init__(self, faults: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.faults = dict(faults or {})
        self.num_calls = 0
        self.conv = nn.Conv2d(3, 4, kernel_size=32, stride=32)
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


class SharedData(TinyData):
    """Batches of two images, shared among the processes. Image i has the id 100 + i."""

    def annotations(self, stage):
        ids, sizes = np.arange(100, 100 + NUM_IMAGES), np.full((NUM_IMAGES, 2), 64, np.int32)
        return hand_written([[]] * NUM_IMAGES, [], image_ids=ids, sizes=sizes, class_names=self.class_names)

    def train_dataloader(self):
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = list(super().train_dataloader())
        return DataLoader(batches[rank::world_size], batch_size=None)


def train(
    folder: Path, faults: Mapping[int, str] | None = None, num_steps: int = 4, guard: NonFiniteGuard | None = None,
    callbacks: tuple[pl.Callback, ...] = (), detector: FaultyDetector | None = None, is_fused: bool = False, **settings,
) -> DetectionModule:  # fmt: skip
    """Train for a few steps with SGD and momentum; the trainer is the module's."""
    torch.manual_seed(0)
    module = DetectionModule(
        detector or FaultyDetector(faults),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, fused=is_fused),
        schedule=CONSTANT,
    )
    callbacks = (guard or NonFiniteGuard(), *callbacks)
    trainer = quiet_trainer(DetectionTrainer, folder, callbacks=[*callbacks], max_steps=num_steps, **settings)
    trainer.fit(module, datamodule=SharedData(NUM_IMAGES, BATCH_SIZE))
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
