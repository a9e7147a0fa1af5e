"""What the runs of a folder have in common beyond its name, kept beside them; the rest stands in their outcomes."""

import json

from comparison.plan import Study, StudyError, voc_config


def write_settings(study: Study) -> None:
    """Keep how the losses' settings are chosen, which the page has to say.

    Raises:
        StudyError: the folder has runs that were chosen in another way, or of other data of the same name.
    """
    if study.data != "shapes":
        voc_config(study)
    settings = {
        "data": study.data_name,
        "config": study.config_name,
        "precision": study.precision,
        "epochs": study.epochs,
        "selection_seed": study.selection_seed,
        "chosen_precision": study.chosen_precision,
        "chosen_epochs": study.chosen_epochs,
    }
    file = study.results_folder / "study.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, value in settings.items():
        if kept.get(key, value) != value:
            raise StudyError(
                f"{file}: {key} is {kept[key]} there and {value} here, and the page shows all losses of a folder as "
                "chosen in one way.\nGive this comparison another --folder."
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
