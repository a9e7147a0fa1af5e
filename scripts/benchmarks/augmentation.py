"""SSD's augmentation per core: torchvision's v2 transforms, and ours; from decoded images, and from JPEG files.

All end with 300 x 300 uint8 and boxes in its pixels, by the SSD recipe: photometric distortion, zoom-out, min-IoU crop,
flip, resize. Ours draws the resize's interpolation from five, as the Caffe code does, of which two take ten times as
long as the bilinear one of the others. The draws differ, so the results cannot be equal; what is asserted is said in
the output.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks.image_files import read_samples, write_images
from benchmarks.timing import compare
from onestage.data.augmentation import SSDAugmentation, SSDMinIoUCrop, SSDPhotometricDistort, SSDZoomOut
from onestage.data.cache import DiskCache, FileReader
from onestage.data.resize import MEAN_RGB, Stretch
from onestage.data.source import ImageReader
from onestage.data.transforms import SeededTransform, ssd_transforms
from onestage.types import AnnotationSet

IMAGE_SIZE = 300
SHORT_SIDE = 400  # of cached copies, 4/3 of the network's input

Sample = tuple[np.ndarray, np.ndarray]  # [H, W, 3] uint8, [n, 4] float32 xyxy


def run(rounds: int, quick: bool, images: Path | None = None) -> None:
    """Augment the same images, on one thread. images: a folder of JPEG files instead of the drawn ones."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        annotations = write_images(Path(folder) / "images", 4 if quick else 128, images)
        samples = read_samples(annotations)
        _assert_same_resize(samples)
        if not quick:
            _assert_similar_results(samples)
        print(_described(annotations, samples))
        title = f"augmentation of {len(samples)} decoded images, CPU time"
        compare(title, _from_pixels(samples), rounds, clock=time.process_time)
        contestants = _from_files(annotations, samples, Path(folder) / "cache")
        title = f"decoding and augmentation of {len(samples)} JPEG files, CPU time"
        compare(title, contestants, rounds, clock=time.process_time)


def torchvision_ssd(*, photometric_last: bool = False) -> v2.Compose:
    """Return the recipe of torchvision's reference training, with the resize that its model does on floats."""
    photometric = v2.RandomPhotometricDistort()
    geometry = [
        v2.RandomZoomOut(fill=list(MEAN_RGB)),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(),
        v2.Resize((IMAGE_SIZE, IMAGE_SIZE), antialias=False),
    ]
    order = [*geometry, photometric] if photometric_last else [photometric, *geometry]
    return v2.Compose([*order, v2.SanitizeBoundingBoxes(labels_getter=None)])


STEP_BY_STEP = [SSDPhotometricDistort(), SSDZoomOut(), SSDMinIoUCrop(), A.HorizontalFlip(p=0.5)]
SSD = SeededTransform(ssd_transforms(Stretch(IMAGE_SIZE)), Stretch(IMAGE_SIZE))


def _from_pixels(samples: list[Sample]) -> dict[str, Callable[[], object]]:
    reference, last = torchvision_ssd(), torchvision_ssd(photometric_last=True)
    first = SeededTransform([SSDAugmentation(IMAGE_SIZE, distort_first=True)], Stretch(IMAGE_SIZE))
    steps = SeededTransform(STEP_BY_STEP, Stretch(IMAGE_SIZE))
    return {
        "torchvision v2": lambda: [_with_torchvision(reference, *sample) for sample in samples],
        "torchvision v2, photometric last": lambda: [_with_torchvision(last, *sample) for sample in samples],
        "onestage": lambda: _with_onestage(SSD, samples),
        "onestage, photometric first": lambda: _with_onestage(first, samples),
        "onestage, step by step, bilinear": lambda: _with_onestage(steps, samples),
    }


def _from_files(annotations: AnnotationSet, samples: list[Sample], folder: Path) -> dict[str, Callable[[], object]]:
    reference = torchvision_ssd()
    paths, boxes = annotations.image_paths.tolist(), [sample[1] for sample in samples]

    def from_pillow() -> None:
        for path, given in zip(paths, boxes, strict=True):
            pixels = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
            _augment_with_torchvision(reference, pixels, given)

    def from_torchvision() -> None:
        for path, given in zip(paths, boxes, strict=True):
            _augment_with_torchvision(reference, decode_image(path, mode="RGB"), given)

    def from_reader(reader: ImageReader) -> Callable[[], object]:
        def read_and_augment() -> None:
            for index, given in enumerate(boxes):
                image = reader(index)
                scale = image.pixels.shape[0] / image.original_size[0]
                SSD(image.pixels, given * np.float32(scale), key=(0, 0, index))

        return read_and_augment

    return {
        "torchvision v2, Pillow": from_pillow,
        "torchvision v2, torchvision.io": from_torchvision,
        "onestage": from_reader(FileReader(annotations)),
        "onestage, data.cache: disk": from_reader(DiskCache(annotations, SHORT_SIDE, folder)),
    }


def _with_torchvision(transform: v2.Transform, image: np.ndarray, boxes: np.ndarray) -> Sample:
    result, new_boxes = _augment_with_torchvision(transform, torch.from_numpy(image).permute(2, 0, 1), boxes)
    return result.permute(1, 2, 0).numpy(), new_boxes.numpy()


def _augment_with_torchvision(
    transform: v2.Transform, pixels: torch.Tensor, boxes: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    size = tuple(pixels.shape[-2:])
    target = {"boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size)}
    result, target = transform(tv_tensors.Image(pixels), target)
    return result, target["boxes"]


def _with_onestage(transform: SeededTransform, samples: list[Sample], epoch: int = 0) -> list[Sample]:
    results = (transform(image, boxes, key=(0, epoch, index)) for index, (image, boxes) in enumerate(samples))
    return [(result.image, result.boxes) for result in results]


def _described(annotations: AnnotationSet, samples: list[Sample]) -> str:
    lengths = [Path(path).stat().st_size for path in annotations.image_paths.tolist()]
    pixels = [image.shape[0] * image.shape[1] for image, _ in samples]
    boxes = len(annotations.boxes) / len(annotations)
    return f"mean image: {np.mean(pixels) / 1e6:.2f} million pixels, {np.mean(lengths) / 1e3:.0f} kB, {boxes:.1f} boxes"


def _assert_same_resize(samples: list[Sample]) -> None:
    """Without randomness there is one right answer."""
    ours = SeededTransform([], Stretch(IMAGE_SIZE))
    theirs = v2.Resize((IMAGE_SIZE, IMAGE_SIZE), antialias=False)
    for sample in samples[:16]:
        image, boxes = _with_torchvision(theirs, *sample)
        result = ours(*sample, key=(0, 0, 0))
        assert np.abs(image.astype(int) - result.image).max() <= 2, "resized pixels differ by more than 2 levels"
        assert np.abs(boxes - result.boxes).max() < 1e-3, "resized boxes differ"
    print("asserted: resize alone gives the same boxes within 0.001 px and the same pixels within 2 levels")


def _assert_similar_results(samples: list[Sample]) -> None:
    """Random draws differ, so over many of them the results should look alike."""
    torch.manual_seed(0)
    repeats = 8
    reference = torchvision_ssd()
    theirs = [_with_torchvision(reference, *sample) for _ in range(repeats) for sample in samples]
    ours = [result for epoch in range(repeats) for result in _with_onestage(SSD, samples, epoch)]
    for name, statistic in {"boxes per image": _boxes_per_image, "mean side of a box, px": _mean_side}.items():
        expected, found = statistic(theirs), statistic(ours)
        print(f"{name}: torchvision {expected:.2f}, onestage {found:.2f}")
        assert abs(found / expected - 1) < 0.25, f"{name} differ by more than a quarter"
    assert all(image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8 for image, _ in theirs + ours)
    print(f"asserted: over {len(ours)} images both within a quarter of torchvision's; all 300 x 300 uint8")


def _boxes_per_image(results: list[Sample]) -> float:
    return float(np.mean([len(boxes) for _, boxes in results]))


def _mean_side(results: list[Sample]) -> float:
    boxes = np.concatenate([boxes for _, boxes in results])
    return float(np.mean(boxes[:, 2:] - boxes[:, :2]))
