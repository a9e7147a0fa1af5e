"""The commands `onestage doctor` and `onestage anchors`."""

import sys
from pathlib import Path

from onestage.errors import ConfigError, require

# Anything heavy is imported inside of the functions, so that --help answers at once.

EXIT_WARNINGS = 1  # with --strict


def doctor(
    paths: list[Path],
    *,
    images: Path | None = None,
    decode: bool = False,
    near_copies: bool = True,
    max_bad_fraction: float = 0.01,
    json: bool = False,
    strict: bool = False,
    draw: Path | None = None,
    num_drawn: int = 16,
    detector: str = "SSD300",
    anchors: str | None = None,
    image_size: int | None = None,
) -> int:
    """Check a data set before training; nothing is written to it.

    Exit codes: 0 clean; 1 warnings, with --strict; 2 bad command line; 3 something stops training or is skipped by it.
    The last lines name the command that trains on what was found.

    onestage doctor data/voc
    onestage doctor data/coco/annotations/instances_train2017.json data/coco/annotations/instances_val2017.json
    onestage doctor data/mine/data.yaml --decode --draw sheet.jpg

    Args:
        paths: COCO JSON files or folders, VOC folders, YOLO data.yaml files or folders; several are splits of one set.
        images: image folder of COCO files; found automatically in the usual places.
        decode: decode every image completely, in processes of their own.
        near_copies: compare splits by what their images show, not only by their bytes.
        max_bad_fraction: fraction of images, and of boxes, that training may skip.
        json: print everything as JSON.
        strict: end with exit code 1 if there are warnings.
        draw: new .jpg or .png file for sampled images, each before and after augmentation.
        num_drawn: number of images in it.
        detector: class path of the detector to train; a name without dots is a class of onestage.models.
        anchors: the detector's argument anchors (voc or coco for SSD), or a YAML file of `onestage anchors`.
        image_size: side of the network input, px, for detectors that take any.
    """
    from onestage.data.layouts import find_splits, read_splits
    from onestage.doctor.anchors import find_anchors
    from onestage.doctor.checks import examine
    from onestage.doctor.report import as_json, as_text
    from onestage.doctor.usage import training_command

    require(0 <= max_bad_fraction <= 1, "max_bad_fraction", max_bad_fraction, "in [0, 1]", "Try: 0.01")
    placed = find_anchors(detector, anchors, image_size)
    if draw is not None:
        from onestage.doctor.sheet import require_sheet, write_sheet  # a second of imports

        require_sheet(draw, num_drawn)
    splits = read_splits(find_splits(paths, images))
    diagnosis, usable = examine(
        splits, placed, near_copies=near_copies, is_decoded=decode, max_bad_fraction=max_bad_fraction
    )
    if not any(finding.effect == "error" for finding in diagnosis.findings):
        diagnosis = diagnosis._replace(training_command=training_command(paths, images, splits))
    exit_code = diagnosis.exit_code
    if not exit_code and strict and any(finding.effect == "warning" for finding in diagnosis.findings):
        exit_code = EXIT_WARNINGS
    print(as_json(diagnosis, exit_code) if json else as_text(diagnosis))
    if draw is not None and usable:
        first = next(iter(usable.values()))
        num_written = write_sheet(draw, first, num_drawn, placed.image_size)
        print(f"wrote {draw}: {num_written} images of {first.source}, before and after augmentation", file=sys.stderr)
    return exit_code


def anchors(
    path: Path,
    *,
    images: Path | None = None,
    detector: str = "SSD300",
    anchors: str | None = None,
    image_size: int | None = None,
    shapes: int | None = None,
    out: Path | None = None,
) -> int:
    """Fit a detector's anchors to the boxes of a training split.

    onestage anchors data/mine --detector SSD300 --out anchors.yaml
    onestage anchors data/mine --detector YOLOv3 --image_size 416 --shapes 9
    onestage doctor data/mine --detector SSD300 --anchors anchors.yaml
    onestage fit --config configs/coco_ssd300.yaml --config anchors.yaml --data.path data/mine

    Args:
        path: COCO JSON file or folder, VOC folder, YOLO data.yaml or folder; its first split is used.
        images: image folder of a COCO file; found automatically in the usual places.
        detector: class path of the detector; a name without dots is a class of onestage.models.
        anchors: anchors to start from: the detector's argument anchors, or a YAML file of an earlier call.
        image_size: side of the network input, px, for detectors that take any.
        shapes: number of k-means clusters of all widths and heights, YOLO's anchors; without it the fit keeps the
            detector's number and lets as many boxes as possible reach IoU 0.5.
        out: new YAML file; without it the anchors are printed.
    """
    from onestage.data.image_headers import with_header_sizes
    from onestage.data.layouts import find_splits
    from onestage.doctor.anchors import compare_anchors, find_anchors
    from onestage.files import atomic_write, printable

    placed = find_anchors(detector, anchors, image_size)
    require(bool(placed.levels), "detector", placed.class_path, "a detector with anchors", "Try: --detector SSD300")
    find_anchors(placed.class_path, placed.levels, placed.image_size)  # refuses a detector that takes no table
    if out is not None and out.exists():
        raise ConfigError(f"out: {printable(out)} already exists; nothing is overwritten. Give a new name.")
    split = find_splits([path], images)[0]
    text = compare_anchors(with_header_sizes(split.source.read(split.role)), placed, shapes)
    if out is None:
        print(text.rstrip("\n"))
    else:
        with atomic_write(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        comments = text.partition("model:")[0]
        print(f"{comments}wrote {out}; to train with it: onestage fit --config ... --config {out}")
    return 0
