"""Backbones: images to feature maps, with the normalisation that belongs to their weights."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

Pixel = tuple[float, float, float]


class Backbone(nn.Module, ABC):
    """Network from uint8 images to feature maps. It owns the normalisation, because its published weights decide it.

    Args:
        out_channels: channels of each feature map, finest first.
        strides: of each feature map, px.
        pixel_mean: subtracted from the RGB channels of 0..255.
        pixel_std: divides them afterwards.
    """

    def __init__(
        self, out_channels: tuple[int, ...], strides: tuple[int, ...], pixel_mean: Pixel, pixel_std: Pixel
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.strides = strides
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    pixel_mean: Tensor  # [3, 1, 1]
    pixel_std: Tensor  # [3, 1, 1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps [B, C_l, H_l, W_l], finest first. images: [B, 3, H, W] uint8 RGB."""
        return self.features(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: [B, 3, H, W] of 0..255 to float32 around 0."""
        return (images.float() - self.pixel_mean) / self.pixel_std

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of normalised images [B, 3, H, W] float."""
