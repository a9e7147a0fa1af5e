"""Check images by their headers, without decoding."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

import onestage.data.annotations as rules
from onestage.data.images import ImageSizeError, orientation_to_apply, read_whole_header
from onestage.errors import ImageError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

MIN_IMAGE_SIDE = 8  # px, the stride of SSD's first feature map
MAX_ASPECT = 10.0  # of the sides; stretched to a square, objects would be lines
START_IMAGES = 20_000  # images of a split that are checked before training; the others are when they are read


class HeaderCheck(NamedTuple):
    """Size and findings of one image."""

    height: int  # upright as annotated, px; 0 where it cannot be read
    width: int
    findings: list[Finding]  # that of a skipped image comes first
    is_as_shown: bool = True  # the size is that of the image turned by its EXIF orientation

    @property
    def is_usable(self) -> bool:
        """Whether the image stays in the set."""
        return all(finding.effect != "skipped" for finding in self.findings)


def check_headers(annotations: AnnotationSet, rows: Sequence[int] | None = None) -> list[HeaderCheck]:
    """Check the images `rows` of a split, of 0..N-1; None: all."""
    chosen = list(range(len(annotations)) if rows is None else rows)
    sizes = [(height, width) for height, width in annotations.sizes[chosen].tolist()]
    return list(map(check_header, annotations.image_paths[chosen].tolist(), sizes))


def with_header_sizes(annotations: AnnotationSet) -> AnnotationSet:
    """Fill in the sizes that the annotations do not give; 0, 0 stays where the image cannot be read."""
    rows = np.flatnonzero((annotations.sizes == 0).any(axis=1))
    sizes = annotations.sizes.copy()
    for row, check in zip(rows, check_headers(annotations, rows.tolist()), strict=True):
        sizes[row] = check.height, check.width
    return replace(annotations, sizes=sizes)


def check_header(path: str, annotated_size: tuple[int, int] = (0, 0)) -> HeaderCheck:
    """Check one image file, which is never waited for. annotated_size: (height, width); 0, 0 if unknown."""
    try:
        header = read_whole_header(path)
        orientation = orientation_to_apply(path, header, annotated_size)
    except ImageError as reason:
        return HeaderCheck(0, 0, [image_finding(path, reason)])
    height, width = (header.height, header.width) if orientation < 5 else (header.width, header.height)
    place, size = printable(path), f"is {width} x {height} px"
    short, long = sorted((height, width))
    checks = (
        (short < MIN_IMAGE_SIDE, rules.IMAGE_TOO_SMALL, f"{size}; both sides must be at least {MIN_IMAGE_SIDE} px"),
        (long > MAX_ASPECT * short, rules.EXTREME_SHAPE, f"{size}, over {MAX_ASPECT:g}:1"),
        (header.is_animated, rules.FIRST_FRAME, "has several frames or pages; the first is taken"),
        (header.is_deep, rules.DEEP_IMAGE, "has 16 bits per channel; the upper 8 are used"),
        (header.has_alpha, rules.TRANSPARENT, "has transparent parts; they are shown in their own colours"),
    )
    findings = [rule.broken(place, problem) for is_so, rule, problem in checks if is_so]
    return HeaderCheck(height, width, findings, orientation == header.orientation)


def image_finding(file: str, reason: ImageError) -> Finding:
    """Turn the decoder's error into a finding."""
    rule = rules.IMAGE_SIZE_DIFFERS if isinstance(reason, ImageSizeError) else rules.IMAGE_UNREADABLE
    return rule.broken_by(file, reason)


def check_before_start(annotations: AnnotationSet, image_size: int, max_bad_fraction: float) -> AnnotationSet:
    """Skip the images whose header shows that they cannot be used, with their objects, and add the findings.

    At most `START_IMAGES` images are checked, evenly spaced, so that training starts soon. Raises AnnotationError if
    more than `max_bad_fraction` of them are bad, or all. image_size: side of the network input, px.
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
    num_tiny = int(((annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale < 1).any(axis=1).sum())
    problem = f"{num_tiny} of {len(sizes)} boxes are less than 1 px wide or high at {image_size} px: not trained on"
    return rules.BOX_TINY.counted(annotations.source, problem, num_tiny)
