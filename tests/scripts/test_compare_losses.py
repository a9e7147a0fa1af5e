"""Plan, refusals and a quick run of the comparison of losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from comparisons import finish, make_study, settings_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_box_weight_then_rate_of_each_loss_are_chosen_on_the_selection_seed(tmp_path):
    from comparison import outcomes

    study = make_study(tmp_path)
    weight_runs = study.weight_runs()
    assert settings_of(weight_runs) == [
        ("focal", 2e-3, 0.05, 0),
        ("mining", 2e-3, 0.05, 0),
        ("focal", 2e-3, 0.2, 0),
        ("mining", 2e-3, 0.2, 0),
    ]
    for run, value in zip(weight_runs, (0.3, 0.1, 0.2, 0.4), strict=True):
        finish(run, value)
    rate_runs = study.rate_runs(outcomes.best_runs(weight_runs))
    assert settings_of(rate_runs)[:2] == [("focal", 1e-3, 0.05, 0), ("mining", 1e-3, 0.2, 0)]
    for run in rate_runs:
        if not run.outcome_file.exists():  # the middle rate is there already
            finish(run, 0.35)
    best = outcomes.best_runs(rate_runs)
    assert settings_of(study.final_runs(best)[:3]) == [
        ("focal", 1e-3, 0.05, 1),
        ("mining", 2e-3, 0.2, 1),
        ("focal", 1e-3, 0.05, 2),
    ]


def test_command_of_a_run_has_loss_rate_box_weight_and_seed(tmp_path):
    (run, *_) = make_study(tmp_path, data=str(tmp_path / "cells")).weight_runs()
    words = run.words()
    files = [words[place + 1] for place, word in enumerate(words) if word == "--config"]
    assert [Path(file).name for file in files] == ["shapes_ssd.yaml", "cells.yaml", "focal.yaml"]
    assert yaml.safe_load(Path(files[1]).read_text())["data"]["source"]["init_args"]["path"] == str(tmp_path / "cells")
    assert words[words.index("--model.optimizer.lr") + 1] == "0.002"
    assert words[words.index("--model.loss_weights.box") + 1] == "0.05"
    assert words[words.index("--seed_everything") + 1] == "0"


def call(monkeypatch, *words: str) -> int:
    import compare_losses

    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *words])
    return compare_losses.main()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--losses", "foccal"], "--losses: unknown foccal"),
        (["--data", "no/where"], "no/where"),
        (["--config", "no/where.yaml"], "no/where.yaml"),
        (["--selection_seed", "2"], "--selection_seed 2 is among --seeds 1 2 3"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--epochs", "-1"], "--epochs must be >= 1, got -1"),
        (["--chosen_epochs", "0"], "--chosen_epochs must be >= 1, got 0"),
        (["--num_train", "0"], "--num_train must be >= 1, got 0"),
        (["--rates", "-1"], "--rates must be finite and > 0, got -1"),
        (["--rates", "1e-3", "nan"], "--rates must be finite and > 0, got nan"),
        (["--box_weights", "0"], "--box_weights must be finite and > 0, got 0"),
        (["--seeds", "-4"], "must be in [0, 2^32), got -4"),
    ],
)
def test_invalid_arguments_are_refused_before_any_run(words, told, monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, *words, "--folder", str(tmp_path)) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def make_voc(folder: Path) -> Path:
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    return folder


def test_quick_comparison_prints_its_page_and_keeps_nothing(monkeypatch, capsys):
    import compare_losses
    from comparison import report, step_time

    folders = []
    monkeypatch.setattr(step_time, "measure", lambda losses, file, rounds: None)
    monkeypatch.setattr(compare_losses, "_make_runs", lambda study, jobs, deadline: folders.append(study.folder) or 0)
    monkeypatch.setattr(report, "write", lambda folder, target, page: (target / f"{page}.md").write_text("the page"))
    assert call(monkeypatch, "--quick") == 0
    assert "the page" in capsys.readouterr().out
    assert not folders[0].exists()


@pytest.mark.slow
def test_quick_comparison_trains_and_writes_its_page(tmp_path):
    words = [sys.executable, str(SCRIPTS / "compare_losses.py"), "--quick", "--precision", "32-true"]
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [*words, "--report", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "loss_comparison.md").read_text()
    assert "| focal | 0.002 | 0.1 |" in page
    assert "| mining | 0.002 | 0.1 |" in page
    assert "the runs name none" not in page  # every run has kept its commit
    assert not list((tmp_path / "temporary").glob("compare-losses-*"))
