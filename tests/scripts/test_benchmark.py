"""Every benchmark completes, including its assertions of equal results; no time is checked."""

import sys
from pathlib import Path

import cv2
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
pytestmark = pytest.mark.slow  # the import alone takes ten seconds


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark as script

    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    yield script
    torch.set_num_threads(torch_threads)
    cv2.setNumThreads(cv2_threads)


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()


@pytest.mark.parametrize(
    ("part", "asserted"),
    [
        ("map", "all twelve numbers within 1e-6"),
        ("detect", "same labels in the same order"),
        ("data", "the same boxes within 0.001 px"),
        ("loss", "the same gradient within 1e-5"),
        ("save", "both read back the same tensors"),
        ("doctor", "every set was read and checked"),
        ("loader", "verdict with"),
        ("models", "SSD256,shapes_ssd.yaml,6,256,256,815048,"),
        ("step", "the same losses from the same weights"),
    ],
)
def test_quick_run_asserts_equal_results(benchmark, monkeypatch, capsys, part, asserted):
    run(benchmark, monkeypatch, part, "--quick")
    printed = capsys.readouterr().out
    assert asserted in printed
    has_ratios = part not in ("loader", "doctor", "models")
    assert not has_ratios or "x1.00 / x1.00 / x1.00" in printed  # the reference row of the table


def test_contestants_alternate_and_every_second_round_is_reversed(benchmark, capsys):
    from benchmarks.timing import compare

    calls = []
    compare("letters", {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the first pair warms up
    assert "letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("delivered", "words"),
    [
        (30.0, ["loader-bound: the step waits", "(0.30 times", "needs: 14 without", "7 with data.cache: disk"]),
        (250.0, ["not loader-bound (2.50 times"]),
    ],
)
def test_verdict_compares_loader_rate_with_step_rate(benchmark, delivered, words):
    from benchmarks.loader import _verdict

    rates = {(1, "none"): 7.5, (1, "disk"): 15.0, (4, "none"): delivered}
    assert all(word in _verdict(rates, 100.0) for word in words)
