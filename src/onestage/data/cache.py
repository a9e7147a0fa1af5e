"""Sources of training images: the files themselves, or smaller JPEG copies on disk.

A copy has a short side of 4/3 of the network's input and is made when its image is first requested. What a training
sees depends on the kind of cache, not on its content: an image that is not in it yet goes through the same resizing
and compression as one that is. Evaluation always reads the files.
"""

import hashlib
import logging
import math
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from onestage.data.images import read_image
from onestage.data.resize import scale_image
from onestage.data.source import ImageReader, ReadImage
from onestage.errors import ConfigError, ResourceError
from onestage.files import atomic_write, cache_folder, printable
from onestage.types import AnnotationSet

SHORT_SIDE = 4 / 3  # of the network input: SSD's smallest patch has 0.3 of it, and larger copies take longer to decode
JPEG_QUALITY = 90  # decodes in a third of the time of a camera's file
CACHE_VERSION = 2  # raise it when the copies change; older ones are then ignored
HEADER = struct.Struct("<II")  # height and width of the file's image; the copy's JPEG follows
SPARE_BYTES = 1 << 30  # that copies leave free on the disk: checkpoints need space too

CacheKind = Literal["none", "disk"]

logger = logging.getLogger(__name__)


def open_images(kind: CacheKind, annotations: AnnotationSet, image_size: int) -> ImageReader:
    """Return the reader of a split; see `DiskCache`. image_size: shortest side of the network's inputs, px."""
    if kind == "none":
        return FileReader(annotations)
    return DiskCache(annotations, math.ceil(SHORT_SIDE * image_size), cache_folder() / "images")


class FileReader:
    """Decodes the file each time."""

    def __init__(self, annotations: AnnotationSet) -> None:
        self.annotations = annotations

    def __call__(self, index: int) -> ReadImage:
        """Decode image `index` in its own size."""
        height, width = self.annotations.sizes[index].tolist()
        pixels = read_image(str(self.annotations.image_paths[index]), (height, width))
        return ReadImage(pixels, (pixels.shape[0], pixels.shape[1]))


class DiskCache(FileReader):
    """Keeps JPEG copies in a folder that any number of processes and trainings may share.

    A copy's name is a hash of the file's path, size and modification time, of the annotated size and of how copies
    are made, so a copy of another state of the file is never found. It is written atomically, and only while a
    gigabyte of the disk stays free.

    Raises ConfigError if the folder cannot be written. short_side: of the copies, px; an image that is not larger is
    read from its file.
    """

    def __init__(self, annotations: AnnotationSet, short_side: int, folder: Path) -> None:
        super().__init__(annotations)
        self.short_side = short_side
        self.folder = folder
        remedy = "Set the environment variable XDG_CACHE_HOME to another folder, or data.cache: none."
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as reason:
            problem = f"needs {printable(folder)}, which cannot be written ({reason.strerror})"
            raise ConfigError(f"data.cache: disk {problem}.\n{remedy}") from None
        rank_zero_info(f"data.cache: disk keeps copies in {printable(folder)} ({free / 1e9:.1f} GB free)")

    def __call__(self, index: int) -> ReadImage:
        """Return the copy of image `index`, and make it if there is none yet."""
        path = self._path_of(index)
        with suppress(OSError):
            found = _decode_copy(path.read_bytes())
            if found is not None:
                return found
        image = super().__call__(index)
        if min(image.original_size) <= self.short_side:
            return image
        pixels, _ = scale_image(image.pixels, np.zeros((0, 4)), self.short_side / min(image.original_size))
        bgr, quality = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        content = HEADER.pack(*image.original_size) + cv2.imencode(".jpg", bgr, quality)[1].tobytes()
        try:
            if shutil.disk_usage(self.folder).free > SPARE_BYTES:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
        except (OSError, ResourceError) as reason:  # a full disk costs time, and does not stop the training
            problem = str(reason.__cause__ or reason)
            logger.warning("data.cache: %s cannot be written (%s); training continues without it", path, problem)
        return _decode_copy(content) or image

    def _path_of(self, index: int) -> Path:
        image_path = str(self.annotations.image_paths[index])
        state = [CACHE_VERSION, JPEG_QUALITY, self.short_side, str(Path(image_path).absolute())]
        with suppress(OSError, ValueError):  # a missing file has no copy; reading it names the problem
            status = Path(image_path).stat()
            state += [status.st_size, status.st_mtime_ns, *self.annotations.sizes[index].tolist()]
        name = hashlib.sha256(repr(tuple(state)).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.copy"


def _decode_copy(content: bytes) -> ReadImage | None:
    """Return the image of a copy; None if it is damaged."""
    if len(content) <= HEADER.size:
        return None
    jpeg = np.frombuffer(content, dtype=np.uint8, offset=HEADER.size)
    pixels: Any = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else ReadImage(np.asarray(pixels, dtype=np.uint8), HEADER.unpack_from(content))
