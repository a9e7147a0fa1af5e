"""Fifty kills over one run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run


@pytest.mark.slow
@pytest.mark.fault
def test_run_ends_with_the_same_bits_after_fifty_kills(tmp_path):
    program = Path(tiny_run.__file__).with_name("storm.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    print(report)
    assert (report["kills"], report["kills_in_save"]) == (50, 10)
    assert report["damaged_files"] == 0
    assert report["most_steps_lost"] <= report["interval"]
    assert (report["whole_exit_code"], report["exit_code"]) == (0, 0)
    assert report["differences"] == []
