"""The command lines of `onestage doctor` and `onestage anchors`. Nothing heavy is imported: help comes at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from onestage.command_parser import CommandParser, require_fraction

DETECTORS = ("SSD300", "SSD512", "SSD160")
PATHS = "a COCO JSON file or its folder, a VOC folder, or a YOLO data.yaml or its folder; several are splits of one set"
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


def doctor_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of `onestage doctor`.

    Raises:
        ConfigError: they cannot be used.
    """
    options = _doctor_parser().parse_args(words)
    require_fraction("--max_bad_fraction", options.max_bad_fraction)
    return options


def anchors_options(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of `onestage anchors`.

    Raises:
        ConfigError: they cannot be used.
    """
    return _anchors_parser().parse_args(words)


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
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=PATHS)
    parser.add_argument("--images", type=Path, help="folder of the images of COCO files (found by itself if usual)")
    parser.add_argument("--detector", choices=DETECTORS, default="SSD300", help="to be trained (%(default)s)")
    parser.add_argument(
        "--anchors", default="voc", help="voc, coco, or a YAML file of `onestage anchors` (%(default)s)"
    )
    return parser
