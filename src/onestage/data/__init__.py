"""From files to batches: sources, images, augmentation, samplers and the data module.

Lightning and albumentations take seconds to import, so each name is imported on first use; the stub beside this file
lists them.
"""

import os

import lazy_loader

# Importing albumentations would otherwise ask the package index for a newer version, two seconds when offline. This
# file runs before every module of the package, so it stands here once.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
