"""One-stage object detectors on PyTorch Lightning: data, losses, models and exact evaluation.

Importing the package is cheap: every name is imported on first use, and torch, lightning and albumentations by the
modules that use them. The stub beside this file lists the names.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

try:
    __version__ = version("onestage")
except PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0+unknown"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
