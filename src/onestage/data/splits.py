"""Stratified splits of one annotated set into training and validation parts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import select_images
from onestage.errors import ConfigError
from onestage.types import AnnotationSet

HEAD_BYTES = 8192  # beyond the tables that the JPEG files of one camera share
NOTHING = -1  # stands for the class of an image without objects


def split_by_fraction(annotations: AnnotationSet, val_fraction: float) -> tuple[AnnotationSet, AnnotationSet]:
    """Return the training part and the validation part, which takes `val_fraction` of the images, and of each class.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    part_of_image = assign_parts(annotations, [1 - val_fraction, val_fraction])
    return _divided(annotations, part_of_image == 1, f"data.val_fraction {val_fraction:g}")


def split_by_fold(annotations: AnnotationSet, num_folds: int, fold: int) -> tuple[AnnotationSet, AnnotationSet]:
    """Return all parts but one, and part `fold` of `num_folds`. The parts of all folds together are the whole set.

    Raises:
        ConfigError: one of the two would be empty.
    """
    part_of_image = assign_parts(annotations, [1 / num_folds] * num_folds)
    return _divided(annotations, part_of_image == fold, f"data.fold {fold} of {num_folds}")


def assign_parts(annotations: AnnotationSet, shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return the part of every image, [N] of 0..P-1, such that each part gets its share of the images of each class.

    Iterative stratification (Sechidis et al., "On the stratification of multi-label data", ECML 2011, algorithm 1):
    the rarest class first, each of its images to the part that is furthest from its share of that class; images without
    objects come last. Images of the same bytes go together. The result depends on the names and bytes of the files
    alone: not on their folder, their order, or a seed.

    Args:
        annotations: N images.
        shares: [P] fractions that add up to 1.
    """
    groups = _groups(annotations)
    classes_of_group = [_classes(annotations, rows) for rows in groups]
    names = sorted({name for classes in classes_of_group for name in classes})
    groups_of_class = {name: [g for g, classes in enumerate(classes_of_group) if name in classes] for name in names}
    counts = {name: sum(classes.get(name, 0) for classes in classes_of_group) for name in names}
    wanted = {name: [share * counts[name] for share in shares] for name in names}  # images of the class, by part
    wanted_images = [share * len(annotations) for share in shares]
    part_of_image = np.full(len(annotations), -1, dtype=np.int64)
    remaining = dict(counts)
    while remaining:
        rarest = min(remaining, key=lambda name: (name == NOTHING, remaining[name], name))
        for group in groups_of_class[rarest]:
            rows = groups[group]
            if part_of_image[rows[0]] >= 0:
                continue
            need = wanted[rarest]
            part = max(range(len(shares)), key=lambda p: (need[p], wanted_images[p]))  # used at once
            part_of_image[rows] = part
            wanted_images[part] -= len(rows)
            for name, count in classes_of_group[group].items():
                wanted[name][part] -= count
                remaining[name] -= count
        remaining = {name: count for name, count in remaining.items() if count > 0}
    return part_of_image


def _divided(
    annotations: AnnotationSet, is_validation: npt.NDArray[np.bool_], setting: str
) -> tuple[AnnotationSet, AnnotationSet]:
    """Return the two parts, each in the order of the whole."""
    num_validation = int(np.count_nonzero(is_validation))
    if not 0 < num_validation < len(annotations):
        raise ConfigError(
            f"{setting} of {annotations.source} leaves {len(annotations) - num_validation} images to train and "
            f"{num_validation} to validate on (copies stay together); each part needs at least one.\n"
            "Set data.val_fraction nearer to 0.5, or data.num_folds to fewer parts; or give more images."
        )
    train = select_images(annotations, np.flatnonzero(~is_validation))
    validation = select_images(annotations, np.flatnonzero(is_validation))
    return (
        replace(train, source=f"{annotations.source}, training part ({setting})"),
        replace(validation, source=f"{annotations.source}, validation part ({setting})", findings=()),
    )


def _groups(annotations: AnnotationSet) -> list[list[int]]:
    """Return the rows of images that are the same file, in an order that looks random and depends on names alone."""
    paths = [Path(str(path)) for path in annotations.image_paths]
    # The folder of the set comes last in this key, so it decides nothing, and where frames of a film are numbered the
    # digest scatters them.
    digests = [hashlib.blake2b(path.name.encode(errors="surrogateescape"), digest_size=8).digest() for path in paths]
    order = sorted(range(len(paths)), key=lambda row: (digests[row], paths[row].parts[::-1]))
    groups: dict[object, list[int]] = {}
    for row, content in zip(order, _contents([paths[row] for row in order]), strict=True):
        groups.setdefault(content, []).append(row)
    return list(groups.values())


def _contents(paths: Sequence[Path]) -> list[object]:
    """Return a key for each file that is equal where the bytes are.

    Of files with the same length the first bytes are compared, and only where those agree too all of them: in a large
    set, half of the files have the length of another.
    """
    keys: list[object] = [_length(path) or f"missing {number}" for number, path in enumerate(paths)]
    for digest in (_head_digest, _digest):
        counts = Counter(keys)
        keys = [(key, digest(path)) if counts[key] > 1 else key for key, path in zip(keys, paths, strict=True)]
    return keys


def _length(path: Path) -> int:
    """Return the number of bytes; 0 where there is no such file, which is found out when it is opened to train."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _head_digest(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            return hashlib.blake2b(file.read(HEAD_BYTES), digest_size=16).digest()
    except OSError:
        return str(path)


def _digest(path: Path) -> bytes | str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return str(path)


def _classes(annotations: AnnotationSet, rows: Sequence[int]) -> dict[int, int]:
    """Return class -> number of images of a group that show it; NOTHING -> those without objects."""
    counts: dict[int, int] = {}
    for row in rows:
        for label in set(annotations.labels[annotations.objects(row)].tolist()) or {NOTHING}:
            counts[label] = counts.get(label, 0) + 1
    return counts
