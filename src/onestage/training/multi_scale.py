"""Multi-scale training: another input size every few steps, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torchvision.transforms.v2.functional import resize

from onestage.errors import require
from onestage.types import Batch


@dataclass(frozen=True)
class MultiScale:
    """Input sizes of training, a function of seed and optimizer step. YOLOv2, section 2 (arXiv:1612.08242).

    The loader delivers images of the largest size, so that a worker needs to know nothing and a resumed run, or any
    process of it, sees the same sizes. Evaluation keeps the loader's size.

    Args:
        sizes: longest sides of the input, px, none above the loader's. YOLO's are 320, 352, ..., 608.
        every_n_steps: optimizer steps with one size, >= 1.
    """

    sizes: Sequence[int]
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        key, sizes, steps = "model.multi_scale", list(self.sizes), self.every_n_steps
        is_valid = bool(sizes) and all(size >= 1 for size in sizes)
        require(is_valid, f"{key}.sizes", sizes, "a list of sizes >= 1, px", "YOLO's are [320, 352, ..., 608].")
        require(steps >= 1, f"{key}.every_n_steps", steps, ">= 1")

    def size_at(self, step: int, seed: int) -> int:
        """Return the size of an optimizer step (0 is the first), px."""
        block = step // self.every_n_steps
        return int(np.random.default_rng((seed, block)).choice(self.sizes))

    def canvas_at(self, size: int, canvas: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width), px, with the longest side `size` and the proportions of a canvas."""
        return max(1, round(canvas[0] * size / max(canvas))), max(1, round(canvas[1] * size / max(canvas)))

    def require_canvases(self, canvases: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return every (height, width) that the detector will see; ConfigError if the loader's images are smaller."""
        side, largest = min(map(max, canvases)), max(self.sizes)
        remedy = f"Set data.image_size: {largest} (of data.resize its own size), or leave out the larger sizes."
        require(largest <= side, "model.multi_scale.sizes", list(self.sizes), f"<= data.image_size, {side}", remedy)
        return [self.canvas_at(size, canvas) for size in self.sizes for canvas in canvases]

    def resize(self, batch: Batch, step: int, seed: int) -> Batch:
        """Return a batch whose images, boxes and placements have the size of the step."""
        canvas = (batch.images.shape[-2], batch.images.shape[-1])
        height, width = self.canvas_at(self.size_at(step, seed), canvas)
        if (height, width) == canvas:
            return batch
        images = resize(batch.images, [height, width], antialias=True)
        scales = batch.placements.new_tensor([width / canvas[1], height / canvas[0]] * 2)
        targets = batch.targets._replace(boxes=batch.targets.boxes * scales)
        return batch._replace(images=images, targets=targets, placements=batch.placements * scales)
