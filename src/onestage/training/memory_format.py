"""Default memory format of the current device."""

from typing import Literal


def resolve_memory_format(channels_last: bool | Literal["auto"], device: str) -> bool:
    """Replace `auto` by the faster memory format of the device; True means channels_last.

    Args:
        channels_last: the configured value.
        device: type of the device that trains: `cpu`, `cuda` or another.
    """
    return device == "cuda" if channels_last == "auto" else channels_last
