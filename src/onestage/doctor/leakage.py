"""Images in two splits: the same file, an exact copy, or a near copy."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.annotations import LEAKED_LIKENESS
from onestage.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, REMEDY
from onestage.data.splits import find_shared_images
from onestage.errors import ImageError
from onestage.files import printable, read_file
from onestage.types import AnnotationSet, Finding

HASH_SIDE = 16  # of a difference hash of 16 x 16 bits
MAX_BITS = 24  # that differ between near copies; two photographs differ in about 128
BLOCK_ROWS = 512  # hashes of one split that are compared at once with all of another
THUMBNAIL_SIDE = 32  # px; candidates are compared by these
MIN_CORRELATION = 0.98  # of thumbnails; a picture saved again gives 0.99 and more
MIN_CONTRAST = 2.0  # standard deviation of gray values in 0..255; a blank page resembles every other one
NUM_THREADS = 8


class Picture(NamedTuple):
    """An image reduced to what is compared."""

    split: str
    path: str
    signs: npt.NDArray[np.int8]  # [256] difference hash: +1 where the right neighbour is brighter, else -1
    thumbnail: npt.NDArray[np.uint8]  # [32 * 32] gray


def find_leakage(splits: Sequence[tuple[str, AnnotationSet]], near_copies: bool = True) -> list[Finding]:
    """Compare the images of all splits, (name, images), with each other.

    near_copies: also decode the images and compare what they show, some milliseconds per image.
    """
    if len(splits) < 2:
        return []
    findings, shared = find_shared_images(splits)
    if not near_copies:
        return findings
    owners = [(name, path) for name, annotations in splits for path in annotations.image_paths.tolist()]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        reduced = pool.map(_reduce_image, [owner for owner in owners if owner[1] not in shared])
        pictures = [picture for picture in reduced if picture is not None]
    for first, second in _similar_pairs(pictures):
        correlation = float(np.corrcoef(first.thumbnail, second.thumbnail)[0, 1])
        if correlation >= MIN_CORRELATION:
            problem = f"{second.split} holds nearly the same image as {printable(first.path)} in {first.split}"
            problem += f" (correlation {correlation:.3f})"
            findings.append(LEAKED_LIKENESS.broken(printable(second.path), problem))
    return findings


def _reduce_image(owner: tuple[str, str]) -> Picture | None:
    """Decode an image in gray at an eighth of its size; None if it cannot be decoded or is blank."""
    try:
        content = read_file(Path(owner[1]), ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)
        flags = cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags)
        if image is None or image.size > MAX_PIXELS:
            return None
        grid = cv2.resize(image, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
        thumbnail = cv2.resize(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    except (cv2.error, ImageError):  # which another check reports
        return None
    if thumbnail.std() < MIN_CONTRAST:
        return None
    signs = np.where(grid[:, 1:] > grid[:, :-1], 1, -1).astype(np.int8)
    return Picture(*owner, signs.reshape(-1), np.asarray(thumbnail, dtype=np.uint8).reshape(-1))


def _similar_pairs(pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Picture]]:
    """Yield the pairs of different splits whose hashes differ in few bits.

    The product of two hashes of +-1 is their number of bits less twice the number of different bits.
    """
    names = list(dict.fromkeys(picture.split for picture in pictures))
    for group, other in combinations([[p for p in pictures if p.split == name] for name in names], 2):
        signs = np.array([picture.signs for picture in other], dtype=np.float32)
        for start in range(0, len(group), BLOCK_ROWS):
            block = np.array([picture.signs for picture in group[start : start + BLOCK_ROWS]], dtype=np.float32)
            for row, column in np.argwhere(block @ signs.T >= HASH_SIDE**2 - 2 * MAX_BITS).tolist():
                yield group[start + row], other[column]
