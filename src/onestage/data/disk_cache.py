"""Smaller copies of the training images as JPEG files."""

import hashlib
import logging
import shutil
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from onestage.data.image_reader import FileReader, ReadImage, copy_size, resized, written_bytes
from onestage.errors import ConfigError, ImageError
from onestage.files import printable
from onestage.types import AnnotationSet

JPEG_QUALITY = 90  # decodes in a third of the time of a file from a camera
CACHE_VERSION = 1  # raise it when the copies change, and older ones are left alone
HEADER = struct.Struct("<8sIII")  # magic, height and width of the file's image, checksum of the JPEG behind
MAGIC = b"onestage"
NUM_SAMPLED = 16  # images that are compressed to foretell the size on disk
UNFINISHED_PREFIX = ".unfinished-"
ABANDONED_SECONDS = 3600.0  # writing a copy takes milliseconds

logger = logging.getLogger(__name__)


class DiskCache:
    """Keeps JPEG copies in a folder that any number of processes and trainings may share.

    A copy's name is a hash of the file's path, size and time of change, of the annotated size and of how copies are
    made, so that a copy of another state of the file is never found. It appears whole or not at all, and a checksum
    tells a damaged one, which is made again.

    Args:
        annotations: the split.
        short_side: of the copies, px; an image that is not larger is read from its file.
        folder: where the copies go.
    """

    def __init__(self, annotations: AnnotationSet, short_side: int, folder: Path) -> None:
        self.files = FileReader(annotations)
        self.annotations = annotations
        self.short_side = short_side
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            free = shutil.disk_usage(folder).free
        except OSError as reason:
            raise ConfigError(
                f"data.cache: disk needs {printable(folder)}, which cannot be written ({reason.strerror}).\n"
                "Set the environment variable XDG_CACHE_HOME to another folder, or data.cache: none."
            ) from None
        needed = self._foretold_bytes()
        self._announce(needed, free)

    def _announce(self, needed: int, free: int) -> None:
        place, sizes = printable(self.folder), (written_bytes(needed), written_bytes(free))
        copies = f"copies of {len(self.annotations)} images with a short side of {self.short_side} px"
        if needed:
            rank_zero_info(f"data.cache: disk will hold about {sizes[0]} in {place} ({sizes[1]} free): {copies}")
        else:
            rank_zero_info(
                f"data.cache: disk has nothing to do: images have short sides of {self.short_side} px or less"
            )
        if needed > free:
            raise ConfigError(
                f"data.cache: disk would need about {sizes[0]} in {place}, where {sizes[1]} are free.\n"
                "Set the environment variable XDG_CACHE_HOME to another folder, or data.cache: none."
            )

    def read(self, index: int) -> ReadImage:
        """Return the copy of image `index`, and make it if there is none yet."""
        path = self._path_of(index)
        if path is None:
            return self.files.read(index)  # which says what is wrong with the file
        found = _decode_copy(path)
        if found is not None:
            return found
        image = self.files.read(index)
        if min(image.original_size) <= self.short_side:
            return image
        content = _encode_copy(image, self.short_side)
        _write_whole(path, content)
        return _decode_content(content) or image

    def _path_of(self, index: int) -> Path | None:
        image_path = str(self.annotations.image_paths[index])
        try:
            status = Path(image_path).stat()
        except (OSError, ValueError):
            return None
        state = (
            *(CACHE_VERSION, JPEG_QUALITY, self.short_side, str(Path(image_path).absolute())),
            *(status.st_size, status.st_mtime_ns, *self.annotations.sizes[index].tolist()),
        )
        name = hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.copy"

    def _foretold_bytes(self) -> int:
        """Return what all copies together will take, from a few that are compressed now."""
        count = len(self.annotations)
        lengths = []
        for index in range(0, count, max(count // NUM_SAMPLED, 1)):
            try:
                image = self.files.read(index)
            except ImageError:  # training will say so, or leave it out
                continue
            is_copied = min(image.original_size) > self.short_side
            lengths.append(len(_encode_copy(image, self.short_side)) if is_copied else 0)
        return round(np.mean(lengths) * count) if lengths else 0


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed process was writing."""
    for path in folder.glob(f"*/{UNFINISHED_PREFIX}*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            path.unlink(missing_ok=True)


def _decode_copy(path: Path) -> ReadImage | None:
    try:
        return _decode_content(path.read_bytes())
    except OSError:
        return None


def _decode_content(content: bytes) -> ReadImage | None:
    """Return what a copy holds; None if it is damaged."""
    if len(content) <= HEADER.size:
        return None
    magic, height, width, checksum = HEADER.unpack_from(content)
    if magic != MAGIC or zlib.crc32(content[HEADER.size :]) != checksum:
        return None
    jpeg = np.frombuffer(content, dtype=np.uint8, offset=HEADER.size)
    pixels: Any = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else ReadImage(np.asarray(pixels, dtype=np.uint8), (height, width))


def _encode_copy(image: ReadImage, short_side: int) -> bytes:
    """Return header and JPEG of an image, resized until its short side is `short_side`."""
    small = resized(image.pixels, copy_size(image.original_size, short_side))
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    content = jpeg.tobytes()
    return HEADER.pack(MAGIC, *image.original_size, zlib.crc32(content)) + content


def _write_whole(path: Path, content: bytes) -> None:
    """Let the file appear whole, or not at all. A full disk costs time, and no training."""
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED_PREFIX, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                Path(file.name).replace(path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as reason:
        logger.warning("data.cache: %s cannot be written (%s); training goes on without it", path, reason.strerror)
