"""The commands `onestage doctor`, which checks a data set, and `onestage anchors`, which fits anchors to one."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from onestage.data.layouts import Split, find_sources, read_splits
from onestage.doctor.anchor_table import comment, compare_anchors, find_anchors, write_yaml
from onestage.doctor.checks import Depth, examine
from onestage.doctor.coco_cleaning import require_new, write_cleaned
from onestage.doctor.report import as_json, as_text
from onestage.errors import ConfigError, DataError
from onestage.files import write_new_file
from onestage.types import AnnotationSet

EXIT_WARNINGS = 1  # with --strict


def run_doctor(options: argparse.Namespace) -> int:
    """Check a data set, print what was found and return the exit code. options: of `doctor_options`.

    Raises:
        ConfigError: the command line cannot be used.
        DataError: a path is no data set.
    """
    anchors = find_anchors(options.detector, options.anchors)
    num_images, sheet = _sheet_of(options.draw)
    if options.fix_to is not None:
        require_new(options.fix_to)
    sources = find_sources(options.paths, options.images)
    if options.fix_to is not None and (len(sources) != 1 or sources[0].format != "COCO"):
        formats = ", ".join(f"{source.name} ({source.format})" for source in sources)
        raise ConfigError(f"--fix-to cleans one COCO file; given are {formats}.\nGive one file at a time.")
    splits = read_splits(sources)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    depth = Depth(options.near_copies, num_cores if options.decode else 0, options.max_bad_fraction)
    diagnosis, usable = examine(splits, anchors, depth)
    exit_code = diagnosis.exit_code
    if not exit_code and options.strict and any(finding.effect == "warning" for finding in diagnosis.findings):
        exit_code = EXIT_WARNINGS
    _print(as_json(diagnosis, exit_code) if options.json else as_text(diagnosis))
    if options.fix_to is not None:
        _fix(splits, usable, options.fix_to)
    if sheet is not None and usable:
        _draw(next(iter(usable.values())), sheet, num_images, anchors.image_size)
    return exit_code


def run_anchors(options: argparse.Namespace) -> int:
    """Fit a table of anchors to the first split of a data set and print it as YAML. options: of `anchors_options`.

    Raises:
        ConfigError: the command line cannot be used.
        DataError: the split cannot be read, or holds no box.
    """
    before = find_anchors(options.detector, options.anchors)
    annotations = find_sources(options.paths[:1], options.images)[0].read(1.0)
    after, old, new = compare_anchors(annotations, before)
    text = comment(annotations.source, len(annotations.boxes), old, new) + write_yaml(after)
    if options.out is None:
        _print(text.rstrip("\n"))
    else:
        write_new_file(options.out, text.encode())
        _print(text.partition("model:")[0].rstrip("\n"))
        _print(f"wrote {options.out}; to train with it: onestage fit --config ... --config {options.out}")
    return 0


def _sheet_of(draw: list[str] | None) -> tuple[int, Path | None]:
    """Return the number of images and the file of --draw, checked."""
    if draw is None:
        return 0, None
    from onestage.doctor.sheet import require_sheet_name  # imports albumentations, which takes a second

    number, path = draw[0], Path(draw[1])
    require_sheet_name(path, int(number) if number.isdecimal() else 0)
    if path.exists():
        raise ConfigError(f"--draw: {path} is there already; nothing is overwritten.\nGive a new name.")
    return int(number), path


def _draw(annotations: AnnotationSet, sheet: Path, num_images: int, image_size: int) -> None:
    from onestage.doctor.sheet import write_sheet  # as above

    number = write_sheet(sheet, annotations, num_images, image_size)
    print(f"wrote {sheet}: {number} images of {annotations.source}, each beside its augmented self", file=sys.stderr)


def _fix(splits: Sequence[Split], usable: dict[str, AnnotationSet], new_file: Path) -> None:
    """Write the cleaned copy of the one COCO file that was given."""
    if splits[0].name not in usable:
        raise DataError(f"{splits[0].path}: cannot be read, so there is nothing to clean.\nCorrect the error above.")
    num_changes = write_cleaned(splits[0].path, usable[splits[0].name], new_file)
    print(f"wrote {new_file}, with {num_changes} changes listed beside it in .changes.jsonl", file=sys.stderr)


def _print(text: str) -> None:
    """Print what a terminal's encoding may not hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def doctor(words: Sequence[str]) -> int:
    """Check a data set."""
    from onestage.doctor.doctor_options import doctor_options

    return run_doctor(doctor_options(words))


def anchors(words: Sequence[str]) -> int:
    """Fit anchors to a data set."""
    from onestage.doctor.doctor_options import anchors_options

    return run_anchors(anchors_options(words))
