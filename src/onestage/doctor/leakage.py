"""Finds images that stand in two splits: as the same file, as an exact copy, or as a near copy."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from onestage.data.annotations import LEAKED_COPY, LEAKED_LIKENESS, SAME_SPLIT
from onestage.data.images import MAX_IMAGE_BYTES, MAX_PIXELS, REMEDY
from onestage.errors import ImageError
from onestage.files import printable, read_file
from onestage.types import AnnotationSet, Finding

HASH_SIDE = 16  # a difference hash of 16 x 16 bits
MAX_BITS = 24  # of 256 that may differ between near copies; two photographs differ in about 128
ROWS_AT_ONCE = 512  # of one split, against all of the other
THUMBNAIL_SIDE = 32  # px; candidates are compared by these
MIN_CORRELATION = 0.98  # of the thumbnails: the same picture saved again gives 0.99 and more
MIN_CONTRAST = 2.0  # standard deviation of the gray values 0..255
NUM_THREADS = 8


class Picture(NamedTuple):
    """One image, small."""

    split: str
    path: str
    signs: npt.NDArray[np.int8]  # [256] difference hash: +1 where the right neighbour is brighter, else -1
    thumbnail: npt.NDArray[np.uint8]  # [32 * 32] gray


def find_leakage(splits: Sequence[tuple[str, AnnotationSet]], near_copies: bool = True) -> list[Finding]:
    """Compare the images of all splits with each other.

    Args:
        splits: name and images of each.
        near_copies: whether to decode the images and look for near copies too; some milliseconds each.
    """
    if len(splits) < 2:
        return []
    owners = [(name, str(path)) for name, annotations in splits for path in annotations.image_paths]
    findings, shared = same_files(splits)
    copies, copied = _exact_copies([owner for owner in owners if owner[1] not in shared])
    findings += copies
    if near_copies:
        findings += _near_copies([owner for owner in owners if owner[1] not in shared | copied])
    return findings


def same_files(splits: Sequence[tuple[str, AnnotationSet]]) -> tuple[list[Finding], set[str]]:
    """Return a finding for each pair of splits that name the same files, and those files."""
    findings = []
    shared: set[str] = set()
    for number, (name, annotations) in enumerate(splits):
        for other_name, other in splits[number + 1 :]:
            both = sorted({*map(str, annotations.image_paths)} & {*map(str, other.image_paths)})
            if both:
                problem = f"{len(both)} images are in {other_name} too, such as {printable(both[0])}"
                findings.append(SAME_SPLIT.broken(f"{annotations.source} ({name})", problem, len(both)))
            shared |= set(both)
    return findings, shared


def _exact_copies(owners: Sequence[tuple[str, str]]) -> tuple[list[Finding], set[str]]:
    """Return a finding for each file of which another split has a copy, and the copies."""
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for owner in owners:
        try:
            by_size[Path(owner[1]).stat().st_size].append(owner)
        except OSError:
            continue
    by_digest: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for same_size in by_size.values():
        if len({name for name, _ in same_size}) > 1:
            for owner in same_size:
                content = _content(owner[1])
                if content:
                    by_digest[hashlib.sha256(content).digest()].append(owner)
    findings = []
    copies: set[str] = set()
    for same in by_digest.values():
        first_name, first = same[0]
        others = [(name, path) for name, path in same[1:] if name != first_name]
        for name, path in others:
            problem = f"{name} holds a copy of {printable(first)} in {first_name}"
            findings.append(LEAKED_COPY.broken(printable(path), problem))
        copies |= {path for _, path in same} if others else set()
    return findings, copies


def _near_copies(owners: Sequence[tuple[str, str]]) -> list[Finding]:
    """Return a finding for each pair of near copies in different splits."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        pictures = [picture for picture in pool.map(_picture, owners, chunksize=64) if picture is not None]
    found = []
    for first, second in _alike(pictures):
        likeness = float(np.corrcoef(first.thumbnail, second.thumbnail)[0, 1])
        if likeness >= MIN_CORRELATION:
            problem = f"{second.split} holds much the same image as {printable(first.path)} in {first.split}"
            found.append(LEAKED_LIKENESS.broken(printable(second.path), f"{problem} (correlation {likeness:.3f})"))
    return found


def _picture(owner: tuple[str, str]) -> Picture | None:
    """Decode an image at an eighth of its size, in gray, and take its hash; None for what is no picture."""
    name, path = owner
    content = np.frombuffer(_content(path), dtype=np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None or image.size > MAX_PIXELS:
            return None
        grid = cv2.resize(image, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.int16)
        thumbnail = cv2.resize(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    except cv2.error:
        return None
    if thumbnail.std() < MIN_CONTRAST:
        return None  # a blank page is like any other
    signs = np.where(grid[:, 1:] > grid[:, :-1], 1, -1).astype(np.int8)
    return Picture(name, path, signs.reshape(-1), np.asarray(thumbnail, dtype=np.uint8).reshape(-1))


def _alike(pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Picture]]:
    """Yield the pairs of different splits whose hashes differ in few bits.

    The product of two hashes of +-1 is their number of bits less twice the bits that differ.
    """
    names = list(dict.fromkeys(picture.split for picture in pictures))
    groups = [[picture for picture in pictures if picture.split == name] for name in names]
    signs = [np.array([picture.signs for picture in group], dtype=np.float32) for group in groups]
    for number, group in enumerate(groups):
        for other in range(number + 1, len(groups)):
            for start in range(0, len(group), ROWS_AT_ONCE):
                products = signs[number][start : start + ROWS_AT_ONCE] @ signs[other].T
                for row, column in np.argwhere(products >= HASH_SIDE**2 - 2 * MAX_BITS).tolist():
                    yield group[start + row], groups[other][column]


def _content(path: str) -> bytes:
    """Return the bytes of an image; none where it cannot be read, which is a finding of another check."""
    try:
        return read_file(Path(path), ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)
    except ImageError:
        return b""
