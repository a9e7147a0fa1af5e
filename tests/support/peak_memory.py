"""The most memory of a process."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most memory of this process; on Linux not ru_maxrss, which a child inherits from the process that forks."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
