"""The commands `onestage doctor`, which checks a data set, and `onestage anchors`, which fits anchors to one."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from onestage.data.anchor_table import comment, compare_anchors, find_anchors, write_yaml
from onestage.data.coco_cleaning import require_new, write_cleaned
from onestage.data.coverage import IMAGE_SIZES
from onestage.data.diagnosis import Depth, examine
from onestage.data.doctor_report import as_json, as_text
from onestage.data.files import write_new_file
from onestage.data.sources import KNOWN, Split, find_sources, read_splits
from onestage.errors import ConfigError, DataError
from onestage.types import AnnotationSet

EXIT_WARNINGS = 1  # with --strict
DOCTOR_EPILOG = """\
exit codes: 0 clean; 3 something stops a training or is left out of it; 1 with --strict, where there are warnings;
2 the command line cannot be used

examples:
  onestage doctor data/voc
  onestage doctor data/coco/annotations/instances_train2017.json data/coco/annotations/instances_val2017.json
  onestage doctor data/mine/data.yaml --decode --draw 16 sheet.jpg
  onestage doctor data/mine/train.json --fix-to train_clean.json
"""
ANCHORS_EPILOG = """\
examples:
  onestage anchors data/mine/train.json --detector SSD300 --out anchors.yaml
  onestage doctor data/mine/train.json --detector SSD300 --anchors anchors.yaml
  onestage fit --config configs/coco_ssd300.yaml --config anchors.yaml --data.root data/mine
"""


class CommandParser(argparse.ArgumentParser):
    """A parser that raises instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Stop with what cannot be used."""
        raise ConfigError(f"{self.prog}: {message}.\nSee: {self.prog} --help")


def run_doctor(words: Sequence[str]) -> int:
    """Check a data set, print what was found and return the exit code.

    Raises:
        ConfigError: the command line cannot be used.
        DataError: a path is no data set.
    """
    options = _doctor_parser().parse_args(words)
    anchors = find_anchors(options.detector, options.anchors)
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"--max_bad_fraction is {options.max_bad_fraction:g}; it must be in 0..1.\nTry: 0.01")
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


def run_anchors(words: Sequence[str]) -> int:
    """Fit a table of anchors to the first split of a data set and print it as YAML.

    Raises:
        ConfigError: the command line cannot be used.
        DataError: the split cannot be read, or holds no box.
    """
    options = _anchors_parser().parse_args(words)
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


def _doctor_parser() -> CommandParser:
    parser = _parser("doctor", "Check a data set before it is trained on. It is never written to.", DOCTOR_EPILOG)
    parser.add_argument("--decode", action="store_true", help="decode every image whole, in processes of their own")
    parser.add_argument(
        "--no-near-copies", dest="near_copies", action="store_false", help="compare splits by exact copies only"
    )
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01, help="share that a training may leave out (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all that was found as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where there are warnings")
    parser.add_argument(
        "--draw", nargs=2, metavar=("N", "FILE"), help="draw N images, before and after augmentation (.jpg or .png)"
    )
    parser.add_argument("--fix-to", type=Path, metavar="NEW.json", help="write a cleaned copy of a COCO file")
    return parser


def _anchors_parser() -> CommandParser:
    parser = _parser("anchors", "Fit a detector's anchors to the boxes of a training split.", ANCHORS_EPILOG)
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="a new file; without it the table is printed")
    return parser


def _parser(command: str, description: str, epilog: str) -> CommandParser:
    """Return a parser with what both commands take."""
    parser = CommandParser(
        prog=f"onestage {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=f"{KNOWN}; several are splits of one set")
    parser.add_argument("--images", type=Path, help="folder of the images of COCO files (found by itself if usual)")
    parser.add_argument("--detector", choices=list(IMAGE_SIZES), default="SSD300", help="to be trained (%(default)s)")
    parser.add_argument(
        "--anchors", default="voc", help="voc, coco, or a YAML file of `onestage anchors` (%(default)s)"
    )
    return parser


def _sheet_of(draw: list[str] | None) -> tuple[int, Path | None]:
    """Return the number of images and the file of --draw, checked."""
    if draw is None:
        return 0, None
    from onestage.data.sheet import require_sheet_name  # imports albumentations, which takes a second

    number, path = draw[0], Path(draw[1])
    require_sheet_name(path, int(number) if number.isdecimal() else 0)
    if path.exists():
        raise ConfigError(f"--draw: {path} is there already; nothing is overwritten.\nGive a new name.")
    return int(number), path


def _draw(annotations: AnnotationSet, sheet: Path, num_images: int, image_size: int) -> None:
    from onestage.data.sheet import write_sheet  # as above

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
