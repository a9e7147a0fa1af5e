"""Every benchmark completes, including its assertions of equal results; no time is checked."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


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
        pytest.param("detect", "same labels in the same order", marks=pytest.mark.slow),
        pytest.param("data", "the same boxes within 0.001 px", marks=pytest.mark.slow),
        pytest.param("loss", "the same gradient within 1e-5", marks=pytest.mark.slow),  # it compiles
        ("save", "both read back the same tensors"),
        pytest.param("doctor", "every set was read and checked", marks=pytest.mark.slow),
        pytest.param("loader", "verdict with", marks=pytest.mark.slow),
        pytest.param("models", "SSD256,shapes_ssd.yaml,6,256,256,815048,", marks=pytest.mark.slow),
        pytest.param("step", "the same losses from the same weights", marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_given_images_replace_drawn_ones(benchmark, monkeypatch, capsys, tmp_path):
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), np.full((90, 120, 3), 50 * number, dtype=np.uint8))
    run(benchmark, monkeypatch, "data", "--quick", "--images", str(tmp_path))
    assert "augmentation of 3 decoded images" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no"):
        run(benchmark, monkeypatch, "data", "--quick", "--images", str(tmp_path / "empty"))


@pytest.mark.parametrize("arguments", [["speed"], ["map", "--rounds", "0"], [], ["map", "--images", "photos"]])
def test_invalid_arguments_exit_2_with_one_message(benchmark, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(benchmark, monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
