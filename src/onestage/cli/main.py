"""The command `onestage`: a light dispatcher, so that its help answers at once."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name

from onestage import __version__
from onestage.errors import CancelledError, ConfigError, OnestageError

TRAINER = "onestage.cli.commands:run_trainer_command"

# The command table: name -> what runs it, and its line in the help. A function's signature is its command line.
COMMANDS = {
    "fit": (TRAINER, "train, evaluate the best checkpoint, write runs/<experiment>/<version>/"),
    "validate": (TRAINER, "evaluate a checkpoint on the validation split"),
    "test": (TRAINER, "evaluate a checkpoint on the test split"),
    "predict": (TRAINER, "detect on a folder of images: drawn images and a COCO results file"),
    "losses": (TRAINER, "plot the distribution of a checkpoint's loss over anchors, for each gamma"),
    "report": ("onestage.report.report:report", "write one HTML page about a run, or compare several"),
    "doctor": ("onestage.doctor.doctor:doctor", "check a data set: files, boxes, classes, leakage, anchor coverage"),
    "anchors": ("onestage.doctor.doctor:anchors", "fit a detector's anchors to a data set"),
    "convert": ("onestage.convert.conversion:convert", "convert a data set between COCO, VOC and YOLO"),
    "download": ("onestage.download.download:download", "download, check and unpack PASCAL VOC or COCO"),
    "export": ("onestage.deploy.export:export", "write the weights of a checkpoint for sharing, or an ONNX file"),
    "demo": ("onestage.deploy.demo:demo", "detect on images that are dropped into a page in the browser"),
    "tune": ("onestage.tune.tune:tune", "search settings of fit, such as the learning rate"),
}

HELP = f"""onestage {__version__}: train one-stage object detectors

usage: onestage COMMAND [options]

commands:
{chr(10).join(f"  {name:<10}{line}" for name, (_, line) in COMMANDS.items())}

options:
  --help      print this text; after a command, its keys (fit --help all: also Lightning's); of a class:
              onestage fit --data.source.help onestage.data.COCO
              onestage fit --model.detector.help onestage.models.SSD300
  --version   print the version
  --debug     show the traceback of an error

examples:
  onestage fit --config configs/shapes_ssd.yaml
  onestage fit --config configs/voc_ssd300.yaml --data.path mine --trainer.max_epochs 50
  onestage validate --ckpt_path runs/shapes_ssd/version_0/checkpoints/best.ckpt
  onestage predict --ckpt_path runs/shapes_ssd/version_0/checkpoints/best.ckpt --data.predict_dir photos/
  onestage report runs/shapes_ssd/version_0 runs/shapes_ssd/version_1
  onestage fit --config configs/shapes_ssd.yaml --print_config
  onestage doctor mine
  onestage convert data/voc --to coco --out data/voc_coco

The files of configs/ ship with the package: --config shapes_ssd works in any folder.
Every command of the trainer reads configs/trainer.yaml first; later files and options override earlier ones.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0 or the exit code of the error kind (see onestage/errors.py)."""
    if arguments is None:
        # A config may name classes of this folder. It comes last, so that no file in it shadows a package.
        with suppress(OSError):  # the folder may be gone
            sys.path.append(str(Path.cwd()))
    with suppress(AttributeError):  # a stream of the caller's own
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # for names from foreign files
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return run(words)
    except OnestageError as error:
        if debug:
            raise
        if str(error):  # if several processes stop for the same reason, only one has the message
            # Without the control characters that names in a foreign file may bring along.
            text = "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in str(error))
            with suppress(BrokenPipeError):
                print(f"error: {text}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while packages are imported or files are read: there is nothing to clean up
        if debug:
            raise
        print("error: interrupted.", file=sys.stderr)
        return CancelledError.exit_code
    except BrokenPipeError:  # `onestage fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(words: list[str]) -> int:
    """Dispatch on the first word; return the exit code. ConfigError if that word is no command."""
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("--version", "-V"):
        print(f"onestage {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean: onestage {close[0]}" if close else "See: onestage --help"
        raise ConfigError(f"unknown command {words[0]!r}; the commands are {', '.join(COMMANDS)}. {hint}")
    target = COMMANDS[words[0]][0]
    if target == TRAINER:
        from onestage.cli.keys import help_page, require_known_keys

        asked = next((place for place, word in enumerate(words) if word in ("--help", "-h")), None)
        if asked is not None and words[asked + 1 :] != ["all"]:
            print(help_page(words[0]))
            return 0
        words = words if asked is None else words[: asked + 1]
        require_known_keys(words[0], words[1:])
    command = resolve_name(target)  # seconds of imports
    if target == TRAINER:
        command(words)
        return 0
    from onestage.cli.signature import run_function

    return run_function(words[0], command, words[1:])
