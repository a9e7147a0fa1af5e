"""From network-input pixels back to original pixels."""

from torch import Tensor


def to_original(boxes: Tensor, placements: Tensor, original_sizes: Tensor) -> Tensor:
    """Undo the resize: (box - offset) / scale, clipped to the original image.

    Args:
        boxes: [B, D, 4] xyxy in network-input pixels.
        placements: [B, 4] (scale_x, scale_y, left, top) of `Batch`.
        original_sizes: [B, 2] (height, width) of each image as decoded, px.

    Returns:
        [B, D, 4] xyxy in original pixels.
    """
    placements = placements.to(boxes.dtype)
    scales, offsets = placements[:, :2].repeat(1, 2), placements[:, 2:].repeat(1, 2)  # [B, 4] (x, y, x, y)
    original = (boxes - offsets[:, None]) / scales[:, None]
    limits = original_sizes.flip(-1).to(boxes.dtype).repeat(1, 2)[:, None]  # [B, 1, 4]
    return original.clamp(min=0).minimum(limits)
