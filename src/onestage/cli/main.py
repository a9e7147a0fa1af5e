"""The command `onestage`: a dispatcher so light that its help answers at once."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from onestage import __version__
from onestage.errors import CancelledError, ConfigError, OnestageError

TRAINER_COMMANDS = {
    "fit": "train, evaluate the best checkpoint, write runs/<experiment>/<version>/",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "detect on a folder of images: drawn images and a COCO results file",
    "losses": "draw how unequally a checkpoint's anchors share the loss, for each gamma",
}

# These answer at once: neither Lightning nor a model is imported.
DATA_COMMANDS = {
    "doctor": "check a data set: files, boxes, classes, leakage, and what the anchors can learn",
    "anchors": "fit a detector's anchors to a data set",
    "convert": "convert a data set between COCO, VOC and YOLO",
}

FILE_COMMANDS = {
    "export": "write the weights of a checkpoint to be shared: model.safetensors and model.json",
}
COMMANDS = {**TRAINER_COMMANDS, **FILE_COMMANDS, **DATA_COMMANDS}

HELP = f"""onestage {__version__}: train one-stage object detectors

usage: onestage COMMAND [options]

commands:
{chr(10).join(f"  {name:<10}{what}" for name, what in COMMANDS.items())}

options:
  --help      this text; after a command, its keys; those of a data set or a detector:
              onestage fit --data.help onestage.data.COCODataModule
              onestage fit --model.detector.help onestage.models.SSD300
  --version   the version
  --debug     show the traceback of an error

examples:
  onestage fit --config configs/shapes_ssd.yaml
  onestage fit --config configs/voc_ssd300.yaml --data.root data/voc --trainer.max_epochs 1
  onestage validate --ckpt_path runs/shapes_ssd/version_0/checkpoints/best.ckpt
  onestage predict --ckpt_path runs/shapes_ssd/version_0/checkpoints/best.ckpt --data.predict_dir photos/
  onestage fit --config configs/shapes_ssd.yaml --print_config
  onestage doctor data/voc
  onestage convert data/voc --to coco --out data/voc_coco

configs/trainer.yaml is read first for every command; later files and options override earlier ones.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or that of the kind of error (see onestage/errors.py)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return run(words)
    except OnestageError as error:
        if debug:
            raise
        if str(error):  # of several processes that end for one reason, one tells it
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before there is anything to end in order: while packages are imported, files read
        if debug:
            raise
        print("error: interrupted.", file=sys.stderr)
        return CancelledError.exit_code
    except BrokenPipeError:  # `onestage fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(words: list[str]) -> int:
    """Dispatch on the first word.

    Raises:
        ConfigError: it is no command.
    """
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("--version", "-V"):
        print(f"onestage {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean: onestage {close[0]}" if close else "See: onestage --help"
        raise ConfigError(f"{words[0]!r} is not a command; there are {', '.join(COMMANDS)}. {hint}")
    if words[0] == "convert":
        from onestage.convert.convert_command import run_convert

        return run_convert(words[1:])
    if words[0] in ("doctor", "anchors"):
        return _run_on_data(words)
    if words[0] == "export":
        from onestage.deploy.export import run_export_command

        run_export_command(words[1:])
        return 0

    from onestage.cli.commands import run_trainer_command  # seconds of imports

    run_trainer_command(words)
    return 0


def _run_on_data(words: list[str]) -> int:
    """Read the options before anything is imported that they may not need."""
    from onestage.doctor.doctor_options import anchors_options, doctor_options

    is_doctor = words[0] == "doctor"
    options = doctor_options(words[1:]) if is_doctor else anchors_options(words[1:])
    from onestage.doctor.doctor import run_anchors, run_doctor  # a second, for torch

    return run_doctor(options) if is_doctor else run_anchors(options)
