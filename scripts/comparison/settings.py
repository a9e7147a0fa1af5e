"""What the page about the runs has to say of them, kept beside them."""

import json

from comparison import plan
from comparison.plan import Study


def write_settings(study: Study) -> None:
    """Keep what the page about the runs has to say of them, beside them."""
    settings = {
        "data": study.data_name,
        "precision": study.precision,
        "rates": study.rates,
        "box_weights": study.box_weights,
        "selection_seed": study.selection_seed,
        "seeds": study.seeds,
        "epochs": study.epochs,
        "chosen_precision": study.chosen_precision,
        "chosen_epochs": study.chosen_epochs,
        "options": _options(study),
    }
    study.results_folder.mkdir(parents=True, exist_ok=True)
    (study.results_folder / "study.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _options(study: Study) -> str:
    """Return the words that make the same runs again."""
    is_shapes = study.data == "shapes"
    words = [f"--num_train {study.num_train}"] if is_shapes else [f"--data path/to/{study.data_name}"]
    words += [f"--precision {study.precision}", f"--epochs {study.epochs}"]
    if study.losses != plan.all_losses():
        words.append(f"--losses {' '.join(study.losses)}")
    if study.choosing == study:
        words.append(f"--box_weights {' '.join(f'{weight:g}' for weight in study.box_weights)}")
        words.append(f"--rates {' '.join(f'{rate:g}' for rate in study.rates)}")
    else:
        words.append(f"--chosen_precision {study.chosen_precision} --chosen_epochs {study.chosen_epochs}")
    return " ".join([*words, f"--seeds {' '.join(map(str, study.seeds))}"])
