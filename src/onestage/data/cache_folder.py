"""Where copies that can be made again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/onestage, or ~/.cache/onestage. It may be deleted at any time between two runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onestage"
