"""One synthetic batch, in torchvision's form and in ours."""

import torch
from torch import Tensor

from onestage.types import PADDING, Targets

IMAGE_SIZE = 300
NUM_CLASSES = 90  # of torchvision's COCO weights, whose label 0 is the background
MAX_OBJECTS = 16


def synthetic_batch(batch_size: int, device: torch.device) -> tuple[Tensor, Targets]:
    """Return images [B, 3, 300, 300] uint8 and targets with 1 to 13 objects each, 7 on average."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)
    sides = torch.rand(batch_size, MAX_OBJECTS, 2, generator=generator) * 180 + 12
    corners = torch.rand(batch_size, MAX_OBJECTS, 2, generator=generator) * (IMAGE_SIZE - sides)
    labels = torch.randint(0, NUM_CLASSES, (batch_size, MAX_OBJECTS), generator=generator)
    counts = 1 + torch.arange(batch_size) * 5 % 13
    is_padding = torch.arange(MAX_OBJECTS) >= counts[:, None]
    boxes = torch.cat([corners, corners + sides], dim=-1).masked_fill(is_padding[..., None], 0)
    targets = Targets(boxes.to(device), labels.masked_fill(is_padding, PADDING).to(device))
    return images.to(device), targets


def as_torchvision(images: Tensor, targets: Targets) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return what torchvision's detectors take: images of 0..1, and labels from 1 on."""
    rows = [
        {"boxes": boxes[labels != PADDING], "labels": labels[labels != PADDING] + 1}
        for boxes, labels in zip(targets.boxes, targets.labels, strict=True)
    ]
    return list(images.float() / 255), rows
