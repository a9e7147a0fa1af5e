"""Check images by their first and last bytes, without decoding."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from onestage.data.annotations import (
    EXTREME_SHAPE,
    FIRST_FRAME,
    IMAGE_SIZE_DIFFERS,
    IMAGE_TOO_SMALL,
    IMAGE_UNREADABLE,
    OTHER_SUFFIX,
    TURNED,
    require_images,
    select_images,
    tiny_boxes,
)
from onestage.data.images import (
    JPEG_END,
    MAX_IMAGE_BYTES,
    REMEDY,
    ImageHeader,
    ImageSizeError,
    is_whole_jpeg,
    open_header,
    orientation_to_apply,
    read_header,
)
from onestage.errors import ImageError
from onestage.files import open_at_once, printable, read_file
from onestage.types import AnnotationSet, Finding

HEAD_BYTES = 64 << 10  # holds the header of nearly every photograph, its EXIF data included
MIN_IMAGE_SIDE = 8  # px, the stride of SSD's first feature map
MAX_ASPECT = 10.0  # of the sides; stretched to a square, objects would be lines
START_IMAGES = 20_000  # images of a split that are checked before training; the others are when they are read
NUM_THREADS = 8  # they wait for the disk, or the network behind it
WHOLE_FORMATS = (b"RIFF", b"II*\0", b"MM\0*")  # WebP and TIFF have no header that could be read alone
PNG_END = b"IEND\xaeB`\x82"
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}  # fmt: skip


class HeaderCheck(NamedTuple):
    """Size and findings of one image."""

    height: int  # upright as annotated, px; 0 where it cannot be read
    width: int
    findings: list[Finding]

    @property
    def is_usable(self) -> bool:
        """Whether the image stays in the set."""
        return all(finding.effect != "skipped" for finding in self.findings)


def check_headers(annotations: AnnotationSet, rows: Sequence[int] | None = None) -> list[HeaderCheck]:
    """Check the images of a split.

    Args:
        annotations: N images.
        rows: which of them, 0..N-1; None: all.
    """
    chosen = range(len(annotations)) if rows is None else rows
    paths = [str(annotations.image_paths[row]) for row in chosen]
    sizes = [(height, width) for height, width in annotations.sizes[list(chosen)].tolist()]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(check_header, paths, sizes, chunksize=64))


def check_header(path: str, annotated_size: tuple[int, int] = (0, 0)) -> HeaderCheck:
    """Check one image.

    Args:
        path: the file. It is never waited for.
        annotated_size: (height, width); 0, 0 where the annotation gives none.
    """
    file = Path(path)
    try:
        header, is_animated = _read(file)
        orientation = orientation_to_apply(file, header, annotated_size)
    except ImageError as reason:
        return HeaderCheck(0, 0, [image_finding(file, reason)])
    height, width = (header.height, header.width) if orientation < 5 else (header.width, header.height)
    return HeaderCheck(height, width, list(_findings(file, header, (height, width), orientation, is_animated)))


def image_finding(file: Path, reason: ImageError) -> Finding:
    """Turn the decoder's message into a finding."""
    rule = IMAGE_SIZE_DIFFERS if isinstance(reason, ImageSizeError) else IMAGE_UNREADABLE
    problem, _, remedy = str(reason).partition("\n")
    problem = problem.removeprefix(f"{printable(file)}: ").rstrip(".")
    return rule.broken(printable(file), problem)._replace(remedy=remedy or rule.remedy)


def check_before_start(annotations: AnnotationSet, image_size: int, max_bad_fraction: float) -> AnnotationSet:
    """Skip the images whose header shows that they cannot be used, with their objects, and add the findings.

    At most `START_IMAGES` images are checked, evenly spaced, so that training starts soon.

    Args:
        annotations: N images.
        image_size: side of the network input, px.
        max_bad_fraction: 0..1; see `require_few_bad`.

    Raises:
        AnnotationError: more than `max_bad_fraction` of them are bad, or all.
    """
    num_images = len(annotations)
    rows = np.unique(np.linspace(0, num_images - 1, min(num_images, START_IMAGES)).round().astype(np.int64))
    checks = check_headers(annotations, rows.tolist())
    findings = [finding for check in checks for finding in check.findings if finding.effect != "note"]
    bad_rows = rows[[not check.is_usable for check in checks]]
    kept = np.setdiff1d(np.arange(num_images), bad_rows)
    require_images(annotations.source, len(kept), findings, max_bad_fraction)
    selected = select_images(annotations, kept) if len(bad_rows) else annotations
    return replace(selected, findings=(*annotations.findings, *findings, *tiny_boxes(selected, image_size)))


def _read(file: Path) -> tuple[ImageHeader, bool]:
    """Return the header, and whether there are more frames; raise ImageError if the file is not a whole image."""
    head, tail, num_bytes = _ends_of(file)
    content = head
    if num_bytes > len(head) and (head.startswith(WHOLE_FORMATS) or not _has_end(head, tail)):
        content = _whole(file)
    try:
        image = open_header(file, content)
    except ImageError:
        if len(content) == num_bytes:
            raise
        content = _whole(file)  # a header longer than usual
        image = open_header(file, content)
    with image:
        header = read_header(file, image)
        end = content if len(content) == num_bytes else tail
        if header.format in ("JPEG", "MPO") and not end.endswith(JPEG_END) and not is_whole_jpeg(content):
            raise _cut_off(file, num_bytes, "JPEG")
        if header.format == "PNG" and PNG_END not in end and PNG_END not in content:
            raise _cut_off(file, num_bytes, "PNG")
        return header, _is_animated(image, content)


def _ends_of(file: Path) -> tuple[bytes, bytes, int]:
    """Return the first bytes, the last ones and the number of all."""
    try:
        with open(file, "rb", opener=open_at_once) as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            head = stream.read(HEAD_BYTES)
            if num_bytes <= len(head) or num_bytes > MAX_IMAGE_BYTES:
                raise OSError
            stream.seek(-32, os.SEEK_END)
            return head, stream.read(), num_bytes
    except (OSError, ValueError):  # short, or not to be read: `read_file` knows what to say
        content = _whole(file)
        return content, content[-32:], len(content)


def _whole(file: Path) -> bytes:
    return read_file(file, ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)


def _has_end(head: bytes, tail: bytes) -> bool:
    """Tell whether a JPEG or PNG has its end marker; other formats are not checked."""
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(JPEG_END)
    return not head.startswith(b"\x89PNG") or PNG_END in tail


def _is_animated(image: Image.Image, content: bytes) -> bool:
    """Tell whether there are more frames. A GIF is read no further than its head."""
    if image.format == "GIF":
        return content.count(b"\x21\xf9\x04") > 1  # a graphic control extension stands before each frame (GIF89a 23)
    return image.format in ("WEBP", "TIFF", "PNG") and bool(getattr(image, "is_animated", False))


def _findings(
    file: Path, header: ImageHeader, size: tuple[int, int], orientation: int, is_animated: bool
) -> list[Finding]:
    """Return what is unusual about a readable image. size: (height, width), upright."""
    place = printable(file)
    height, width = size
    if min(size) < MIN_IMAGE_SIDE:
        problem = f"is {width} x {height} px; both sides must be at least {MIN_IMAGE_SIDE} px"
        return [IMAGE_TOO_SMALL.broken(place, problem)]
    found = []
    if max(size) > MAX_ASPECT * min(size):
        found.append(EXTREME_SHAPE.broken(place, f"is {width} x {height} px, longer than {MAX_ASPECT:g}:1"))
    if is_animated:
        found.append(FIRST_FRAME.broken(place, "has several frames or pages; the first is taken"))
    if file.suffix.lower() not in SUFFIXES.get(header.format, (file.suffix.lower(),)):
        found.append(OTHER_SUFFIX.broken(place, f"is a {header.format} file"))
    if header.orientation != 1:
        verb = "turned by" if orientation != 1 else "not turned, as annotated, despite"
        found.append(TURNED.broken(place, f"is {verb} its EXIF orientation {header.orientation}"))
    return found


def _cut_off(file: Path, num_bytes: int, format_name: str) -> ImageError:
    return ImageError(f"{printable(file)}: is cut off: {num_bytes} bytes of {format_name} without its end.\n{REMEDY}")
