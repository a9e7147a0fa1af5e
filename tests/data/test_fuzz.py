"""Thousands of damaged files: each is read or refused with a message; no traceback, no dead process, no bomb."""

import json
from pathlib import Path

import pytest
from processes import finish, start

CHILD = Path(__file__).with_name("fuzz_child.py")
MAX_BYTES = 1 << 30
MAX_SECONDS = 2.0  # of processor time, which a busy machine does not stretch


@pytest.mark.parametrize("num_mutations", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused(tmp_path, num_mutations) -> None:
    out, _ = finish(start(CHILD, tmp_path, num_mutations, num_mutations), seconds=1800)
    report = json.loads(out.splitlines()[-1])
    assert report["peak_bytes"] < MAX_BYTES
    assert {name: of["slowest"] for name, of in report["formats"].items() if of["slowest"] > MAX_SECONDS} == {}
    # Were little noticed, the mutations would test little.
    noticed = {name: of["noticed"] / num_mutations for name, of in report["formats"].items()}
    assert all(share > 0.01 for share in noticed.values()), noticed
