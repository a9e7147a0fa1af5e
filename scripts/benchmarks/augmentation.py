"""SSD's augmentation per core: torchvision's v2 transforms, and ours through albumentations.

Both start from a decoded uint8 image with its boxes and end with 300 x 300 uint8 and boxes in its pixels, in the order
of the SSD recipe: photometric distortion, zoom-out, min-IoU crop, flip, resize. The draws differ, so the results
cannot be equal; what is asserted is said in the output.
"""

import cv2
import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.timing import compare
from onestage.data.crops import IMAGENET_MEAN_RGB
from onestage.data.transforms import SeededTransform, resize_transforms, ssd_transforms

IMAGE_SIZE = 300
HEIGHT, WIDTH = 480, 640
MEAN_BOXES = 7.25

Sample = tuple[np.ndarray, np.ndarray]  # [H, W, 3] uint8, [n, 4] float32 xyxy


def run(rounds: int, quick: bool) -> None:
    """Augment the same images, on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    samples = synthetic_samples(4 if quick else 128)
    _assert_same_resize(samples)
    if not quick:
        _assert_similar_results(samples)
    contestants = {
        "torchvision v2": lambda: [_with_torchvision(TORCHVISION_SSD, sample) for sample in samples],
        "onestage": lambda: _with_onestage(samples, epoch=0),
    }
    compare(f"augmentation of {len(samples)} images of {HEIGHT} x {WIDTH}", contestants, rounds)


TORCHVISION_SSD = v2.Compose(
    [
        v2.RandomPhotometricDistort(),
        v2.RandomZoomOut(fill=list(IMAGENET_MEAN_RGB)),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(),
        v2.Resize((IMAGE_SIZE, IMAGE_SIZE), antialias=False),
        v2.SanitizeBoundingBoxes(labels_getter=None),
    ]
)
SSD = SeededTransform(ssd_transforms(IMAGE_SIZE), IMAGE_SIZE)


def synthetic_samples(count: int) -> list[Sample]:
    """Return smooth noise with boxes from 16 px to half of the image; the same on every call."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        coarse = random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
        image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        sides = random.uniform(16, 240, (1 + random.poisson(MEAN_BOXES - 1), 2))
        corners = random.uniform(0, 1, sides.shape) * ((WIDTH, HEIGHT) - sides)
        samples.append((image, np.concatenate([corners, corners + sides], axis=1).astype(np.float32)))
    return samples


def _with_torchvision(transform: v2.Transform, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    image, boxes = sample
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[:2])}
    result, target = transform(tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target)
    return result.permute(1, 2, 0).numpy(), target["boxes"].numpy()


def _with_onestage(samples: list[Sample], epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    results = (SSD(image, boxes, key=(0, epoch, index)) for index, (image, boxes) in enumerate(samples))
    return [(result.image, result.boxes) for result in results]


def _assert_same_resize(samples: list[Sample]) -> None:
    """Without randomness there is one right answer."""
    ours = SeededTransform(resize_transforms(IMAGE_SIZE), IMAGE_SIZE)
    theirs = v2.Resize((IMAGE_SIZE, IMAGE_SIZE), antialias=False)
    for sample in samples[:16]:
        image, boxes = _with_torchvision(theirs, sample)
        result = ours(*sample, key=(0, 0, 0))
        assert np.abs(image.astype(int) - result.image).max() <= 2, "resized pixels differ by more than 2 levels"
        assert np.abs(boxes - result.boxes).max() < 1e-3, "resized boxes differ"
    print("asserted: resize alone gives the same boxes within 0.001 px and the same pixels within 2 levels")


def _assert_similar_results(samples: list[Sample]) -> None:
    """Random draws differ, so over many of them the results should look alike."""
    torch.manual_seed(0)
    repeats = 8
    theirs = [_with_torchvision(TORCHVISION_SSD, sample) for _ in range(repeats) for sample in samples]
    ours = [result for epoch in range(repeats) for result in _with_onestage(samples, epoch)]
    for name, statistic in {"boxes per image": _boxes_per_image, "mean side of a box, px": _mean_side}.items():
        expected, found = statistic(theirs), statistic(ours)
        print(f"{name}: torchvision {expected:.2f}, onestage {found:.2f}")
        assert abs(found / expected - 1) < 0.25, f"{name} differ by more than a quarter"
    assert all(image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8 for image, _ in theirs + ours)
    print(f"asserted: over {len(ours)} images both within a quarter of torchvision's; all 300 x 300 uint8")


def _boxes_per_image(results: list[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.mean([len(boxes) for _, boxes in results]))


def _mean_side(results: list[tuple[np.ndarray, np.ndarray]]) -> float:
    boxes = np.concatenate([boxes for _, boxes in results])
    return float(np.mean(boxes[:, 2:] - boxes[:, :2]))
