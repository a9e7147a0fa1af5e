"""Prediction heads: one 3 x 3 convolution per feature map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorHead(nn.Module):
    """Predict `num_outputs` numbers for every anchor of every level. SSD section 2.1 (arXiv:1512.02325).

    Weights start as Xavier's and biases at 0, as in all new layers of SSD (section 3).

    Args:
        in_channels: channels of each feature map, [L].
        anchors_per_cell: of each level, [L].
        num_outputs: numbers for each anchor.
    """

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        convs = [
            nn.Conv2d(channels, anchors * num_outputs, kernel_size=3, padding=1)
            for channels, anchors in zip(in_channels, anchors_per_cell, strict=True)
        ]
        for conv in convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.constant_(conv.get_parameter("bias"), 0)
        self.levels = nn.ModuleList(convs)

    def forward(self, feature_maps: Sequence[Tensor]) -> Tensor:
        """Return [B, A, num_outputs] float32, in the order of `make_anchors`: level, row, column, anchor.

        feature_maps: [B, C_l, H_l, W_l] for each level.
        """
        outputs = [
            level(features).permute(0, 2, 3, 1).reshape(len(features), -1, self.num_outputs)
            for level, features in zip(self.levels, feature_maps, strict=True)
        ]
        return torch.cat(outputs, dim=1).float()  # bf16 has 8 significant bits: near 300 px it resolves only 2 px

    @torch.no_grad()
    def start_at_prior(self, prior_bias: Tensor) -> None:
        """Let every anchor start with the same logits: weights N(0, 0.01^2), RetinaNet section 4.1 (arXiv:1708.02002).

        prior_bias: [num_outputs].
        """
        for level in self.levels:
            weight, bias = level.get_parameter("weight"), level.get_parameter("bias")
            nn.init.normal_(weight, std=0.01)
            bias.copy_(prior_bias.repeat(len(bias) // self.num_outputs))
