"""Commit and machine of a measurement."""

import platform
import subprocess
from functools import cache
from pathlib import Path


def commit(folder: Path) -> str | None:
    """Return the short name of the commit, with -dirty if tracked files differ from it; None outside a repository."""
    return _git(folder, "describe", "--always", "--dirty", "--exclude=*")


def head(folder: Path) -> str | None:
    """Return the short name of the commit that is checked out now; None outside a repository."""
    return _git(folder, "rev-parse", "--short", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here, as in the image
        return None
    return done.stdout.strip() or None


@cache
def machine() -> str:
    """Return the processor, and the GPU where there is one."""
    import torch

    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()
    return f"{torch.cuda.get_device_name(0)} and {processor}" if torch.cuda.is_available() else processor
