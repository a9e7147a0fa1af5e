"""The one image decoder: a file becomes [H, W, 3] uint8 RGB, upright as annotated."""

import io
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from onestage.errors import ImageError
from onestage.files import open_at_once, printable, read_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
UNREAD_SUFFIXES = (
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".pcx",
    ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".svg", ".psd", ".ico", ".dib", ".apng", ".dcm", ".mp4",
    ".avi", ".mov", ".mkv",
)  # fmt: skip
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a file of a hundred bytes can claim a thousand times as much
MAX_IMAGE_BYTES = 512 << 20  # twice what MAX_PIXELS of uncompressed 16-bit RGB takes, rounded up
# Only these readers of Pillow may run: others start external programs or are little tested.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
# Registered here rather than by Pillow's search for readers, which several threads would start together.
LATE_READERS = (TiffImagePlugin, WebPImagePlugin)
# Others, such as float and 32-bit integers, have no fixed range of values that 0..255 could stand for.
PILLOW_MODES = (
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I;16L",
    "I;16N",
)  # fmt: skip
VALUE_TYPES = {"F": "floating-point values", "I": "32-bit or signed values"}
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own reader takes the lower 8 bits of planes of 16
DECODED_BY_OPENCV = ("JPEG", "MPO", "PNG")  # a quarter faster than Pillow, as strict given bytes; MPO: several JPEGs
HEAD_BYTES = 64 << 10  # holds the header of nearly every photograph, its EXIF data included
TAIL_BYTES = 32
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"
ORIENTATION_TAG = 0x0112
SEGMENT, FRAME = struct.Struct(">HH"), struct.Struct(">BHHB")  # marker, length; bits, height, width, layers
FRAME_MARKERS, SCAN_MARKER, TABLE_MARKER = (0xFFC0, 0xFFC1, 0xFFC2), 0xFFDA, 0xFFDB
PLAIN_FRAMES = {(8, 1, 11), (8, 3, 17), (8, 4, 20)}  # bits, layers, length of the segment
TABLE_BYTES = 65  # of a quantization table of 8 bits, with its number
EXIF = b"Exif\0\0"
# Marker -> beginning and least length of a segment in which Pillow finds no fault.
PLAIN_SEGMENTS: dict[int, tuple[bytes | tuple[bytes, ...], int]] = {
    0xFFC4: (b"", 2), 0xFFDD: (b"", 2), 0xFFFE: (b"", 2), 0xFFE0: (b"JFIF", 16), 0xFFE2: (b"ICC_PROFILE\0", 16),
    0xFFE1: ((EXIF, b"http://ns.adobe.com/xap/1.0/\0"), 16), 0xFFEE: (b"Adobe", 14),
}  # fmt: skip
REMEDY = "Replace the file, or remove it from the data set."


class ImageSizeError(ImageError):
    """An image has another size than its annotation says."""


RGBImage = npt.NDArray[np.uint8]


class ImageHeader(NamedTuple):
    """Format, size and orientation of an image file."""

    format: str  # one of PILLOW_FORMATS, or MPO
    height: int  # as stored, before any rotation
    width: int
    orientation: int  # EXIF 1..8; 1 is upright
    is_deep: bool = False  # 16 bits per channel
    has_alpha: bool = False
    is_animated: bool = False  # several frames or pages; filled in by `read_whole_header`


def read_image(path: str | Path, annotated_size: tuple[int, int] | None = None) -> RGBImage:
    """Decode an image file as 8-bit RGB: [H, W, 3], writable and contiguous. It is opened once, and never waited for.

    Gray, palette, CMYK and 16-bit images are converted (16 bits by dropping the lower 8), transparency is dropped,
    and of an animation the first frame is taken. An EXIF orientation is applied, as browsers and annotation tools do,
    unless only the stored image has the annotated (height, width), which is None or (0, 0) where it is not known.
    Raises ImageError for a missing, damaged or cut off file, over `MAX_PIXELS` pixels, and another size than annotated.
    """
    file = Path(path)
    content = read_file(file, ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)
    header, pillow_image = read_plain_jpeg(content), None
    if header is None:
        pillow_image, header = open_image(file, io.BytesIO(content))
    orientation = orientation_to_apply(file, header, annotated_size)
    try:
        if pillow_image is None or header.format in DECODED_BY_OPENCV:
            image = _decode_with_opencv(content, header)
        elif pillow_image.mode.startswith("I;16"):
            image = np.repeat((np.asarray(pillow_image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        else:
            image = np.array(pillow_image.convert("RGB"))
    except Exception as reason:  # the libraries raise whatever damaged pixels lead them to
        problem = f"is cut off or damaged ({len(content)} bytes of {header.format}; {_first_line(reason)})"
        raise ImageError(f"{printable(file)}: {problem}.\n{REMEDY}") from None
    return _turn_upright(image, orientation)


def read_whole_header(path: str) -> ImageHeader:
    """Read the header of a file without decoding; ImageError as of `read_image`, as far as header and end show it."""
    with suppress(OSError, ValueError, ImageError), open(path, "rb", buffering=0, opener=open_at_once) as file:
        file.seek(-TAIL_BYTES, os.SEEK_END)
        if file.tell() <= MAX_IMAGE_BYTES:
            end = file.read()
            file.seek(0)
            if is_whole_jpeg(end) and (header := read_plain_jpeg(file.read(HEAD_BYTES))) is not None:
                return header
            file.seek(0)
            return _read_whole(path, io.BufferedReader(file), end)
    # Not a whole image at first sight: the whole file tells why, or that only its end is unusual.
    content = read_file(Path(path), ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)
    return _read_whole(path, io.BytesIO(content), content)


def _read_whole(path: str, stream: BinaryIO, end: bytes) -> ImageHeader:
    """Read the header of a whole image. end: its last bytes, or all of them."""
    image, header = open_image(path, stream)
    with image, suppress(Exception):  # a damaged GIF; Pillow's readers raise whatever that leads them to
        header = header._replace(is_animated=header.format != "MPO" and getattr(image, "is_animated", False))
    is_jpeg = header.format in ("JPEG", "MPO")
    if (is_jpeg and not is_whole_jpeg(end)) or (header.format == "PNG" and b"IEND\xaeB`\x82" not in end):
        problem = f"is cut off: {len(end)} bytes of {header.format} without its end"
        raise ImageError(f"{printable(path)}: {problem}.\n{REMEDY}")
    return header


def open_image(file: str | Path, stream: BinaryIO) -> tuple[Image.Image, ImageHeader]:
    """Read size, orientation and depth with Pillow, and allocate no pixel.

    Raises ImageError if it is no image, has over `MAX_PIXELS` pixels, or values without a fixed range.
    """
    too_many = f"pixels; at most {MAX_PIXELS / 1e6:.0f} million are decoded.\nShrink it, or remove it."
    try:
        image = Image.open(stream, formats=PILLOW_FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"{printable(file)}: claims far more {too_many}") from None
    except Exception as reason:  # Pillow's readers raise whatever a damaged header leads them to
        problem = f"is not an image that can be read ({_first_line(reason)}); known formats are"
        raise ImageError(f"{printable(file)}: {problem} {', '.join(PILLOW_FORMATS)}.\n{REMEDY}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{printable(file)}: claims {width} x {height} {too_many}")
    if values := _unread_values(image):
        problem = f"holds {values}; it must be 8 or 16 bits, from 0 for black"
        raise ImageError(f"{printable(file)}: {problem}.\nSave it as 8-bit RGB or gray, scaled to 0..255.")
    exif = image.info.get("exif") if image.format != "TIFF" else None  # Pillow turns TIFF itself
    is_deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    has_alpha = image.mode.lower().endswith("a") or "transparency" in image.info
    return image, ImageHeader(image.format or "", height, width, _read_orientation(exif), is_deep, has_alpha)


def read_plain_jpeg(head: bytes) -> ImageHeader | None:
    """Read the header of a JPEG as Pillow does, in a sixth of the time; None where that takes Pillow.

    Plain is a file of 8 bits whose first scan follows segments without gaps (ITU-T T.81 section B.1.1), none of which
    Pillow could refuse. head: the first bytes of the file.
    """
    place, size, exif = 2, (0, 0), b""
    try:
        while head.startswith(b"\xff\xd8"):
            marker, length = SEGMENT.unpack_from(head, place)
            start, place = place + 4, place + 2 + length
            if marker == SCAN_MARKER:
                is_plain = place <= len(head) and 0 < size[0] * size[1] <= MAX_PIXELS
                return ImageHeader("JPEG", *size, _read_orientation(exif)) if is_plain else None
            if marker == TABLE_MARKER:
                is_plain = length % TABLE_BYTES == 2 and max(head[start:place:TABLE_BYTES]) < 16
            elif marker in FRAME_MARKERS:
                bits, height, width, layers = FRAME.unpack_from(head, start)
                is_plain, size = (bits, layers, length) in PLAIN_FRAMES and size == (0, 0), (height, width)
            else:
                beginning, min_length = PLAIN_SEGMENTS[marker]
                is_plain = head.startswith(beginning, start) and length >= min_length
                if beginning and head.startswith(EXIF, start):
                    is_plain, exif = is_plain and not exif, head[start:place]
            if not is_plain:
                return None
    except (struct.error, KeyError, ValueError):  # the end of the head, another marker, an empty table
        return None
    return None


def _read_orientation(exif: bytes | None) -> int:
    """Return the orientation, 1..8, in the EXIF data of an image; 1 where there is none."""
    with suppress(Exception):  # damaged metadata, of which only the orientation matters
        if exif:
            tags = Image.Exif()
            tags.load(exif)
            orientation = int(tags.get(ORIENTATION_TAG, 1))
            return orientation if 1 <= orientation <= 8 else 1
    return 1


def _unread_values(image: Image.Image) -> str:
    """Return the kind of values that would be decoded to wrong ones; empty for nearly every image."""
    if image.mode not in PILLOW_MODES:
        return f"{VALUE_TYPES.get(image.mode, image.mode)}, which have no fixed range"
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return ""
    tags = image.tag_v2
    bits, colours = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)), tags.get(TiffImagePlugin.COLORMAP, ())
    kinds = {
        "signed values": 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()),
        "12 bits": 12 in bits,
        "16 bits from 0 for white": 16 in bits and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0,
        "colours of 8 bits in a table of 16": 0 < max(colours, default=0) < 256,
    }
    return next((kind for kind, is_so in kinds.items() if is_so), "")


def orientation_to_apply(file: str | Path, header: ImageHeader, annotated_size: tuple[int, int] | None) -> int:
    """Return the orientation with which the image has the annotated size; ImageSizeError if neither has it."""
    stored = (header.height, header.width)
    upright = stored[::-1] if header.orientation >= 5 else stored
    if annotated_size is None or 0 in annotated_size or tuple(annotated_size) == upright:
        return header.orientation
    if tuple(annotated_size) == stored:
        return 1
    found = f"{stored[1]} x {stored[0]}"
    if upright != stored:
        found += f" ({upright[1]} x {upright[0]} once turned by its EXIF orientation {header.orientation})"
    problem = f"is {found} pixels (width x height), but annotated as {annotated_size[1]} x {annotated_size[0]}"
    raise ImageSizeError(f"{printable(file)}: {problem}.\nPut the original image back, or annotate this one anew.")


def is_whole_jpeg(content: bytes) -> bool:
    """Tell whether an end marker follows the last scan, perhaps with other data behind; a thumbnail's lies before."""
    return content.endswith(JPEG_END) or content.rfind(JPEG_END) > content.rfind(JPEG_SCAN)


def _decode_with_opencv(content: bytes, header: ImageHeader) -> RGBImage:
    """Decode JPEG and PNG from bytes: `cv2.imread` accepts truncated files in silence, `cv2.imdecode` does not."""
    if header.format != "PNG" and not is_whole_jpeg(content):
        raise ValueError("without its end")
    buffer = np.frombuffer(content, dtype=np.uint8)
    image: Any = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None or image.shape != (header.height, header.width, 3):
        raise ValueError("its pixels cannot be decoded")
    return np.asarray(image, dtype=np.uint8)


def _turn_upright(image: RGBImage, orientation: int) -> RGBImage:
    """Apply an EXIF orientation (Exif 2.32 section 4.6.4.A: what row 0 and column 0 show)."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _first_line(reason: Exception) -> str:
    """Return what a library said, without the memory address of the stream it was given."""
    return "unknown format" if isinstance(reason, UnidentifiedImageError) else str(reason).partition("\n")[0][:200]
