"""Where a training reads its images: from their files, or from smaller copies on disk.

A copy has a short side of 4/3 of the network's input and is made when its image is first asked for. What a training
sees depends on the kind of cache, not on what the cache already holds: an image that is not in it yet goes through the
same resizing and compression as one that is. Evaluation always reads the files.
"""

import math
from typing import Literal

from onestage.data.cache_folder import cache_folder
from onestage.data.disk_cache import DiskCache
from onestage.data.image_reader import FileReader, ImageReader
from onestage.types import AnnotationSet

SHORT_SIDE = 4 / 3  # network inputs; SSD's smallest patch has 0.3 of it, and a larger copy takes longer to decode

CacheKind = Literal["none", "disk"]


def open_images(kind: CacheKind, annotations: AnnotationSet, image_size: int) -> ImageReader:
    """Return the reader of a split, after saying how large its cache gets.

    Args:
        kind: none or disk.
        annotations: the split.
        image_size: side of the network's input, px.

    Raises:
        ConfigError: there is not enough room for the cache, or its folder cannot be written.
    """
    if kind == "none":
        return FileReader(annotations)
    short_side = math.ceil(SHORT_SIDE * image_size)
    return DiskCache(annotations, short_side, cache_folder() / "images")
