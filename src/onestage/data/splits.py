"""Splits: stratified parts of one annotated set, and images that two splits share."""

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import combinations

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import LEAKED_COPY, SAME_SPLIT, select_images
from onestage.errors import ConfigError
from onestage.files import open_at_once, printable
from onestage.types import AnnotationSet, Finding

DEFAULT_VAL_FRACTION = 0.2  # where a source has no validation split
HEAD_BYTES = 8192  # beyond the tables that the JPEG files of one camera share
NOTHING = -1  # stands for the class of an image without objects


def split_by_fraction(annotations: AnnotationSet, val_fraction: float) -> tuple[AnnotationSet, AnnotationSet]:
    """Return a training part, and one with `val_fraction` of the images, and of each class; see `_divided`."""
    return _divided(annotations, [1 - val_fraction, val_fraction], 1, f"data.val_fraction {val_fraction:g}")


def split_by_fold(annotations: AnnotationSet, num_folds: int, fold: int) -> tuple[AnnotationSet, AnnotationSet]:
    """Return the images outside part `fold` of `num_folds`, and those in it; see `_divided`."""
    return _divided(annotations, [1 / num_folds] * num_folds, fold, f"data.fold {fold} of {num_folds}")


def assign_parts(annotations: AnnotationSet, shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the part of every image, [N] of 0..P-1, such that each part gets its share of the images of each class.

    Iterative stratification (Sechidis et al., "On the stratification of multi-label data", ECML 2011, algorithm 1):
    the rarest class first, each of its images to the part that is furthest from its share of that class; images without
    objects come last. Images of the same bytes go together. The result depends on the names and bytes of the files
    alone: not on their folder, their order, or a seed. shares: [P] fractions that add up to 1.
    """
    groups = _groups(annotations)
    labels = annotations.labels.tolist()
    classes_of_row = [set(labels[annotations.objects(row)]) or {NOTHING} for row in range(len(annotations))]
    classes_of_group = [Counter(name for row in rows for name in classes_of_row[row]) for rows in groups]
    groups_of_class: dict[int, list[int]] = defaultdict(list)
    remaining: Counter[int] = Counter()  # class -> images that have no part yet
    for group, classes in enumerate(classes_of_group):
        remaining.update(classes)
        for name in classes:
            groups_of_class[name].append(group)
    wanted = {name: [share * count for share in shares] for name, count in remaining.items()}  # images, by part
    wanted_images = [share * len(annotations) for share in shares]
    part_of_image = np.full(len(annotations), -1, dtype=np.int64)
    rarest_first = [(name == NOTHING, count, name) for name, count in remaining.items()]
    heapify(rarest_first)
    while rarest_first:
        _, count, rarest = heappop(rarest_first)
        if count != remaining[rarest]:  # an entry from before some of its images got their part
            continue
        for group in groups_of_class.pop(rarest, ()):
            rows, classes = groups[group], classes_of_group[group]
            if part_of_image[rows[0]] >= 0:
                continue
            need = wanted[rarest]
            part = max(range(len(shares)), key=lambda p: (need[p], wanted_images[p]))  # used at once
            part_of_image[rows] = part
            wanted_images[part] -= len(rows)
            for name, num_images in classes.items():
                wanted[name][part] -= num_images
                remaining[name] -= num_images
                if name != rarest:
                    heappush(rarest_first, (name == NOTHING, remaining[name], name))
    return part_of_image


def find_shared_images(splits: Sequence[tuple[str, AnnotationSet]]) -> tuple[list[Finding], set[str]]:
    """Return a finding for each image of two splits, (name, images), and their paths: the same file, or its copy.

    Only files whose length occurs in another split are read.
    """
    findings = []
    shared: set[str] = set()
    for (name, annotations), (other_name, other) in combinations(splits, 2):
        both = sorted({*annotations.image_paths.tolist()} & {*other.image_paths.tolist()})
        if both:
            problem = f"{len(both)} images are in {other_name} too, such as {printable(both[0])}"
            findings.append(SAME_SPLIT.broken(f"{annotations.source} ({name})", problem, len(both)))
        shared |= set(both)
    by_length: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, annotations in splits:
        for path in annotations.image_paths.tolist():
            if path not in shared:
                by_length[_length(path)].append((name, path))
    groups = (group for length, group in by_length.items() if length and len({name for name, _ in group}) > 1)
    owners = [owner for group in groups for owner in group]
    by_content: dict[object, list[tuple[str, str]]] = defaultdict(list)
    for owner, content in zip(owners, _contents([path for _, path in owners]), strict=True):
        by_content[content].append(owner)
    for (first_name, first), *same in by_content.values():
        copies = [(name, path) for name, path in same if name != first_name]
        for name, path in copies:
            problem = f"{name} holds a copy of {printable(first)} in {first_name}"
            findings.append(LEAKED_COPY.broken(printable(path), problem))
        shared |= {first, *(path for _, path in same)} if copies else set()
    return findings, shared


def _divided(
    annotations: AnnotationSet, shares: Sequence[float], part: int, setting: str
) -> tuple[AnnotationSet, AnnotationSet]:
    """Return all parts but one, and that part, each in the order of the whole; ConfigError if one would be empty."""
    part_of_image = assign_parts(annotations, shares)
    rows = np.flatnonzero(part_of_image != part), np.flatnonzero(part_of_image == part)
    if not len(rows[0]) or not len(rows[1]):
        raise ConfigError(
            f"{setting} of {annotations.source} leaves {len(rows[0])} images to train and {len(rows[1])} to validate "
            "on (copies stay together); each part needs at least one.\n"
            "Set data.val_fraction nearer to 0.5, or data.num_folds to fewer parts; or give more images."
        )
    train, validation = (select_images(annotations, of_part) for of_part in rows)
    train = replace(train, source=f"{annotations.source}, training part ({setting})")
    return train, replace(validation, source=f"{annotations.source}, validation part ({setting})", findings=())


def _groups(annotations: AnnotationSet) -> list[list[int]]:
    """Return the rows of one file, or of Roboflow's copies of one, in an order that looks random but is of names."""
    paths: list[str] = annotations.image_paths.tolist()
    names = [path.replace(os.sep, "/").split("/")[::-1] for path in paths]
    # The folder of the set comes last in this key, so it decides nothing, and where frames of a film are numbered the
    # digest scatters them.
    digests = [hashlib.blake2b(name[0].encode(errors="surrogateescape"), digest_size=8).digest() for name in names]
    order = sorted(range(len(paths)), key=lambda row: (digests[row], names[row]))
    groups: dict[object, list[int]] = {}
    for row, content in zip(order, _contents([paths[row] for row in order]), strict=True):
        original, is_augmented, _ = names[row][0].partition(".rf.")  # Roboflow's copies of one image
        groups.setdefault(original if is_augmented else content, []).append(row)
    return list(groups.values())


def _contents(paths: Sequence[str]) -> list[object]:
    """Return a key for each file that is equal where the bytes are.

    The first bytes are compared only of files with the same length, and all bytes only where those agree too: in a
    large set, half of the files have the length of another.
    """
    lengths = [_length(path) for path in paths]
    keys: list[object] = [length or f"missing {number}" for number, length in enumerate(lengths)]
    for num_bytes, min_length in ((HEAD_BYTES, 1), (-1, HEAD_BYTES + 1)):
        counts = Counter(keys)
        keys = [
            (key, _digest(path, num_bytes)) if length >= min_length and counts[key] > 1 else key
            for key, path, length in zip(keys, paths, lengths, strict=True)
        ]
    return keys


def _length(path: str) -> int:
    """Return the number of bytes; 0 where there is no such file, which is found out when it is opened to train."""
    with suppress(OSError, ValueError):  # ValueError: a NUL in the path
        status = os.stat(path)  # noqa: PTH116 # a Path for each of 100,000 files takes seconds
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0


def _digest(path: str, num_bytes: int) -> bytes | str:
    """Return a digest of the first bytes of a file (-1: all); its path if it cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=open_at_once) as file:
            return hashlib.blake2b(file.read(num_bytes), digest_size=16).digest()
    except OSError:
        return path
