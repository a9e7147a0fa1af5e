"""The command `onestage convert`: data sets between COCO, VOC and YOLO, complete or not at all."""

import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from onestage.data.annotations import require_few_skipped, require_same_categories, select_images
from onestage.data.image_headers import check_headers
from onestage.data.layouts import Split, find_splits, read_splits
from onestage.data.source import role_of
from onestage.data.writers import Losses, WritableSplit, write_coco, write_voc, write_yolo
from onestage.errors import AnnotationError, ConfigError, DataError, require
from onestage.files import atomic_folder, printable
from onestage.types import AnnotationSet, Finding

Format = Literal["coco", "voc", "yolo"]
ImageTransfer = Literal["copy", "link"]

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
SPLIT_NAMES = ("train", "val", "test")  # every reader knows these
OUTLINE = re.compile(rb'"segmentation"\s*:\s*[\[{]\s*[^\]}\s]|"keypoints"\s*:\s*\[\s*\d')
OPTION = "--max_bad_fraction"
NUM_SHOWN = 5  # skipped items that the report quotes


class Conversion(NamedTuple):
    """What was written, and what was not."""

    splits: list[WritableSplit]
    losses: Losses  # what the format cannot carry -> how often
    findings: list[Finding]  # of the source: skipped items and why


def convert(
    paths: list[Path],
    *,
    to: Format,
    out: Path,
    images: ImageTransfer = "copy",
    splits: list[str] | None = None,
    image_root: Path | None = None,
    max_bad_fraction: float = 0.01,
) -> int:
    """Convert a data set between COCO, VOC and YOLO. It is read as training reads it.

    Nothing is overwritten, and the new folder appears only when it is complete. The report says what was skipped and
    what the format cannot carry:

      all    outlines, keypoints, licences; boxes and images that cannot be used. `--to coco` thus cleans a COCO file
      coco   nothing else; VOC's `difficult` becomes a key that other tools ignore
      voc    category ids, classes without objects, areas of outlines; crowds become difficult objects; boxes of at
             most one pixel become a little wider
      yolo   category ids, areas of outlines, `difficult`, the second of two equal objects, crowds, and images that are
             not annotated as they are shown (EXIF)

    Examples:
      onestage convert data/coco/annotations/instances_val2017.json --to yolo --out data/coco_yolo
      onestage convert data/VOCdevkit --to coco --out data/voc_coco --images link
      onestage convert data/a.json data/b.json --to voc --out data/mine_voc --splits a=train b=val

    Args:
        paths: COCO JSON, VOC folder, YOLO data.yaml or folder; several are splits of one set.
        to: the format to write.
        out: the folder to create.
        images: copy image files, or make hard links, which take no space and need the same disk.
        splits: the splits to take, each NAME or NAME=NEW with a new name of train, val or test; all by default.
        image_root: folder of the images of COCO files; found automatically in the usual places.
        max_bad_fraction: fraction of boxes, and of images, that may be skipped, in [0, 1].

    Raises:
        ConfigError: `out` exists, or the names of the splits do not fit.
        DataError: the data set cannot be read, or not be written.
    """
    require(0 <= max_bad_fraction <= 1, "--max_bad_fraction", max_bad_fraction, "in [0, 1]")
    pairs = [word.partition("=") for word in splits or ()]
    names = {name: new or name for name, _, new in pairs} or None
    conversion = convert_splits(find_splits(paths, image_root), to, out, images, names, max_bad_fraction)
    print(_report(conversion, to, out))
    return 0


def convert_splits(
    sources: Sequence[Split],
    to: Format,
    out: Path,
    images: ImageTransfer = "copy",
    name_by_split: dict[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> Conversion:
    """Write the splits that `find_splits` found; see `convert`. name_by_split: split -> new name; None: all."""
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {printable(out)}: is there already, and nothing is overwritten.\nGive a new folder.")
    names = _split_names([source.name for source in sources], name_by_split)
    chosen = [source for source in sources if source.name in names]
    annotation_sets: list[AnnotationSet] = []
    for split in read_splits(chosen, max_bad_fraction, OPTION):
        if split.annotations is None:
            raise AnnotationError(f"{split.findings[0].line}.\n{split.findings[0].remedy}")
        annotation_sets.append(split.annotations)
        require_same_categories(annotation_sets[0], split.annotations)
    losses: Losses = Counter()
    files = [file for annotations in annotation_sets if (file := Path(annotations.source)).is_file()]
    num_with_outlines = sum(OUTLINE.search(file.read_bytes()) is not None for file in files)
    losses["COCO files with outlines or keypoints: only boxes are kept"] += num_with_outlines
    complete = [_with_sizes(annotations, to, losses, max_bad_fraction) for annotations in annotation_sets]
    paths = [annotations.image_paths.tolist() for annotations in complete]
    # VOC has one folder for the images of all splits, in which an image of two splits lies once.
    shared = _unique_names(list(chain(*paths))) if to == "voc" else None
    file_names = [shared or _unique_names(split_paths) for split_paths in paths]
    renamed = {(path, name) for by_path in file_names for path, name in by_path.items() if Path(path).name != name}
    losses["images get another name"] += len(renamed)
    written = [
        WritableSplit(names[source.name], annotations, [by_path[path] for path in split_paths])
        for source, annotations, by_path, split_paths in zip(chosen, complete, file_names, paths, strict=True)
    ]
    try:
        with atomic_folder(out) as unfinished:
            losses += WRITERS[to](unfinished, written)
            for part in written:
                folder = {"coco": part.name, "voc": "JPEGImages", "yolo": f"images/{part.name}"}[to]
                _transfer(part, unfinished / folder, images)
    except OSError as reason:
        raise DataError(f"{printable(out)}: cannot be written: {reason.strerror}.\nNothing was left there.") from None
    return Conversion(written, +losses, [finding for found in complete for finding in found.findings])


def _split_names(found: Sequence[str], given: dict[str, str] | None) -> dict[str, str]:
    """Return name of a split -> name to write: train, val or test, which every reader knows."""
    unknown = sorted(set(given or {}) - set(found))
    if unknown:
        raise ConfigError(f"--splits: there is no {', '.join(unknown)}; there are {', '.join(found)}.")
    names = given or {name: role_of(name) or ("train" if len(found) == 1 else name) for name in found}
    written = list(names.values())
    if len(set(written)) < len(written) or not set(written) <= set(SPLIT_NAMES):
        new_names = " ".join(f'"{name}={new}"' for name, new in zip(found, SPLIT_NAMES, strict=False))
        raise ConfigError(
            f"--splits: the names must be train, val or test, each once, got {', '.join(written)}.\n"
            f"Name the splits: --splits {new_names}"
        )
    return names


def _with_sizes(annotations: AnnotationSet, to: Format, losses: Losses, max_bad_fraction: float) -> AnnotationSet:
    """Fill in sizes that the source does not give; skip images that training skips, or that YOLO would misplace.

    YOLO's fractions are of the image as it is shown, turned by its EXIF orientation.
    """
    checks = check_headers(annotations)
    is_usable = np.array([check.is_usable for check in checks])
    is_shown = np.array([to != "yolo" or check.is_as_shown for check in checks])
    sizes = np.array([(check.height, check.width) for check in checks], dtype=np.int32).reshape(-1, 2)
    is_kept = is_usable & is_shown
    source, num_boxes = annotations.source, len(annotations.boxes)
    findings = (*annotations.findings, *(finding for check in checks for finding in check.findings))
    require_few_skipped(source, int(is_usable.sum()), num_boxes, findings, max_bad_fraction, OPTION)
    turned = "images that are not annotated as they are shown (EXIF) are skipped"
    losses[turned] += int(np.count_nonzero(is_usable & ~is_shown))
    if not is_kept.any():
        raise DataError(f"{annotations.source}: none of its images can be opened.\nCorrect the image folder.")
    return select_images(replace(annotations, sizes=sizes, findings=findings), np.flatnonzero(is_kept))


def _unique_names(paths: Sequence[str]) -> dict[str, str]:
    """Return a file name for each path. Stems are unique even without case, since labels are named after them."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for text in dict.fromkeys(paths):
        path = Path(text)
        # A number at the end of a line of VOC's lists would be read as a flag.
        plain = re.sub(r"\s+(?=(-1|0|1)$)", "_", path.stem).strip()
        stem = "".join(sign if sign.isprintable() and sign not in "/\\" else "_" for sign in plain)
        candidates = chain([stem, f"{path.parent.name}_{stem}"], (f"{stem}_{number}" for number in count(2)))
        stem = next(name for name in candidates if name.casefold() not in taken)
        taken.add(stem.casefold())
        names[text] = stem + path.suffix
    return names


def _transfer(split: WritableSplit, folder: Path, images: ImageTransfer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for text, name in zip(split.annotations.image_paths.tolist(), split.file_names, strict=True):
        source, target = Path(text).resolve(), folder / name  # resolved: a link to a link may lead out of the folder
        try:
            if not target.exists():  # an image of two splits, in VOC
                (os.link if images == "link" else shutil.copyfile)(source, target)
        except OSError as reason:
            problem = f"--images {images} to {printable(folder)} fails: {reason.strerror}"
            remedies = {"link": "Copy the images: --images copy", "copy": "Correct the file, or choose another --out."}
            raise DataError(f"{printable(source)}: {problem}.\n{remedies[images]}") from None


def _report(conversion: Conversion, to: Format, out: Path) -> str:
    """Return what was written, what was not, and how to train on it."""
    lines = [
        f"{name}: {len(annotations)} images, {len(annotations.boxes)} boxes, {len(annotations.class_names)} classes"
        for name, annotations, _ in conversion.splits
    ]
    skipped = [finding.line for finding in conversion.findings if finding.effect == "skipped"]
    if skipped:
        lines += ["", f"skipped, because it cannot be used ({len(skipped)}; see all: onestage doctor):"]
        lines += [f"  {line}" for line in skipped[:NUM_SHOWN]]
    if conversion.losses:
        lines += ["", f"what {to.upper()} cannot carry:"]
        lines += [f"  {number:>7}  {what}" for what, number in conversion.losses.items()]
    return "\n".join([*lines, "", f"written to {out}. To train on it: make train DATA={shlex.quote(str(out))}"])
