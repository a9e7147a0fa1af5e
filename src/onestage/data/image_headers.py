"""Check images by their headers and last bytes, without decoding."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

import onestage.data.annotations as rules
from onestage.data.images import (
    MAX_IMAGE_BYTES,
    REMEDY,
    ImageHeader,
    ImageSizeError,
    is_whole_jpeg,
    open_header,
    orientation_to_apply,
    read_header,
    read_plain_jpeg,
)
from onestage.errors import ImageError
from onestage.files import open_at_once, printable, read_file
from onestage.types import AnnotationSet, Finding

HEAD_BYTES = 64 << 10  # read at once; holds the header of nearly every photograph, its EXIF data included
TAIL_BYTES = 32
MIN_IMAGE_SIDE = 8  # px, the stride of SSD's first feature map
MAX_ASPECT = 10.0  # of the sides; stretched to a square, objects would be lines
START_IMAGES = 20_000  # images of a split that are checked before training; the others are when they are read
NUM_THREADS = 4  # they wait for the disk; twice as many spend half of the processor's time on waiting for each other
FILES_PER_TASK = 64  # a task for each file costs a third more
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".mpo"), "PNG": (".png",), "BMP": (".bmp",),
    "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}  # fmt: skip


class HeaderCheck(NamedTuple):
    """Size and findings of one image."""

    height: int  # upright as annotated, px; 0 where it cannot be read
    width: int
    findings: list[Finding]  # one alone if the image is skipped
    is_as_shown: bool = True  # the size is that of the image turned by its EXIF orientation

    @property
    def is_usable(self) -> bool:
        """Whether the image stays in the set."""
        return all(finding.effect != "skipped" for finding in self.findings)


def check_headers(annotations: AnnotationSet, rows: Sequence[int] | None = None) -> list[HeaderCheck]:
    """Check the images `rows` of a split, of 0..N-1; None: all."""
    chosen = list(range(len(annotations)) if rows is None else rows)
    sizes = [(height, width) for height, width in annotations.sizes[chosen].tolist()]
    return check_files(annotations.image_paths[chosen].tolist(), sizes)


def check_files(paths: Sequence[str], annotated_sizes: Sequence[tuple[int, int]]) -> list[HeaderCheck]:
    """Check image files in several threads; see `check_header`."""

    def check(start: int) -> list[HeaderCheck]:
        part = slice(start, start + FILES_PER_TASK)
        return [check_header(*file) for file in zip(paths[part], annotated_sizes[part], strict=True)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(chain.from_iterable(pool.map(check, range(0, len(paths), FILES_PER_TASK))))


def check_header(path: str, annotated_size: tuple[int, int] = (0, 0)) -> HeaderCheck:
    """Check one image file, which is never waited for. annotated_size: (height, width); 0, 0 if unknown."""
    try:
        header, is_animated = _read(path)
        orientation = orientation_to_apply(path, header, annotated_size)
    except ImageError as reason:
        return HeaderCheck(0, 0, [image_finding(path, reason)])
    height, width = (header.height, header.width) if orientation < 5 else (header.width, header.height)
    findings = _findings(path, header, (height, width), orientation, is_animated)
    return HeaderCheck(height, width, findings, orientation == header.orientation)


def image_finding(file: str, reason: ImageError) -> Finding:
    """Turn the decoder's error into a finding."""
    rule = rules.IMAGE_SIZE_DIFFERS if isinstance(reason, ImageSizeError) else rules.IMAGE_UNREADABLE
    return rule.broken_by(file, reason)


def check_before_start(annotations: AnnotationSet, image_size: int, max_bad_fraction: float) -> AnnotationSet:
    """Skip the images whose header shows that they cannot be used, with their objects, and add the findings.

    At most `START_IMAGES` images are checked, evenly spaced, so that training starts soon. image_size: side of the
    network input, px.

    Raises:
        AnnotationError: more than `max_bad_fraction` of them are bad, or all.
    """
    num_images = len(annotations)
    rows = np.unique(np.linspace(0, num_images - 1, min(num_images, START_IMAGES)).round().astype(np.int64))
    checks = check_headers(annotations, rows.tolist())
    findings = [finding for check in checks for finding in check.findings if finding.effect != "note"]
    bad_rows = rows[[not check.is_usable for check in checks]]
    kept = np.setdiff1d(np.arange(num_images), bad_rows)
    found = [*annotations.findings, *findings]
    rules.require_few_skipped(annotations.source, len(kept), len(annotations.boxes), found, max_bad_fraction)
    selected = rules.select_images(annotations, kept) if len(bad_rows) else annotations
    return replace(selected, findings=(*found, *tiny_boxes(selected, image_size)))


def tiny_boxes(annotations: AnnotationSet, image_size: int) -> list[Finding]:
    """Count the objects under 1 px wide or high once their image is stretched to a square of `image_size` px.

    Training skips them (`onestage.data.transforms`); evaluation counts them.
    """
    sizes = annotations.sizes[:, ::-1].repeat(np.diff(annotations.box_offsets), axis=0)  # [T, 2] (width, height)
    scale = np.where(sizes > 0, image_size / np.maximum(sizes, 1), 1.0)
    is_tiny = ((annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale < 1).any(axis=1)
    problem = f"{{}} of {len(sizes)} boxes are less than 1 px wide or high at {image_size} px: not trained on"
    return rules.count_findings(annotations.source, {rules.BOX_TINY: (problem, int(np.count_nonzero(is_tiny)))})


def _read(path: str) -> tuple[ImageHeader, bool]:
    """Return the header, and whether there are more frames; raise ImageError if the file is not a whole image."""
    with suppress(OSError, ValueError, ImageError):
        handle = open_at_once(path, os.O_RDONLY)
        try:
            num_bytes = os.fstat(handle).st_size
            if TAIL_BYTES < num_bytes <= MAX_IMAGE_BYTES:
                head, end = os.pread(handle, HEAD_BYTES, 0), os.pread(handle, TAIL_BYTES, num_bytes - TAIL_BYTES)
                if is_whole_jpeg(end) and (header := read_plain_jpeg(head)) is not None:
                    return header, False
                with open(handle, "rb", HEAD_BYTES, closefd=False) as stream:
                    return _read_stream(path, stream, end)
        finally:
            os.close(handle)
    # Not a whole image at first sight: the whole file tells why, or that only its end is unusual.
    content = read_file(Path(path), ImageError, "an image file", REMEDY, MAX_IMAGE_BYTES)
    return _read_stream(path, io.BytesIO(content), content)


def _read_stream(path: str, stream: BinaryIO, end: bytes) -> tuple[ImageHeader, bool]:
    """Read the header. end: the last bytes, or all of them."""
    with open_header(path, stream) as image:
        header = read_header(path, image)
        is_jpeg = header.format in ("JPEG", "MPO")
        if (is_jpeg and not is_whole_jpeg(end)) or (header.format == "PNG" and b"IEND\xaeB`\x82" not in end):
            problem = f"is cut off: {len(end)} bytes of {header.format} without its end"
            raise ImageError(f"{printable(path)}: {problem}.\n{REMEDY}")
        is_animated = False
        with suppress(Exception):  # a damaged GIF; Pillow's readers raise whatever that leads them to
            is_animated = not is_jpeg and bool(getattr(image, "is_animated", False))
        return header, is_animated


def _findings(
    path: str, header: ImageHeader, size: tuple[int, int], orientation: int, is_animated: bool
) -> list[Finding]:
    """Return what is unusual about a readable image. size: (height, width), upright."""
    height, width = size
    if min(size) < MIN_IMAGE_SIDE:
        problem = f"is {width} x {height} px; both sides must be at least {MIN_IMAGE_SIDE} px"
        return [rules.IMAGE_TOO_SMALL.broken(printable(path), problem)]
    has_other_suffix = not path.lower().endswith(SUFFIXES[header.format])
    is_extreme, is_turned = max(size) > MAX_ASPECT * min(size), header.orientation != 1
    flags = is_extreme, is_animated, header.is_deep, header.has_alpha, has_other_suffix, is_turned
    if not any(flags):  # nearly always; the texts below take longer
        return []
    verb = "turned by" if orientation != 1 else "not turned, as annotated, despite"
    problems = {
        rules.EXTREME_SHAPE: f"is {width} x {height} px, over {MAX_ASPECT:g}:1",
        rules.FIRST_FRAME: "has several frames or pages; the first is taken",
        rules.DEEP_IMAGE: "has 16 bits per channel; the upper 8 are used",
        rules.TRANSPARENT: "has transparent parts; they are shown in their own colours",
        rules.OTHER_SUFFIX: f"is a {header.format} file",
        rules.TURNED: f"is {verb} its EXIF orientation {header.orientation}",
    }
    place = printable(path)
    return [rule.broken(place, text) for (rule, text), is_so in zip(problems.items(), flags, strict=True) if is_so]
