"""Smaller copies of the training images as pixels in memory that all workers share."""

import os
import tempfile
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from onestage.data.image_reader import FileReader, ReadImage, copy_size, resized, written_bytes
from onestage.errors import ConfigError
from onestage.types import AnnotationSet


class MemoryCache:
    """Keeps resized pixels in memory that all workers of a process share, whatever way they are started.

    Nothing is compressed. Images whose size the annotations do not give are read from their files. The memory is freed
    with the last process that uses it, also when that is killed.

    Args:
        annotations: the split.
        short_side: of the copies, px; a smaller image is kept as it is.
        num_processes: that train on this machine, each with such a cache.
    """

    def __init__(self, annotations: AnnotationSet, short_side: int, num_processes: int) -> None:
        self.files = FileReader(annotations)
        self.annotations = annotations
        self.short_side = short_side
        sizes = [copy_size(size, short_side) for size in annotations.sizes.tolist()]
        lengths = np.array([height * width * 3 for height, width in sizes], dtype=np.int64)
        # First a byte for each image that says whether it is there, then the pixels of all.
        self.offsets: npt.NDArray[np.int64] = len(lengths) + np.concatenate([[0], np.cumsum(lengths)])
        self._announce(int(self.offsets[-1]) * num_processes, int((lengths == 0).sum()))
        self.memory = SharedMemory(int(self.offsets[-1]))

    def _announce(self, needed: int, num_unknown: int) -> None:
        available = available_memory()
        unknown = f"; {num_unknown} of unknown size are not kept" if num_unknown else ""
        rank_zero_info(
            f"data.cache: ram will hold {written_bytes(needed)} ({written_bytes(available)} available): "
            f"{len(self.annotations)} images with a short side of {self.short_side} px{unknown}"
        )
        if needed > available:
            raise ConfigError(
                f"data.cache: ram would need {written_bytes(needed)}, and {written_bytes(available)} are available.\n"
                "Set data.cache: disk, which takes a tenth of that on disk, or data.cache: none."
            )

    def read(self, index: int) -> ReadImage:
        """Return the copy of image `index`, and make it if there is none yet."""
        original_size = self.annotations.sizes[index].tolist()
        height, width = copy_size(original_size, self.short_side)
        offset, length = int(self.offsets[index]), height * width * 3
        if length and self.memory.read(index, 1) == b"\1":
            pixels = np.frombuffer(self.memory.read(offset, length), dtype=np.uint8).reshape(height, width, 3)
            return ReadImage(pixels, (original_size[0], original_size[1]))
        image = self.files.read(index)
        if not length:
            return image
        small = resized(image.pixels, (height, width))
        self.memory.write(offset, small.tobytes())
        self.memory.write(index, b"\1")  # last, so that nobody reads half an image
        return ReadImage(small, image.original_size)


class SharedMemory:
    """Bytes without a name that a process shares with those it starts, by fork, spawn or forkserver.

    Args:
        length: in bytes. Pages are taken as they are written.
    """

    def __init__(self, length: int) -> None:
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("onestage-cache")
        else:  # a file that is deleted already; the system keeps what it can of it in memory
            with tempfile.TemporaryFile() as file:
                self._descriptor = os.dup(file.fileno())
        os.ftruncate(self._descriptor, length)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes."""
        return os.pread(self._descriptor, length, offset)

    def write(self, offset: int, content: bytes) -> None:
        """Write all of `content`."""
        view = memoryview(content)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset, view = offset + written, view[written:]

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptor = state["descriptor"].detach()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def available_memory() -> int:
    """Return how many bytes this process may still take: what the machine has, or its control group if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines_of("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = (_lines_of(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return available


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
