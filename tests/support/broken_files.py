"""Files named like images that are none, one of each kind."""

import io
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(format: str, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    """Return an image of noise in a format of Pillow."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, format)
    return stream.getvalue()


def _bind(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # a socket's whole path may have 100 characters
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    listener.close()
    os.close(folder)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(600 << 20)  # sparse


def _damaged_png() -> bytes:
    content = bytearray(encoded("PNG"))
    place = content.index(b"IDAT") + 40
    content[place : place + 20] = bytes(20)  # the checksum no longer fits
    return bytes(content)


def _claiming(content: bytes, place: int, kind: str, *sides: int) -> bytes:
    """Return a file whose header claims other sides."""
    return content[:place] + struct.pack(kind, *sides) + content[place + struct.calcsize(kind) :]


BROKEN: dict[str, bytes | Callable[[Path], object]] = {
    "empty.jpg": b"",
    "text.jpg": b"hello\n",
    "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
    "page.png": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "archive.jpg": b"PK\x03\x04" + bytes(60),
    "video.gif": b"\x00\x00\x00\x18ftypmp42" + bytes(60),
    "zeros.bmp": bytes(5000),
    "cut.jpg": encoded("JPEG")[:900],
    "without_end.jpg": encoded("JPEG")[:-2],
    "only_start.jpg": b"\xff\xd8\xff\xe0",
    "cut.png": encoded("PNG")[:600],
    "checksum.png": _damaged_png(),
    "bomb.png": _claiming(encoded("PNG"), 16, ">II", 60_000, 60_000),
    "cut.bmp": encoded("BMP")[:600],
    "bomb.bmp": _claiming(encoded("BMP"), 18, "<ii", 50_000, 50_000),
    "cut.webp": encoded("WEBP")[:200],
    "cut.gif": encoded("GIF", mode="P")[:30],
    "cut.tif": encoded("TIFF")[:-4000],
    "nothing_in_it.tiff": b"II*\x00\x08\x00\x00\x00\x00\x00",
    "huge.jpg": _huge,
    "pipe.jpg": os.mkfifo,
    "socket.jpg": _bind,
    "dangling.jpg": lambda path: path.symlink_to("no such file"),
    "loop.jpg": lambda path: path.symlink_to(path.name),
    "zero.jpg": lambda path: path.symlink_to("/dev/zero"),
    "line\nbreak.jpg": b"hello",
}


def write_broken(path: Path) -> Path:
    """Write the broken file of that name."""
    content = BROKEN[path.name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path
