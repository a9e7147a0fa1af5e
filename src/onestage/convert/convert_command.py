"""`onestage convert`: its words, and what it says. Nothing heavy is imported before the words are understood."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onestage.command_parser import CommandParser, require_fraction

if TYPE_CHECKING:
    from onestage.convert.conversion import Conversion

NUM_SHOWN = 5  # of what was left out

DESCRIPTION = "Convert a data set between COCO, VOC and YOLO. It is read as a training would read it."
EPILOG = """what a format cannot carry:
  all    outlines, keypoints, licences: only boxes are kept; boxes and images that cannot be used are left out
  coco   nothing; VOC's `difficult` becomes a key that other tools pass over
  voc    category ids, classes without objects, areas of outlines; crowds become difficult objects; boxes of at most one
         pixel become a little wider
  yolo   category ids, areas of outlines, `difficult`, the second of two equal objects; crowds are left out, and images
         that are not annotated as they are shown (EXIF)
The command says which of these it met, and how often.

examples:
  onestage convert data/coco/annotations/instances_val2017.json --to yolo --out data/coco_yolo
  onestage convert data/VOCdevkit --to coco --out data/voc_coco --images link
  onestage convert data/mine/data.yaml --to voc --out data/mine_voc --splits train val=test
"""


def run_convert(words: Sequence[str]) -> int:
    """Run the command and return its exit code, 0.

    Args:
        words: those that follow `convert`.

    Raises:
        ConfigError: they cannot be understood, or the folder to write is there already.
        DataError: the data set cannot be read, or not be written.
    """
    arguments = _parser().parse_args(words)
    require_fraction("--max-bad-fraction", arguments.max_bad_fraction)

    from onestage.convert.conversion import convert  # torch, numpy, opencv
    from onestage.data.layouts import find_sources

    name_by_split = dict(_renamed(word) for word in arguments.splits) if arguments.splits else None
    conversion = convert(
        find_sources(arguments.source, arguments.image_root),
        arguments.to,
        arguments.out,
        images=arguments.images,
        name_by_split=name_by_split,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    print(_report(conversion, arguments.to, arguments.out))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="onestage convert",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="+", type=Path, help="COCO JSON, VOC folder, YOLO data.yaml or folder; splits")
    parser.add_argument("--to", required=True, choices=["coco", "voc", "yolo"], help="the format to write")
    parser.add_argument("--out", required=True, type=Path, help="the folder to create")
    parser.add_argument(
        "--images", choices=["copy", "link"], default="copy", help="copy image files, or make hard links to them"
    )
    parser.add_argument("--splits", nargs="+", metavar="NAME[=NEW]", help="the splits to take, and what to call them")
    parser.add_argument(
        "--image-root", type=Path, help="folder of the images of COCO files; by default it is looked for"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.01, help="of boxes and images that may be left out (0.01)"
    )
    return parser


def _renamed(word: str) -> tuple[str, str]:
    name, _, new = word.partition("=")
    return name, new or name


def _report(conversion: "Conversion", format: str, out: Path) -> str:
    """Say what was written, what was not, and how to train on it."""
    lines = []
    for name, annotations, _ in conversion.splits:
        num_images, num_boxes = len(annotations), len(annotations.boxes)
        lines.append(f"{name}: {num_images} images, {num_boxes} boxes, {len(annotations.class_names)} classes")
    left_out = [finding.line for finding in conversion.findings if finding.effect == "skipped"]
    if left_out:
        more = [f"and {len(left_out) - NUM_SHOWN} more"] if len(left_out) > NUM_SHOWN else []
        lines += ["", f"left out, because it cannot be used ({len(left_out)}):"]
        lines += [f"  {line}" for line in [*left_out[:NUM_SHOWN], *more]]
    if conversion.losses:
        lines += ["", f"what {format.upper()} cannot carry:"]
        lines += [f"  {number:>7}  {what}" for what, number in conversion.losses.items()]
    return "\n".join([*lines, "", f"written to {out}. To train on it:", "", *_config(conversion, format, out)])


def _config(conversion: "Conversion", format: str, out: Path) -> list[str]:
    """Return the data section of a config."""
    names = [split.name for split in conversion.splits]
    train = next((name for name in names if name.startswith("train")), names[0])
    others = (name for word in ("val", "test") for name in names if name.startswith(word))
    val = next(others, None)
    settings = [f"root: {out}"]
    if format == "voc":
        settings.append(f"train_splits: [{train}]")
        settings += [f"val_splits: [{val}]"] if val else []
    elif format == "coco":
        settings.append(f"train: {train}")
        settings += [f"val: {val}"] if val else []
    elif val not in (None, "val"):
        settings.append(f"val: {val}")
    settings += [] if val else ["val_fraction: 0.2"]
    module = {"coco": "COCO", "voc": "VOC", "yolo": "YOLO"}[format]
    return ["data:", f"  class_path: onestage.data.{module}DataModule", "  init_args:", *(f"    {s}" for s in settings)]
