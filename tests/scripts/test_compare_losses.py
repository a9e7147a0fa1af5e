"""scripts/compare_losses.py: plans, continuation, failures, and the page of a table."""

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STRICT = '{"model.detector.init_args.positive_iou": 0.5}'
SHAPES = {"data.source.init_args.num_train": 8, "data.source.init_args.num_val": 3, "data.num_workers": 0}
SHAPES |= {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_losses

    return compare_losses


@pytest.fixture
def comparison(script):
    import comparison

    return comparison


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.yaml"
    groups = {
        "a": {"losses": ["focal", "mining"], "seeds": [0, 1]},
        "b": {"losses": ["mining"], "conditions": [{}, {"model.detector.init_args.positive_iou": 0.5}]},
    }
    config = str(ROOT / "configs" / "shapes_ssd.yaml")
    path.write_text(yaml.safe_dump({"config": config, "table": "t.csv", "settings": SHAPES, "groups": groups}))
    return path


def run(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *map(str, words)])
    return script.main()


def outcome(training, score=0.5, ratio=10.0):
    scores = {"mAP": score, "AP50": score, "AP75": score}
    return {**training._asdict(), **scores, "steps": 1, "background_per_positive": ratio}


def test_study_continues_with_the_trainings_that_failed_or_are_missing(script, plan_file, monkeypatch, capsys):
    made = []

    def train(plan, training, runs):
        made.append(training)
        if len(made) == 2:
            raise script.FailedError("no disk")
        return outcome(training)

    monkeypatch.setattr(script, "train", train)
    assert run(script, monkeypatch, "--plan", plan_file, "--jobs", 1) == 1
    assert "no disk" in capsys.readouterr().err
    failed = made[1]
    assert run(script, monkeypatch, "--plan", plan_file, "--jobs", 1) == 0
    assert len(made) == 6  # two, then the four that have no row of the five; groups a and b share one
    assert made[2] == failed
    names = [(one.group, one.loss, one.seed, one.condition) for one in made if one != failed]
    everything = [("a", loss, seed, "{}") for seed in (0, 1) for loss in ("focal", "mining")]
    assert names == [one for one in [*everything, ("b", "mining", 0, STRICT)] if one != failed[:4]]
    assert run(script, monkeypatch, "--plan", plan_file, "--only", "b") == 0 and len(made) == 6


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.yaml")), ids=lambda path: path.name)
def test_shipped_plans_name_existing_files(script, path):
    plan = script.read_plan(path)
    configs = {json.loads(one.condition).get("config", plan["config"]) for one in script.trainings(plan)}
    assert configs and all((path.parent / config).is_file() for config in configs)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"groups": {"a": {"losses": ["focl"]}}}, "unknown losses focl"),
        ({"groups": {"a": {}}}, "is no plan (KeyError: 'losses')"),
        ({"groups": None}, "is no plan"),
    ],
)
def test_plan_that_cannot_be_used_ends_with_one_message(change, told, script, plan_file, monkeypatch, capsys):
    plan_file.write_text(yaml.safe_dump(yaml.safe_load(plan_file.read_text()) | change))
    assert run(script, monkeypatch, "--plan", plan_file) == 2
    assert told in capsys.readouterr().err
    assert run(script, monkeypatch, "--plan", plan_file.with_name("none.yaml")) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_noise_leaves_out_what_a_seed_adds_to_all_losses(script, comparison):
    # Means 42 and 38 of the losses, 41 and 39 of the seeds: residuals +-1 in a table of 2 x 2 with 1 degree of freedom.
    scores = {("focal", 0): 0.44, ("focal", 1): 0.40, ("mining", 0): 0.38, ("mining", 1): 0.38}
    rows = [outcome(script.Training(f"g{seed}", loss, seed, "{}"), score) for (loss, seed), score in scores.items()]
    cells = comparison.gather([{key: str(value) for key, value in row.items()} for row in rows])
    assert comparison.paired_deviation([list(cells.values())]) == pytest.approx(2)
    table = comparison.format_table(cells, {"focal": "focal", "mining": "mining"}, ["{}"])
    assert "| as configured | 10 | **42.0 (40.0 to 44.0)** | 38.0 (38.0 to 38.0) |" in table


def test_best_of_a_row_is_chosen_among_the_seeds_that_all_have(comparison):
    cells = {
        ("focal", "{}"): comparison.Cell({0: 56.0, 1: 50.0}, 10.0),
        ("mining", "{}"): comparison.Cell({0: 54.0}, 10.0),  # above the mean of focal, below it on the shared seed
    }
    table = comparison.format_table(cells, {"focal": "focal", "mining": "mining"}, ["{}"])
    assert "| as configured | 10 | **53.0 (50.0 to 56.0)** | 54.0 (seed 0) |" in table


def test_conditions_are_named_by_the_last_part_of_keys_and_classes(comparison):
    backbone = {"class_path": "onestage.models.VGG", "init_args": {"depths": [1, 1]}}
    assert comparison.describe(json.dumps({"model.backbone": backbone, "data.path": "x"})) == "backbone VGG"


def test_committed_page_is_written_from_the_committed_table(script, monkeypatch, tmp_path):
    assert run(script, monkeypatch, "--report", tmp_path) == 0
    assert (tmp_path / "loss_comparison.md").read_text() == (ROOT / "docs" / "loss_comparison.md").read_text()
    pictures = {path.name for path in tmp_path.glob("images/*")}
    assert pictures == {path.name for path in (ROOT / "docs" / "images").glob("loss_comparison*.png")}


def test_groups_with_a_series_are_drawn_once_seeds_tell_the_noise(script, comparison, plan_file, tmp_path):
    plan = script.read_plan(plan_file)
    plan["groups"]["b"] |= {"series": "strict", "losses": {"focal": {}, "mining": {}}}
    # A noise of 2 points, as above: one seed must differ by 5.7, the mean over two by 4.
    scores = {("focal", 0, "{}"): 0.44, ("focal", 1, "{}"): 0.40, ("focal", 0, STRICT): 0.45}
    rows = [outcome(one, scores.get(one[1:], 0.39)) for one in script.trainings(plan)]
    comparison.write_page(plan, [{key: str(value) for key, value in row.items()} for row in rows], tmp_path)
    page = (tmp_path / "loss_comparison.md").read_text()
    assert "](images/loss_comparison.png)" in page
    assert "as configured | 10 | +3.0 (2 seeds) |  |\n| strict | positive_iou 0.5 | 10 | **+6.0** |  |" in page


def test_seeds_that_chose_a_setting_are_shown_apart(script, comparison, plan_file, tmp_path):
    plan = script.read_plan(plan_file)
    plan["groups"] |= {"c": {"losses": {"focal": {}, "mining": {}}, "seeds": [3], "apart": True}}
    rows = [outcome(one, 0.6 if one.seed == 3 else 0.4) for one in script.trainings(plan)]
    comparison.write_page(plan, [{key: str(value) for key, value in row.items()} for row in rows], tmp_path)
    first, _, last = (tmp_path / "loss_comparison.md").read_text().split("## ")[1:]
    assert "| as configured | 10 | **40.0 (40.0 to 40.0)** |" in first
    assert "| as configured | 10 | **60.0** | **60.0** |" in last


@pytest.mark.slow
def test_trainings_fill_the_table(script, plan_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(script, monkeypatch, "--plan", plan_file, "--only", "b", "--jobs", 1) == 0
    first, second = script.read_table(script.read_plan(plan_file))
    assert (first["condition"], second["condition"], first["loss"]) == ("{}", STRICT, "mining")
    assert 0 <= float(first["mAP"]) <= 1
