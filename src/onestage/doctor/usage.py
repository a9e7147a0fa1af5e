"""Use of a data set's files: what belongs to no split, and the command that trains on the rest."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onestage.data.annotations import NO_TRAINING_SPLIT, NOT_DIVISIBLE, NOT_USED
from onestage.data.coco import COCO
from onestage.data.folder import find_linked_folders
from onestage.data.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from onestage.data.layouts import Split
from onestage.data.source import Source, role_of
from onestage.data.splits import DEFAULT_VAL_FRACTION, split_by_fraction
from onestage.errors import ConfigError
from onestage.files import is_hidden, printable, spellings
from onestage.types import AnnotationSet, Finding

MAX_TRIED = 1000  # images; a larger set can be divided


def check_use(splits: Sequence[Split], usable: Mapping[str, AnnotationSet]) -> list[Finding]:
    """Find splits that training misses, and files of a data set that belong to no split.

    splits: all of one path, as read; usable: the same without images that cannot be used.
    """
    source = splits[0].source
    findings, place = [], printable(source.path)
    if "train" not in source.splits:
        problem = f"there is only {', '.join(source.splits)}"
        findings.append(NO_TRAINING_SPLIT.broken(place, problem))
    elif "val" not in source.splits and len(usable.get("train", ())) in range(1, MAX_TRIED):
        try:
            split_by_fraction(usable["train"], DEFAULT_VAL_FRACTION)
        except ConfigError as reason:
            findings.append(NOT_DIVISIBLE.broken(place, f"no validation split, and {str(reason).splitlines()[0]}"))
    for noun, names in _find_unused(source, splits):
        if names:
            problem = f"{len(names)} {noun}, such as {printable(names[0])}"
            findings.append(NOT_USED.broken(place, problem, len(names)))
    return findings


def training_command(paths: Sequence[Path], image_root: Path | None, splits: Sequence[Split]) -> str:
    """Return the command that trains on what was read; empty if the paths have no form that one command names."""
    if len(paths) == 1 and image_root is None:
        return f"make train DATA={shlex.quote(str(paths[0]))}"
    if any(split.source.format != "COCO" or split.source.path.is_dir() for split in splits):
        return ""
    files = {role_of(split.name) or "train": split.source.path for split in splits}
    options = {"source": "onestage.data.COCO", "source.path": "."}
    options |= {f"source.{role}": str(file) for role, file in files.items()}
    options |= {f"source.{role}_images": str(image_root) for role in files if image_root is not None}
    words = " ".join(f"--data.{key} {shlex.quote(value)}" for key, value in options.items())
    return f"onestage fit --config configs/voc_ssd300.yaml {words}" if len(files) == len(splits) else ""


def _find_unused(source: Source, splits: Sequence[Split]) -> Iterator[tuple[str, list[str]]]:
    """Yield (noun, files) for the files below the folder of a data set that no split uses."""
    sets = [split.annotations for split in splits if split.annotations is not None]
    if len(sets) < len(splits):
        return
    if not isinstance(source, COCO):
        yield "lists or folders are of no split", source.unused()
    if not source.path.is_dir():
        return
    used = {os.path.normpath(path) for annotations in sets for path in annotations.image_paths.tolist()}
    skipped = (finding.place for split in splits for finding in split.findings if finding.effect == "skipped")
    skipped_stems = {Path(place.partition(": ")[0]).stem for place in skipped}
    stems = skipped_stems.union(Path(path).stem for path in used)
    files = list(_list_all(source.path))
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES) and file not in used]
    yield "images are in no split", [file for file in images if Path(file).stem not in skipped_stems]
    unread = [file for file in files if file.lower().endswith(UNREAD_SUFFIXES)]
    kinds = ", ".join(sorted({Path(file).suffix.lower() for file in unread}))
    yield f"images are of a type that is not read ({kinds})", unread
    yield "folders are links, which are not searched", [str(path) for path in find_linked_folders(source.path)]
    if isinstance(source, COCO):
        used |= {os.path.normpath(source.annotation_file(role)) for role in source.splits}
    types = ".json" if source.format == "VOC" else (".json", ".xml")
    yield "other JSON or XML files are not read", [f for f in files if f.lower().endswith(types) and f not in used]
    if source.format in ("VOC", "YOLO"):
        suffix = {"VOC": ".xml", "YOLO": ".txt"}[source.format]
        labels = [Path(file) for file in files if file.lower().endswith(suffix) and not file.endswith("classes.txt")]
        folders = {label.parent for label in labels if label.stem in stems}  # other texts lie elsewhere
        orphans = [str(f) for f in labels if f.parent in folders and stems.isdisjoint(spellings(f.stem))]
        yield f"annotation files ({suffix}) belong to no image", orphans


def _list_all(folder: Path) -> Iterator[str]:
    """Yield the path of every file below a folder, in order; nothing hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        visible = sorted(name for name in names if not is_hidden(name))
        yield from (os.path.normpath(os.path.join(parent, name)) for name in visible)  # noqa: PTH118
