"""Opens a COCO annotation file: JSON text -> three checked lists and their integer columns."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onestage.data.annotations import IDS_AS_TEXT
from onestage.errors import AnnotationError
from onestage.files import printable, read_file
from onestage.types import Finding, JSONDict

TABLES = ("images", "annotations", "categories")
FRESH_COPY = "Take a fresh copy of the file, or export it again as COCO JSON."
MANY_BYTES = 8 << 20  # a smaller file is parsed at once as it is
# A list of numbers and lists, up to the comma before the next key. Never part of a text: there a quote is escaped.
POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[-+0-9eE.,\s\[\]]*\]\s*,(?=\s*")')
OTHER_PATH = "Correct data.root, data.train_annotations or data.val_annotations; or take a fresh copy of the file."


def load_tables(
    annotation_file: Path, *, with_outlines: bool = True
) -> tuple[list[JSONDict], list[JSONDict], list[JSONDict]]:
    """Return the lists `images`, `annotations` and `categories`, checked to hold objects.

    Args:
        annotation_file: the JSON file.
        with_outlines: whether `segmentation` is needed. It is three quarters of COCO's files, and without it they are
            read in a third of the time and memory.

    Raises:
        AnnotationError: the file is missing, or not such JSON.
    """
    source = printable(annotation_file)
    content = _load(annotation_file, with_outlines)
    images, annotations, categories = (_table(source, content, name) for name in TABLES)
    return images, annotations, categories


def malformed(place: str, problem: str, remedy: str) -> AnnotationError:
    """Return the error to raise for an annotation file."""
    return AnnotationError(f"{place}: {problem}.\n{remedy}")


def _load(annotation_file: Path, with_outlines: bool) -> JSONDict:
    """Parse the file and check that its top level is an object."""
    source = printable(annotation_file)
    parsed = None if with_outlines else _parse_without_outlines(annotation_file)
    if parsed is None:
        content = _read(annotation_file)
        repeated = any(content.count(f'"{name}"'.encode()) > 1 for name in TABLES)
        parsed = _parse_json(source, _decoded(source, content), repeated)
    if isinstance(parsed, list):
        problem = "the top level is a list, so this is a detections (results) file; a COCO annotation file is an object"
        raise malformed(source, f"{problem} with {', '.join(TABLES)}", "Give the annotation file it was computed for.")
    if not isinstance(parsed, dict):
        raise malformed(source, f"the top level is a {type(parsed).__name__}; it must be an object", FRESH_COPY)
    return parsed


def _read(annotation_file: Path) -> bytes:
    content = read_file(annotation_file, AnnotationError, "a COCO annotation file (JSON)", OTHER_PATH)
    if content[:2] in (b"PK", b"\x1f\x8b"):
        source = printable(annotation_file)
        raise AnnotationError(f"{source}: is compressed; it must be JSON text. Unpack it first (unzip, gunzip).")
    return content


def _decoded(source: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        problem = f"is not UTF-8 text (byte {reason.start}); JSON must be"
        raise AnnotationError(f"{source}: {problem}. Convert it (iconv -t UTF-8), or export it again.") from None


def _parse_without_outlines(annotation_file: Path) -> Any:
    """Parse what is left of a large file without its polygons; None where it has none, or something is wrong with it.

    What is wrong is then said about the whole file, so that lines and columns are right. Each copy of the text is let
    go as soon as the next is made: COCO's is half a gigabyte.
    """
    source = printable(annotation_file)
    content = _read(annotation_file)
    if len(content) < MANY_BYTES or any(content.count(f'"{name}"'.encode()) > 1 for name in TABLES):
        return None
    content = POLYGONS.sub(b"", content)
    try:
        text = _decoded(source, content)
        del content
        return _parse_json(source, text, repeated=False)
    except AnnotationError:
        return None


def _parse_json(source: str, text: str, repeated: bool) -> Any:
    """Parse JSON. `repeated`: a table's name occurs twice, so look for repeated keys too, which is slow."""
    was_enabled = gc.isenabled()
    gc.disable()  # nothing here is garbage, and looking for it among a million new objects doubles the time
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys if repeated else None)
    except RecursionError:
        raise malformed(source, "is nested too deeply for an annotation file", FRESH_COPY) from None
    except json.JSONDecodeError as reason:
        is_cut = reason.msg.startswith("Unterminated") or len(text) - reason.pos < 16
        cut = f"; the file ends there, after {len(text)} characters, so it was cut off" if is_cut else ""
        raise malformed(
            f"{source}:{reason.lineno}:{reason.colno}", f"is not JSON: {reason.msg}{cut}", FRESH_COPY
        ) from None
    except ValueError as reason:  # a repeated key; an integer of thousands of digits
        raise malformed(source, f"is not usable JSON: {reason}", FRESH_COPY) from None
    finally:
        if was_enabled:
            gc.enable()


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> JSONDict:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object, and only one of them would count")
    return result


def _table(source: str, content: JSONDict, name: str) -> list[JSONDict]:
    """Return one of the three lists, checked to hold objects."""
    if name not in content:
        found = ", ".join(sorted(map(str, content))[:8]) or "none"
        remedy = 'A set without boxes has "annotations": [].' if name == "annotations" else FRESH_COPY
        raise malformed(
            source, f"has no {name!r} (keys: {found}); a COCO annotation file has {', '.join(TABLES)}", remedy
        )
    table = content[name]
    if not isinstance(table, list) or not set(map(type, table)) <= {dict}:
        raise malformed(source, f"{name!r} must be a list of objects", FRESH_COPY)
    if not table and name != "annotations":
        raise malformed(
            source, f"{name!r} is empty; at least one is needed", "Give a split that holds images and classes."
        )
    return table


def integer_column(
    source: str, table: list[JSONDict], key: str, noun: str, findings: list[Finding]
) -> npt.NDArray[np.int64]:
    """Return one key of every entry as int64. Strings of digits are read if all are such; all else is refused.

    Args:
        source: the file, for messages.
        table: the entries.
        key: the key.
        noun: what one entry is, in the singular.
        findings: where strings are reported.

    Raises:
        AnnotationError: a value is not a 64-bit integer.
    """
    values = [entry.get(key) for entry in table]
    kinds = set(map(type, values))
    remedy = f"Write every {key} of the file as an integer."
    try:
        if kinds <= {int}:
            return np.array(values, dtype=np.int64)
        if kinds == {str}:
            numbers = np.array([int(str(value)) for value in values], dtype=np.int64)
            problem = f"every {key} of the {noun}s is a string; read as integers"
            findings.append(IDS_AS_TEXT.broken(source, problem, len(numbers)))
            return numbers
    except (ValueError, OverflowError):
        pass
    wanted = str if kinds == {str} else int
    number = next(
        (n for n, value in enumerate(values) if type(value) is not wanted or not str(value).lstrip("-").isdigit()), 0
    )
    raise malformed(
        source, f"{noun} number {number} has {key} {values[number]!r:.80}; it must be a 64-bit integer", remedy
    )
