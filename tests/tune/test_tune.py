"""A search runs `onestage fit` for each trial, continues after a stop and prints the best command."""

import csv
import sys

import pytest
from command_line import run

from onestage.cli.signature import command_parser
from onestage.errors import ConfigError
from onestage.tune.tune import _result, parse_search, tune


def test_ranges_and_choices_become_distributions() -> None:
    items = ["a.lr=1E-4:1.e-1:log", "b=-0.5:.5", "c=8:64", "d=8:64:log", "e=8,16", "f=false,true"]
    assert parse_search(items) == {
        "a.lr": ("FloatDistribution", {"low": 1e-4, "high": 0.1, "log": True}),
        "b": ("FloatDistribution", {"low": -0.5, "high": 0.5, "log": False}),
        "c": ("IntDistribution", {"low": 8, "high": 64, "log": False}),
        "d": ("IntDistribution", {"low": 8, "high": 64, "log": True}),
        "e": ("CategoricalDistribution", {"choices": ["8", "16"]}),
        "f": ("CategoricalDistribution", {"choices": ["false", "true"]}),
    }


@pytest.mark.parametrize(
    "items",
    [["a"], ["a="], ["=1:2"], ["a=8"], ["a=2:1"], ["a=0:1:log"], ["a=1:x"], ["a=1:2:lin"], ["a=x,"], ["a=1:2"] * 2],
)
def test_search_that_says_no_range_is_refused(items) -> None:
    with pytest.raises(ConfigError, match=r"tune: search must be KEY=LOW:HIGH .*, got"):
        parse_search(items)


def test_repeated_options_are_all_taken() -> None:
    words = ["--config", "shapes_ssd", "--config", "quick", "--search", "a=1:2", "--search", "b=1:2", "c=x,y"]
    parsed = command_parser("tune", tune).parse_args(words)
    assert (list(map(str, parsed.config)), parsed.search) == (["shapes_ssd", "quick"], ["a=1:2", "b=1:2", "c=x,y"])


def test_missing_package_is_one_message_with_the_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("tune", "--config", "shapes_ssd", "--search", "a=1:2") == 2
    assert 'Install it: pip install "onestage[tune]"' in capsys.readouterr().err


def test_folder_that_cannot_be_made_is_one_message(tmp_path, capsys) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "file").touch()
    assert run("tune", "--config", "shapes_ssd", "--search", "a=1:2", "--folder", str(tmp_path / "file")) == 2
    assert "cannot hold a study: [Errno 17] File exists" in capsys.readouterr().err


@pytest.mark.slow
def test_search_continues_a_cut_trial_and_ends_with_the_best_command(drawn, tmp_path, monkeypatch, capfd) -> None:
    optuna = pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    small = ["num_train=8", "num_val=4", "draw_seed=0", "max_objects=6"]
    fixed = [f"data.source.{item}" for item in (f"path={tmp_path / 'shapes'}", *small)]
    fixed += ["data.num_workers=0", "data.batch_size=4", "model.channels_last=false", "drawn_images=0"]
    fixed += ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "trainer.accelerator=cpu"]
    words = ["tune", "--config", "shapes_ssd", "--folder", "found", "--set", *fixed, "--trials"]
    assert run(*words, "1", "--search", "model.optimizer.learning=1:2") == 2
    assert "unknown key --model.optimizer.learning" in capfd.readouterr().err
    search = ["--search", "model.optimizer.init_args.lr=1e-4:1e-2:log", "model.loss_weights.box=0.5,1"]
    assert run(*words, "1", *search) == 0  # another search is another study
    (name,) = (name for name in optuna.get_all_study_names("sqlite:///found/study.db") if "loss_weights" in name)
    study = optuna.load_study(study_name=name, storage="sqlite:///found/study.db")
    study.ask(study.trials[0].distributions)  # as a kill leaves it
    assert run(*words, "2", *search) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = list(csv.DictReader((tmp_path / "found" / "trials.csv").open()))
    assert [(row["trial"], row["state"]) for row in rows] == [("0", "COMPLETE"), ("1", "COMPLETE")]
    assert all((tmp_path / "found" / f"trial_{row['trial']}" / "version_0" / "results.json").is_file() for row in rows)
    best = max(rows, key=lambda row: float(row["value"]))
    (tmp_path / "found" / f"trial_{best['trial']}" / "version_1").mkdir()  # of another search: without a configuration
    assert _result(tmp_path / "found" / f"trial_{best['trial']}") == float(best["value"])
    assert lines[-2].startswith(f"best: trial_{best['trial']}, ")
    assert lines[-1].startswith("onestage fit --config shapes_ssd --data.source.path=")
    assert f"--model.optimizer.init_args.lr={best['model.optimizer.init_args.lr']}" in lines[-1]
