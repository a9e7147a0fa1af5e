"""Running, failing and interrupted trainings of the comparison of losses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparisons import make_study

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def endings(monkeypatch):
    """Replace the training of each loss by a shell command."""
    from comparison import runner

    ends = {"focal": "exit 6", "mining": "exit 6"}

    def start(run):
        run.outcome_file.parent.mkdir(parents=True, exist_ok=True)
        with (run.outcome_file.parent / "log.txt").open("wb") as log:
            return subprocess.Popen(["sh", "-c", ends[run.loss]], stdout=log, stderr=log)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    return ends


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [("exit 130", 130), ("exit 2", 2), ("exit 1", 1), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_interrupted_or_failed_run_leaves_no_outcome_and_ends_the_comparison(
    endings, ending, exit_code, tmp_path, capsys
):
    from comparison import runner

    endings["focal"] = f"echo no disk; {ending}"
    runs = make_study(tmp_path).weight_runs()
    with pytest.raises(runner.RunFailedError) as raised:
        runner.make_runs(runs, jobs=1)
    assert raised.value.exit_code == exit_code
    assert f"focal lr_0.002_box_0.05_seed_0 ended with exit code {exit_code}" in str(raised.value)
    assert "  no disk" in str(raised.value)
    assert "1/4  shapes focal" in capsys.readouterr().out
    assert not list(tmp_path.rglob("outcome.json"))  # mining was not started


def test_run_ended_by_non_finite_numbers_is_an_outcome(endings, tmp_path):
    from comparison import outcomes, runner

    runs = make_study(tmp_path).weight_runs()
    runner.make_runs([*runs, *runs], jobs=2)
    for run in runs:
        assert outcomes.read(run.outcome_file)["is_finite"] is False
    assert outcomes.best_runs(runs) == {}


@pytest.mark.parametrize(
    ("losses", "skipped", "is_finite"), [("0.5", False, True), ("nan", False, False), ("0.5", True, False)]
)
def test_run_is_finite_unless_a_loss_or_skipped_steps_say_otherwise(losses, skipped, is_finite, tmp_path):
    from comparison import outcomes

    (tmp_path / "version_9").mkdir()
    newest = tmp_path / "version_10"
    newest.mkdir()
    (newest / "results.json").write_text('{"metrics": {"mAP": 0.5}, "per_class": {"star": 0.5}}')
    (newest / "metrics.csv").write_text(f"step,train/loss,val/mAP\n9,{losses},\n9,,0.5\n")
    if skipped:
        (newest / "skipped_steps.json").write_text("[]")
    outcome = outcomes.gather(tmp_path, 0, "abc1234")
    assert outcome["is_finite"] is is_finite
    assert outcome["curve"] == [[10, 0.5]]


def test_no_run_starts_after_the_deadline(endings, tmp_path, capsys):
    from comparison import runner

    runner.make_runs(make_study(tmp_path).weight_runs(), jobs=1, deadline=time.time() - 1)
    assert "4 runs postponed" in capsys.readouterr().out
    assert not list(tmp_path.rglob("log.txt"))


def comparison(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPTS / "compare_losses.py"), "--losses", "focal", "--rates", "2e-3"]
    command += ["--box_weights", "0.2", "--seeds", "1", "--epochs", "2000", "--num_train", "16", "--num_val", "7"]
    command += ["--precision", "32-true", "--jobs", "1", "--folder", str(folder), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code", "whom"),
    [(signal.SIGINT, 130, os.killpg), (signal.SIGTERM, 143, os.kill)],  # Ctrl-C goes to the runs too
    ids=["ctrl-c", "sigterm"],
)
def test_signal_ends_the_comparison_and_its_runs_without_outcome(number, exit_code, whom, tmp_path):
    process = comparison(tmp_path)
    until = time.time() + 300
    while time.time() < until and not list(tmp_path.rglob("metrics.csv")):  # the training handles signals by then
        time.sleep(0.1)
    assert list(tmp_path.rglob("metrics.csv"))
    whom(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == exit_code
    assert "repeat the command to continue" in told
    assert not list(tmp_path.rglob("outcome.json"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing is left of it
