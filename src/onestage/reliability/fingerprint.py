"""Short names for what a run is trained on, so that a resumed run notices other data."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from onestage.types import AnnotationSet

READ_BYTES = 2 << 30  # image files of so many bytes together are read, in seconds; of more only the sizes are compared
READ_THREADS = 8  # a disk answers several at a time; hashing lets go of the interpreter


@lru_cache(maxsize=1)  # asked for where a run is resumed and again where it starts
def fingerprints(annotations: AnnotationSet) -> dict[str, str]:
    """Return short names of the annotations and of the image files, by their keys in a checkpoint. Folders may differ.

    `data_fingerprint` covers names, boxes and labels. `image_fingerprint` covers every byte of the files, or their
    sizes where they are larger than READ_BYTES together.
    """
    paths = [Path(path) for path in annotations.image_paths.tolist()]
    return {
        "data_fingerprint": _of_annotations(annotations, paths),
        "image_fingerprint": _of_images(paths, READ_BYTES),
    }


def _of_annotations(annotations: AnnotationSet, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    digest.update("\0".join(path.name for path in paths).encode(errors="surrogateescape"))
    for array in (annotations.image_ids, annotations.box_offsets, annotations.boxes, annotations.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    for flags in (annotations.is_crowd, annotations.is_difficult):
        digest.update(np.packbits(flags).tobytes())
    digest.update(repr((annotations.class_names, annotations.category_ids)).encode())
    return digest.hexdigest()[:16]


def _of_images(paths: Sequence[Path], read_bytes: int) -> str:
    sizes = [_size(path) for path in paths]
    if sum(sizes) > read_bytes:
        return f"sizes:{hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}"
    with ThreadPoolExecutor(READ_THREADS) as pool:
        content = b"".join(pool.map(_content, paths))
    return f"bytes:{hashlib.sha256(content).hexdigest()[:16]}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # what cannot be read is for the loader to tell
        return 0


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for
            return b"no file"
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"unreadable"
