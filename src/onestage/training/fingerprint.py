"""A short name for what a run is trained on, so that a resumed run notices other data."""

import hashlib
from pathlib import Path

import numpy as np

from onestage.types import AnnotationSet


def fingerprint(annotations: AnnotationSet) -> str:
    """Hash the names of the images, the boxes and the labels. Folders may differ, and pixels are not read."""
    digest = hashlib.sha256()
    digest.update("\0".join(Path(str(path)).name for path in annotations.image_paths).encode(errors="surrogateescape"))
    for array in (annotations.image_ids, annotations.box_offsets, annotations.boxes, annotations.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
    for flags in (annotations.is_crowd, annotations.is_difficult):
        digest.update(np.packbits(flags).tobytes())
    digest.update(repr((annotations.class_names, annotations.category_ids)).encode())
    return digest.hexdigest()[:16]
