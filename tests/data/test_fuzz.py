"""Thousands of damaged files: each is read or refused with a message; no traceback, no dead process, no bomb."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("fuzz_child.py")
MAX_BYTES = 1 << 30
MAX_SECONDS = 2.0  # of processor time, which a busy machine does not stretch


@pytest.mark.parametrize("num_mutations", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(tmp_path: Path, num_mutations: int) -> None:
    words = [sys.executable, str(CHILD), str(tmp_path), str(num_mutations), str(num_mutations)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-6000:]  # a signal would be negative
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["peak_bytes"] < MAX_BYTES
    assert {name: of["slowest"] for name, of in report["formats"].items() if of["slowest"] > MAX_SECONDS} == {}
    # Were little noticed, the mutations would test little.
    noticed = {name: of["noticed"] / num_mutations for name, of in report["formats"].items()}
    assert all(share > 0.01 for share in noticed.values()), noticed
