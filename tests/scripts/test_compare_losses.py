"""The comparison of losses: what it plans, how it sums up, and, slowly, that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from comparisons import best_of, finish, make_study, settings_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_each_loss_gets_its_own_box_weight_then_its_own_rate_from_a_seed_that_does_not_count(tmp_path) -> None:
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


def test_a_loss_without_a_finished_run_has_no_settings_and_no_further_runs(tmp_path) -> None:
    from comparison import outcomes

    study = make_study(tmp_path)
    for run in study.weight_runs():
        if run.loss == "focal":
            finish(run, 0.1)
        else:
            finish(run, 0.0, metrics={}, exit_code=6, is_finite=False)
    best = outcomes.best_runs(study.weight_runs())
    assert list(best) == ["focal"]
    assert {run.loss for run in study.final_runs(best)} == {"focal"}


def test_the_command_of_a_run_names_its_loss_rate_and_seed(tmp_path) -> None:
    (run, *_) = make_study(tmp_path, data=str(tmp_path / "cells")).weight_runs()
    words = run.words()
    files = [words[place + 1] for place, word in enumerate(words) if word == "--config"]
    assert [Path(file).name for file in files] == ["shapes_ssd.yaml", "cells.yaml", "focal.yaml"]
    assert yaml.safe_load(Path(files[1]).read_text())["data"]["init_args"]["root"] == str(tmp_path / "cells")
    assert words[words.index("--model.optimizer.lr") + 1] == "0.002"
    assert words[words.index("--model.box_loss_weight") + 1] == "0.05"
    assert words[words.index("--seed_everything") + 1] == "0"


def test_steps_to_half_lie_on_the_line_between_two_points() -> None:
    from comparison.report import steps_to_half

    assert steps_to_half([[50, 0.1], [100, 0.3], [150, 0.4]]) == 75  # 0.2 is halfway from 0.1 to 0.3
    assert steps_to_half([[50, 0.4], [100, 0.4]]) == 25  # from 0 at the start
    assert steps_to_half([[50, 0.0], [100, 0.0]]) == 50  # nothing was learnt


def test_the_page_has_means_spread_noise_and_failures(tmp_path) -> None:
    from comparison import report, settings

    study = make_study(tmp_path)
    settings.write_settings(study)
    values = {"focal": (0.30, 0.32, 0.34), "mining": (0.20, 0.20, 0.26)}
    for run in study.final_runs(best_of(study)):
        finish(run, values[run.loss][run.seed - 1], is_finite=run.loss == "focal" or run.seed > 1)
    report.write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "loss_comparison.md").read_text()
    assert "| focal | 0.001 | 0.05 | 32.0 (30.0 to 34.0) | 64.0 (60.0 to 68.0) | 75 |  | 0 of 3 |" in page
    assert "| mining | 0.002 | 0.05 | 22.0 (20.0 to 26.0) | 44.0 (40.0 to 52.0) | 75 |  | 1 of 3 |" in page
    # Variances 4 and 12, pooled 8: 2.8 points; two standard errors of a difference of means of 3: 2 sqrt(8 * 2 / 3)
    assert "is 2.8 points of mAP" in page
    assert "differ by less than 4.6 are not told apart; the losses span 10.0" in page
    assert "| focal | 32.0 | 0.0 |" in page  # a class that was never found
    assert (tmp_path / "docs" / "images" / "loss_comparison.png").stat().st_size > 1000


def test_only_seeds_that_count_are_on_the_page(tmp_path) -> None:
    from comparison import report, settings

    study = make_study(tmp_path)
    settings.write_settings(study)
    for run in [*study.weight_runs()[:1], *study.final_runs({"focal": study.weight_runs()[0]})]:
        finish(run, 0.9 if run.seed == 0 else 0.1)
    settings = json.loads((study.results_folder / "study.json").read_text())
    (row,) = report.read_rows(study.results_folder, settings)
    assert row.metrics["mAP"] == [0.1] * 3


def test_a_long_study_takes_the_settings_that_a_short_one_has_chosen_and_keeps_its_runs_apart(tmp_path) -> None:
    from comparison import outcomes, report, settings

    short = make_study(tmp_path)
    assert short.choosing == short
    long = make_study(tmp_path, precision="bf16-mixed", epochs=8, chosen_epochs=2)
    assert long.choosing == short
    for run in short.weight_runs():
        finish(run, 0.9 if run.box_weight == 0.2 else 0.1)
    final_runs = long.final_runs(outcomes.best_runs(long.choosing.weight_runs()))
    assert {(run.rate, run.box_weight) for run in final_runs} == {(2e-3, 0.2)}
    for run in final_runs:
        assert run.words()[run.words().index("--trainer.max_epochs") + 1] == "8"
        finish(run, 0.5)
    settings.write_settings(long)
    report.write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "loss_comparison.md").read_text()
    assert "## shapes, bf16-mixed, 8 epochs" in page
    assert "chosen on seed 0, in 32-true and 2 epochs, from box weights 0.05, 0.2" in page
    assert "--chosen_precision 32-true --chosen_epochs 2 --seeds 1 2 3`" in page
    assert "## shapes, 32-true" not in page  # nothing was asked of it


@pytest.mark.parametrize(("words", "told"), [(["--losses", "foccal"], "foccal"), (["--data", "no/where"], "no/where")])
def test_what_cannot_be_compared_is_said(words, told, monkeypatch, capsys, tmp_path) -> None:
    import compare_losses

    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *words, "--folder", str(tmp_path)])
    assert compare_losses.main() == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_quick_comparison_runs_and_writes_its_page(tmp_path) -> None:
    words = [sys.executable, str(SCRIPTS / "compare_losses.py"), "--quick", "--precision", "32-true"]
    done = subprocess.run([*words, "--report", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "loss_comparison.md").read_text()
    assert "| focal | 0.002 | 0.1 |" in page
    assert "| mining | 0.002 | 0.1 |" in page
