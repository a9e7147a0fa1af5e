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
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from onestage.data.images import read_image
from onestage.data.source import ReadImage
from onestage.errors import ConfigError, ImageError, ResourceError
from onestage.files import atomic_write, cache_folder, printable
from onestage.types import AnnotationSet

SHORT_SIDE = 4 / 3  # of the network input: SSD's smallest patch has 0.3 of it, and larger copies take longer to decode
JPEG_QUALITY = 90  # decodes in a third of the time of a camera's file
CACHE_VERSION = 1  # raise it when the copies change; older ones are then ignored
HEADER = struct.Struct("<8sIII")  # magic, height and width of the file's image, checksum of the JPEG that follows
MAGIC = b"onestage"
NUM_SAMPLED = 16  # images that are compressed to estimate the size on disk

CacheKind = Literal["none", "disk"]

logger = logging.getLogger(__name__)


class ImageReader(Protocol):
    """Reads the images of a split by their row."""

    def read(self, index: int) -> ReadImage:
        """Return image `index`; raise ImageError, with its file, if it cannot be decoded whole."""


def open_images(kind: CacheKind, annotations: AnnotationSet, image_size: int) -> ImageReader:
    """Return the reader of a split; see `DiskCache`. image_size: shortest side of the network's inputs, px."""
    if kind == "none":
        return FileReader(annotations)
    return DiskCache(annotations, math.ceil(SHORT_SIDE * image_size), cache_folder() / "images")


class FileReader:
    """Decodes the file each time."""

    def __init__(self, annotations: AnnotationSet) -> None:
        self.annotations = annotations

    def read(self, index: int) -> ReadImage:
        """Decode image `index` in its own size."""
        height, width = self.annotations.sizes[index].tolist()
        pixels = read_image(str(self.annotations.image_paths[index]), (height, width))
        return ReadImage(pixels, (pixels.shape[0], pixels.shape[1]))


class FunctionReader:
    """Reads images through a source's own function; see `Source.image_reader`."""

    def __init__(self, load: Callable[[int], ReadImage]) -> None:
        self.load = load

    def read(self, index: int) -> ReadImage:
        """Return image `index` in its own size."""
        return self.load(index)


class DiskCache:
    """Keeps JPEG copies in a folder that any number of processes and trainings may share.

    A copy's name is a hash of the file's path, size and modification time, of the annotated size and of how copies
    are made, so a copy of another state of the file is never found. It is written atomically, and a checksum detects
    a damaged copy, which is made again. How large the cache will get is printed.

    Args:
        annotations: the split.
        short_side: of the copies, px; an image that is not larger is read from its file.
        folder: of the copies.

    Raises:
        ConfigError: there is not enough space for the copies, or the folder cannot be written.
    """

    def __init__(self, annotations: AnnotationSet, short_side: int, folder: Path) -> None:
        self.files = FileReader(annotations)
        self.annotations = annotations
        self.short_side = short_side
        self.folder = folder
        remedy = "Set the environment variable XDG_CACHE_HOME to another folder, or data.cache: none."
        place = printable(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as reason:
            problem = f"needs {place}, which cannot be written ({reason.strerror})"
            raise ConfigError(f"data.cache: disk {problem}.\n{remedy}") from None
        needed = self._estimate_bytes()
        sizes = f"{needed / 1e6:,.2f} MB in {place} ({free / 1e6:,.0f} MB free)"
        copies = f"copies of {len(annotations)} images with a short side of {short_side} px, if theirs is longer"
        rank_zero_info(f"data.cache: disk will hold about {sizes}: {copies}")
        if needed > free:
            raise ConfigError(f"data.cache: disk would need about {sizes}.\n{remedy}")

    def read(self, index: int) -> ReadImage:
        """Return the copy of image `index`, and make it if there is none yet."""
        path = self._path_of(index)
        found = _read_copy(path)
        if found is not None:
            return found
        image = self.files.read(index)
        if min(image.original_size) <= self.short_side:
            return image
        content = _encode_copy(image, self.short_side)
        try:
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

    def _estimate_bytes(self) -> int:
        """Return what all copies together will take, from a few that are compressed now."""
        count = len(self.annotations)
        lengths = []
        for index in range(0, count, max(count // NUM_SAMPLED, 1)):
            with suppress(ImageError):  # training reports or skips it
                image = self.files.read(index)
                is_copied = min(image.original_size) > self.short_side
                lengths.append(len(_encode_copy(image, self.short_side)) if is_copied else 0)
        return round(np.mean(lengths) * count) if lengths else 0


def _read_copy(path: Path) -> ReadImage | None:
    """Return the image of a copy, or None if there is none, or it is damaged."""
    with suppress(OSError):
        return _decode_copy(path.read_bytes())
    return None


def _decode_copy(content: bytes) -> ReadImage | None:
    if len(content) <= HEADER.size:
        return None
    magic, height, width, checksum = HEADER.unpack_from(content)
    if magic != MAGIC or zlib.crc32(content[HEADER.size :]) != checksum:
        return None
    jpeg = np.frombuffer(content, dtype=np.uint8, offset=HEADER.size)
    pixels: Any = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else ReadImage(np.asarray(pixels, dtype=np.uint8), (height, width))


def _encode_copy(image: ReadImage, short_side: int) -> bytes:
    """Return header and JPEG of an image whose short side is longer than `short_side`, resized to that."""
    height, width = image.original_size
    factor = short_side / min(height, width)
    pixels = cv2.resize(image.pixels, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    content = jpeg.tobytes()
    return HEADER.pack(MAGIC, *image.original_size, zlib.crc32(content)) + content
