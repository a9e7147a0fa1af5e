"""A small comparison of losses whose runs are made up, for the tests of scripts/compare_losses.py."""

import json
from pathlib import Path


def make_study(folder: Path, **changes):
    from comparison.plan import Study

    settings = {
        "folder": folder,
        "data": "shapes",
        "losses": ("focal", "mining"),
        "rates": (1e-3, 2e-3, 4e-3),
        "box_weights": (0.05, 0.2),
        "selection_seed": 0,
        "seeds": (1, 2, 3),
        "epochs": 2,
        "num_train": 8,
        "num_val": 3,
        "precision": "32-true",
        "chosen_precision": "32-true",
        "chosen_epochs": 2,
    }
    return Study(**{**settings, **changes})


def finish(run, mean_average_precision: float, **changes) -> None:
    outcome = {
        "exit_code": 0,
        "metrics": {"mAP": mean_average_precision, "AP50": 2 * mean_average_precision},
        "per_class": {"circle": mean_average_precision, "star": None},
        "curve": [[50, 0.0], [100, mean_average_precision]],
        "is_finite": True,
    }
    run.outcome_file.parent.mkdir(parents=True)
    run.outcome_file.write_text(json.dumps({**outcome, **changes}))


def settings_of(runs):
    return [(run.loss, run.rate, run.box_weight, run.seed) for run in runs]


def best_of(study):
    from comparison.plan import Run

    return {loss: Run(study, loss, rate, 0.05, 0) for loss, rate in (("focal", 1e-3), ("mining", 2e-3))}
