"""Reads one XML file of PASCAL VOC (devkit of VOC2012, section 4)."""

from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from onestage.data.annotations import XML_ENTITIES, XML_MALFORMED, Rule
from onestage.errors import AnnotationError
from onestage.files import printable, read_file

CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_XML_BYTES = 16 << 20  # some 50,000 objects; a record of VOC has a few kB


class VOCObject(NamedTuple):
    """One `object` element, as written."""

    place: str  # file and number of the object
    class_name: str
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax; 1-based, inclusive; NaN where not a number
    is_difficult: bool
    problem: str | None  # the rule that its bndbox breaks


class VOCRecord(NamedTuple):
    """One XML file."""

    size: tuple[int, int]  # (height, width); 0, 0 where not given
    objects: list[VOCObject]
    file_name: str = ""  # the image, as the file itself calls it


class MalformedRecordError(AnnotationError):
    """An XML file that cannot be used, by a rule."""

    def __init__(self, rule: Rule, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.finding = rule.broken(place, problem)


def read_record(path: Path) -> VOCRecord:
    """Parse one XML file.

    Raises:
        MalformedRecordError: it is no such XML.
        AnnotationError: it cannot be read at all.
    """
    content = read_file(path, AnnotationError, "a VOC annotation (XML)", "Export it again.", MAX_XML_BYTES)
    place = printable(path)
    try:
        root = fromstring(content, forbid_dtd=True)
    except ParseError as reason:
        line, column = reason.position
        problem = f"is not XML: {reason}{_encoding_hint(content)}"
        raise MalformedRecordError(XML_MALFORMED, f"{place}:{line}:{column + 1}", problem) from None
    except DefusedXmlException:
        problem = "has a DOCTYPE or entities, which an annotation needs not: refused"
        raise MalformedRecordError(XML_ENTITIES, place, problem) from None
    except (ValueError, LookupError) as reason:  # an encoding that the parser does not know
        problem = f"cannot be decoded ({reason}); save it as UTF-8"
        raise MalformedRecordError(XML_MALFORMED, place, problem) from None
    if root.tag != "annotation":
        problem = f"its first element is {root.tag!r:.80}; in VOC it is 'annotation'"
        raise MalformedRecordError(XML_MALFORMED, place, problem)
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    size = (int(height), int(width)) if 0 < height < 1 << 31 and 0 < width < 1 << 31 else (0, 0)
    objects = [_read_object(element, f"{place}: object {n}") for n, element in enumerate(root.findall("object"), 1)]
    return VOCRecord(size, objects, (root.findtext("filename") or "").strip())


def _encoding_hint(content: bytes) -> str:
    """Explain a failure by bytes that are not UTF-8, which XML is unless it says so."""
    try:
        content.decode()
    except UnicodeDecodeError as reason:
        return f"; byte {reason.start} is not UTF-8: save it as UTF-8"
    return ""


def _read_object(element: Element, place: str) -> VOCObject:
    """Read one object. Only its own bndbox counts: the `part` elements of a person have their own."""
    name = (element.findtext("name") or "").strip()
    xmin, ymin, xmax, ymax = (_number(element.findtext(f"bndbox/{corner}")) for corner in CORNERS)
    problem = None
    if not name:
        problem = "an object must have a name"
    elif not np.isfinite([xmin, ymin, xmax, ymax]).all():
        problem = "its bndbox must hold a finite number for each of xmin, ymin, xmax, ymax"
    elif xmin >= xmax or ymin >= ymax:
        problem = "xmin < xmax and ymin < ymax must hold"
    difficult = _number(element.findtext("difficult"))
    return VOCObject(place, printable(name), (xmin, ymin, xmax, ymax), difficult == 1, problem)


def _number(text: str | None) -> float:
    """Return a number, or NaN for anything else."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
