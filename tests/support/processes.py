"""Python in processes of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping


def start(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start Python with this process's import paths and one thread."""
    defaults = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, words)]
    everything = {**os.environ, **defaults, **(environment or {})}
    return subprocess.Popen(command, env=everything, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Return the exit code, negative for a signal, and what was printed to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def finish(process: subprocess.Popen[str], exit_code: int = 0, seconds: float = 300) -> tuple[str, str]:
    """Return what was printed to stdout and stderr by a process that must end with `exit_code`."""
    code, out, err = end_of(process, seconds)
    assert code == exit_code, err[-6000:]
    return out, err
