"""One-stage object detectors on PyTorch Lightning: data, losses, models and exact evaluation.

Importing the package is cheap: torch, lightning and albumentations are imported by the modules that use them.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("onestage")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0+unknown"
