"""Summaries and page of the comparison of losses."""

from pathlib import Path

import pytest
from comparisons import best_of, finish, make_study, settings_of

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RUNS = "lr_*_box_*_seed_*/outcome.json"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def page_of(folder: Path) -> str:
    from comparison import report

    report.write(folder, folder / "docs")
    return (folder / "docs" / "loss_comparison.md").read_text()


def make_all(study, values) -> None:
    """Write outcomes of all runs: each loss is best at the middle rate and the first box weight."""
    from comparison import plan

    plan.write_settings(study)
    weight_runs = study.choosing.weight_runs()
    best = {run.loss: run for run in reversed(weight_runs)}
    for run in dict.fromkeys([*weight_runs, *study.choosing.rate_runs(best)]):
        if not run.outcome_file.exists():
            finish(run, 0.2 if run in best.values() else 0.1)
    for run in study.final_runs(best):
        if not run.outcome_file.exists():
            finish(run, values[run.loss])


def test_steps_to_half_are_interpolated():
    from comparison.rows import steps_to_half

    assert steps_to_half([[50, 0.1], [100, 0.3], [150, 0.4]]) == 75  # 0.2 is halfway from 0.1 to 0.3
    assert steps_to_half([[50, 0.4], [100, 0.4]]) == 25  # from 0 at the start
    assert steps_to_half([[50, 0.0], [100, 0.0]]) == 50  # nothing was learnt
    assert steps_to_half([]) is None


def test_page_has_means_spread_significance_and_non_finite_runs(tmp_path):
    from comparison import plan, report

    study = make_study(tmp_path)
    plan.write_settings(study)
    values = {"focal": (0.30, 0.32, 0.34), "mining": (0.20, 0.20, 0.26)}
    for run in study.final_runs(best_of(study)):
        finish(run, values[run.loss][run.seed - 1], is_finite=run.loss == "focal" or run.seed > 1)
    report.write(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "loss_comparison.md").read_text()
    assert "| focal | 0.001 | 0.05 | 32.0 (30.0 to 34.0) | 64.0 (60.0 to 68.0) | 75 |  | 0 of 3 |" in page
    assert "| mining | 0.002 | 0.05 | 22.0 (20.0 to 26.0) | 44.0 (40.0 to 52.0) | 75 |  | 1 of 3 |" in page
    # Variances 4 and 12, pooled 8: 2.8 points; two standard errors of a difference of means of 3: 2 sqrt(8 * 2 / 3)
    assert "is 2.8 points of mAP" in page
    assert "difference of less than 4.6 between means of 3 seeds is not significant; the losses span 10.0" in page
    assert "| focal | 32.0 | 0.0 |" in page  # a class that was never found
    assert (tmp_path / "docs" / "images" / "loss_comparison.png").stat().st_size > 1000


def test_table_has_a_line_per_run_and_page_name_sets_three_files(tmp_path):
    from comparison import plan, report

    study = make_study(tmp_path)
    plan.write_settings(study)
    choosing, counting = study.weight_runs()[0], next(iter(study.final_runs(best_of(study))))
    finish(choosing, 0.25)
    finish(counting, 0.5, is_finite=False)
    report.write(tmp_path, tmp_path / "docs", "long_runs")
    lines = (tmp_path / "docs" / "long_runs.csv").read_text().splitlines()
    settings_read = "data,precision,budget,loss,learning_rate,box_weight,seed"
    assert lines[0] == f"{settings_read},mAP,AP50,AP75,finite,commit"
    place = "shapes,32-true,8_and_3_images_2_epochs,focal"
    assert lines[1:] == [
        f"{place},0.001,0.05,1,50.000,100.000,,no,",
        f"{place},0.002,0.05,0,25.000,50.000,,yes,",
    ]
    page = (tmp_path / "docs" / "long_runs.md").read_text()
    assert "--report docs --page long_runs" in page
    assert "(images/long_runs.png)" in page
    assert (tmp_path / "docs" / "images" / "long_runs.png").is_file()


def test_command_on_the_page_makes_the_same_runs(tmp_path, monkeypatch):
    import compare_losses

    study = make_study(tmp_path, precision="bf16-mixed", epochs=8, selection_seed=7, num_val=50)
    make_all(study, {"focal": 0.3, "mining": 0.3})
    (command,) = [line for line in page_of(tmp_path).splitlines() if line.startswith("`python")]
    words = command.split("`")[1].split()[1:]
    monkeypatch.setattr("sys.argv", [*words, "--folder", str(tmp_path)])
    again = compare_losses._study(compare_losses._parse())
    assert settings_of(again.choosing.weight_runs()) == settings_of(study.choosing.weight_runs())
    assert again == study


@pytest.mark.slow
def test_step_times_are_relative_to_the_first_loss_without_mining(tmp_path):
    from comparison import step_time

    step_time.measure(("focal", "cross_entropy"), tmp_path / "step_times.json", rounds=1)
    times = step_time.read_step_times(tmp_path / "step_times.json")
    assert times.cell("focal") == f"x1.00 ({times.seconds['focal']:.3f} s)"
    assert times.seconds["cross_entropy"] > 0
    assert times.cell("mining") == ""
    assert (
        "the median of 1 rounds, as a multiple of a step with focal in the same round, and in seconds"
        in times.explanation
    )
