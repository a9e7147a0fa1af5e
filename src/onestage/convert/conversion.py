"""Converts a data set between COCO, VOC and YOLO: all of it or nothing, and never over something that is there."""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from onestage.data.annotations import require_same_categories, select_images
from onestage.data.image_headers import check_headers
from onestage.data.layouts import SplitSource as Source
from onestage.data.layouts import read_splits
from onestage.data.writers import Losses, WritableSplit, write_coco, write_voc, write_yolo
from onestage.errors import AnnotationError, ConfigError, DataError
from onestage.files import printable
from onestage.types import AnnotationSet, Finding

Format = Literal["coco", "voc", "yolo"]
ImageTransfer = Literal["copy", "link"]

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
YOLO_SPLITS = ("train", "val", "test")  # the only keys that data.yaml can have
OUTLINE = re.compile(rb'"segmentation"\s*:\s*[\[{]\s*[^\]}\s]|"keypoints"\s*:\s*\[\s*\d')
SPARE_BYTES = 64 << 20  # for the annotations, and so that the disk is not filled to the brim


class Conversion(NamedTuple):
    """What was written, and what was not."""

    splits: list[WritableSplit]
    losses: Losses  # what the format cannot carry -> how often
    findings: list[Finding]  # of the source: what was left out and why


def convert(
    sources: Sequence[Source],
    format: Format,
    out: Path,
    *,
    images: ImageTransfer = "copy",
    name_by_split: dict[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> Conversion:
    """Write a data set in another format, or in the same one, cleaned.

    Args:
        sources: its splits; see `find_sources`.
        format: to write.
        out: the folder to create; it must not exist, or be empty.
        images: whether image files are copied, or linked (hard links, which take no space and need the same disk).
        name_by_split: which splits to take, and what to call them; None: all, as they are called.
        max_bad_fraction: 0..1, the fraction of boxes, and of images, that may be left out.

    Raises:
        ConfigError: `out` is there already, or the names of the splits do not fit.
        DataError: the source cannot be read, or the disk is full.
    """
    _require_free(out)
    names = _split_names([source.name for source in sources], format, name_by_split)
    chosen = [source for source in sources if source.name in names]
    annotation_sets = _read(chosen, max_bad_fraction)
    losses: Losses = Counter()
    losses["COCO files with outlines or keypoints: only boxes are kept"] += _num_with_outlines(chosen)
    complete = [_with_sizes(annotations, format, losses) for annotations in annotation_sets]
    paths = [annotations.image_paths.tolist() for annotations in complete]
    # VOC has one folder for the images of all splits, in which an image of two splits lies once.
    shared = _unique_names([path for split_paths in paths for path in split_paths]) if format == "voc" else None
    file_names = [shared or _unique_names(split_paths) for split_paths in paths]
    renamed = {(path, name) for by_path in file_names for path, name in by_path.items() if Path(path).name != name}
    losses["images get another name"] += len(renamed)
    splits = [
        WritableSplit(names[source.name], annotations, [by_path[path] for path in annotations.image_paths.tolist()])
        for source, annotations, by_path in zip(chosen, complete, file_names, strict=True)
    ]
    losses += _write(splits, format, out, images)
    return Conversion(splits, +losses, [finding for found in annotation_sets for finding in found.findings])


def _require_free(out: Path) -> None:
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {printable(out)}: is there already, and nothing is overwritten.\nGive a new folder.")


def _split_names(found: Sequence[str], format: Format, given: dict[str, str] | None) -> dict[str, str]:
    """Return source name -> name to write."""
    unknown = set(given or {}) - set(found)
    if unknown:
        raise ConfigError(f"--splits: there is no {', '.join(sorted(unknown))}; there are {', '.join(found)}.")
    names = given or {name: _yolo_name(name) if format == "yolo" else name for name in found}
    remedy = "Name them: --splits " + " ".join(f"{name}={new}" for name, new in zip(found, YOLO_SPLITS, strict=False))
    if len(set(names.values())) < len(names):
        raise ConfigError(f"Several splits would be called the same: {', '.join(names.values())}.\n{remedy}")
    wrong = [name for name in names.values() if not re.fullmatch(r"\w[\w.-]*", name)]
    if format == "yolo":
        wrong = [name for name in names.values() if name not in YOLO_SPLITS]
    if wrong:
        rule = "train, val or test" if format == "yolo" else "letters, digits, '.', '-' and '_'"
        raise ConfigError(f"A split cannot be called {', '.join(map(repr, wrong))}; it must be {rule}.\n{remedy}")
    return names


def _yolo_name(name: str) -> str:
    """Return train for train2017 and trainval; val for val2017 and valid."""
    return next((word for word in YOLO_SPLITS if name.startswith(word)), name)


def _read(sources: Sequence[Source], max_bad_fraction: float) -> list[AnnotationSet]:
    """Read the splits, with one order of classes."""

    def limited(source: Source) -> Source:
        return source._replace(read=lambda _: source.read(max_bad_fraction))

    annotation_sets: list[AnnotationSet] = []
    for split in read_splits([limited(source) for source in sources]):
        if split.annotations is None:
            finding = split.findings[0]
            raise AnnotationError(f"{finding.line}.\n{finding.remedy}")
        require_same_categories((annotation_sets or [split.annotations])[0], split.annotations)
        annotation_sets.append(split.annotations)
    for name in annotation_sets[0].class_names:
        if not name.isprintable():
            raise AnnotationError(f"{annotation_sets[0].source}: class {name!r} cannot be written.\nRename the class.")
    return annotation_sets


def _num_with_outlines(sources: Sequence[Source]) -> int:
    return sum(source.format == "COCO" and OUTLINE.search(source.path.read_bytes()) is not None for source in sources)


def _with_sizes(annotations: AnnotationSet, format: Format, losses: Losses) -> AnnotationSet:
    """Fill in sizes that the source does not give. What cannot be opened is left out, and what YOLO would misplace.

    YOLO's fractions are of the image as it is shown, turned by its EXIF orientation: it has no word for others.
    """
    is_asked = np.ones(len(annotations), bool) if format == "yolo" else (annotations.sizes <= 0).any(axis=1)
    rows = np.flatnonzero(is_asked)
    unsized = replace(annotations, sizes=np.zeros_like(annotations.sizes))
    checks = check_headers(unsized, rows.tolist())
    sizes = annotations.sizes.copy()
    keeps = np.ones(len(annotations), bool)
    for row, check in zip(rows.tolist(), checks, strict=True):
        shown = (check.height, check.width)
        if not check.is_usable:
            losses["images that cannot be opened are left out"] += 1
            keeps[row] = False
        elif sizes[row].min() <= 0:
            sizes[row] = shown
        elif tuple(sizes[row].tolist()) != shown:
            losses["images that are not annotated as they are shown (EXIF) are left out"] += 1
            keeps[row] = False
    if not keeps.any():
        raise DataError(f"{annotations.source}: none of its images can be opened.\nCorrect the image folder.")
    return select_images(replace(annotations, sizes=sizes), np.flatnonzero(keeps))


def _unique_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a file name for each path; stems are unique in any case, since labels are named after them."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(paths):
        path = Path(text)
        # A number at the end of a line of VOC's lists would be read as a flag.
        plain = re.sub(r"\s+(?=(-1|0|1)$)", "_", path.stem).strip()
        stem = "".join(sign if sign.isprintable() and sign not in "/\\" else "_" for sign in plain)
        candidates = [stem, f"{path.parent.name}_{stem}", *(f"{stem}_{number}" for number in range(2, len(paths) + 2))]
        stem = next(name for name in candidates if name.casefold() not in taken)
        taken.add(stem.casefold())
        names[text] = stem + path.suffix
    return names


def _write(splits: list[WritableSplit], format: Format, out: Path, images: ImageTransfer) -> Losses:
    """Write everything beside `out`, then give it its name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if images == "copy":
        _require_space(splits, out.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        losses = WRITERS[format](partial, splits)
        for split in splits:
            _transfer(split, partial / _image_folder(format, split.name), images)
        _require_free(out)
        partial.rename(out)
    except OSError as reason:
        raise DataError(f"{printable(out)}: cannot be written: {reason.strerror}.\nNothing was left there.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return losses


def _image_folder(format: Format, split: str) -> Path:
    return {"coco": Path(split), "voc": Path("JPEGImages"), "yolo": Path("images", split)}[format]


def _transfer(split: WritableSplit, folder: Path, images: ImageTransfer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for text, name in zip(split.annotations.image_paths.tolist(), split.file_names, strict=True):
        source = Path(text).resolve()  # a link to a link may lead out of the new folder
        target = folder / name
        if target.exists():  # an image of two splits, in VOC
            continue
        try:
            if images == "link":
                os.link(source, target)
            else:
                shutil.copyfile(source, target)
        except OSError as reason:
            remedy = "Copy the images: --images copy" if images == "link" else "Correct the file."
            raise DataError(
                f"{printable(source)}: cannot be {'linked' if images == 'link' else 'copied'} to {printable(folder)}: "
                f"{reason.strerror}.\n{remedy}"
            ) from None


def _require_space(splits: list[WritableSplit], folder: Path) -> None:
    paths = {path for split in splits for path in split.annotations.image_paths.tolist()}
    needed = sum(Path(path).stat().st_size for path in paths) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{printable(folder)}: {needed / 1e9:.1f} GB are needed for copies of the images, {free / 1e9:.1f} GB are "
            "free.\nLink them: --images link, or give another folder."
        )


def _umask() -> int:
    """Return the mask that new folders get; `mkdtemp` makes them private, whatever it is."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
