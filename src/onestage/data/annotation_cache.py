"""Keeps what was parsed from large annotation files, so that the next start does not parse them again."""

import hashlib
import json
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from onestage import __version__
from onestage.data.cache_folder import cache_folder
from onestage.types import AnnotationSet, Finding

MIN_BYTES = 8 << 20  # a smaller file is parsed in less than a second
MAX_ENTRIES = 16  # COCO train takes 60 MB; the oldest is removed
SCHEMA = 1  # raise it when parsing gives other results or the file has other fields, and older entries are passed over
TEXT_FIELDS = ("source", "class_names", "category_ids", "findings")
ARRAY_FIELDS = tuple(field.name for field in fields(AnnotationSet) if field.name not in TEXT_FIELDS)

logger = logging.getLogger(__name__)


def parse_once(
    annotation_file: Path, image_root: Path, settings: Sequence[object], parse: Callable[[], AnnotationSet]
) -> AnnotationSet:
    """Return what `parse` returns, from the cache where the same was parsed before.

    An entry is found by a hash of the annotation file's bytes, both paths and the settings, and counts only while no
    image folder has changed: which images are there is part of the result. It lies in `cache_folder()`, is read without
    pickle, and is passed over when it is damaged. If it cannot be written, nothing is said: nothing is lost.

    Args:
        annotation_file: what is parsed.
        image_root: the folder of the images.
        settings: whatever else the result depends on; anything that JSON can hold.
        parse: parses the file.

    Raises:
        DataError: from `parse`.
    """
    try:
        if annotation_file.stat().st_size < MIN_BYTES:
            return parse()
        with annotation_file.open("rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError:
        return parse()  # says what is wrong
    names = [str(annotation_file), str(annotation_file.resolve()), str(image_root), str(image_root.resolve())]
    key = json.dumps([SCHEMA, __version__, content, *names, *settings])
    entry = cache_folder() / "annotations" / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.npz"
    found = _load(entry)
    if found is not None:
        logger.info("%s: taken from %s", found.source, entry)
        return found
    start = time.time_ns()
    annotations = parse()
    with suppress(OSError):
        _save(entry, annotations, image_root, start)
    return annotations


def _load(entry: Path) -> AnnotationSet | None:
    """Return an entry; None where there is none that can be used."""
    try:
        with np.load(entry, allow_pickle=False) as stored:
            texts = json.loads(stored["texts"].tobytes())
            if any(Path(folder).stat().st_mtime_ns != changed for folder, changed in texts["folders"]):
                return None
            arrays = {name: stored[name] for name in ARRAY_FIELDS}
        return AnnotationSet(
            source=texts["source"],
            class_names=tuple(texts["class_names"]),
            category_ids=tuple(texts["category_ids"]),
            findings=tuple(Finding(*values) for values in texts["findings"]),
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _save(entry: Path, annotations: AnnotationSet, image_root: Path, start: int) -> None:
    """Write an entry, whole or not at all."""
    folders = {image_root}
    for parent in {os.path.dirname(path) for path in annotations.image_paths.tolist()}:  # noqa: PTH120  # of 100,000
        folders |= {folder for folder in (Path(parent), *Path(parent).parents) if folder.is_relative_to(image_root)}
    changes = [(str(folder), folder.stat().st_mtime_ns) for folder in sorted(folders)]
    if max(changed for _, changed in changes) >= start:  # while it was listed: what was seen is uncertain
        return
    texts = {name: getattr(annotations, name) for name in TEXT_FIELDS} | {"folders": changes}
    arrays = {name: getattr(annotations, name) for name in ARRAY_FIELDS}
    entry.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=entry.parent, suffix=".unfinished")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, texts=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8), **arrays)
        Path(unfinished).replace(entry)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    for old in sorted(entry.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MAX_ENTRIES]:
        old.unlink(missing_ok=True)
