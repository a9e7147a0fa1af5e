"""Files named like images that are none, one of each kind."""

import io
import os
import socket
import struct
import zlib
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


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG of that size without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tear_huffman_table(image: Path) -> None:
    """Damage a JPEG file where no header shows it."""
    content = image.read_bytes()
    table = content.index(b"\xff\xc4") + 5
    image.write_bytes(content[:table] + b"\xff" * 16 + content[table + 16 :])


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
    "bomb.png": png_that_claims(60_000, 60_000),
    "largest.png": png_that_claims(2**31 - 1, 2**31 - 1),
    "cut.bmp": encoded("BMP")[:600],
    "bomb.bmp": encoded("BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encoded("BMP")[26:],
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
