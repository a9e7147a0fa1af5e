"""The runs of a comparison: losses, learning rates, box weights, seeds, and their commands."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onestage.files import atomic_write

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
LOSSES = CONFIGS / "compare"
DEFAULT_CONFIG = CONFIGS / "shapes_ssd.yaml"


class StudyError(Exception):
    """The runs of the folder cannot be compared with the requested ones."""


@dataclass(frozen=True)
class Study:
    """Settings of all runs of a comparison.

    A run differs from the others in its loss (one file of configs/compare), its learning rate, its box loss weight and
    its seed. The seed determines the initial weights, and the order and augmentation of the images.
    """

    folder: Path  # of all runs: <data>/<precision>/<budget>/<loss>/<run>
    data: str  # `shapes`, or the folder of a data set in VOC format with the lists train and val
    losses: tuple[str, ...]  # file names in configs/compare, without .yaml
    rates: tuple[float, ...]  # learning rates to choose from; the box weight is chosen at the middle one
    box_weights: tuple[float, ...]  # loss_weights.box to choose from: the losses differ in size by a factor of ten
    selection_seed: int  # learning rate and box weight of each loss are chosen on this seed
    seeds: tuple[int, ...]  # of the final runs
    epochs: int
    num_train: int  # drawn images, for `shapes`
    num_val: int
    precision: str
    chosen_precision: str  # precision and length of the runs that choose
    chosen_epochs: int
    config: Path = DEFAULT_CONFIG  # the experiment that each loss is added to

    @property
    def data_name(self) -> str:
        """Name of the data, for folders and titles."""
        return Path(os.path.abspath(self.data)).name  # noqa: PTH100  resolve() would rename a link

    @property
    def config_name(self) -> str:
        """The experiment's file, as a command in the repository has it."""
        file = self.config.resolve()
        return str(file.relative_to(REPOSITORY) if file.is_relative_to(REPOSITORY) else file)

    @property
    def results_folder(self) -> Path:
        """The folder of comparable runs: same data, precision and budget."""
        images = f"{self.num_train}_and_{self.num_val}_images_" if self.data == "shapes" else ""
        config = "" if self.config.resolve() == DEFAULT_CONFIG else f"_{self.config.stem}"
        return self.folder / self.data_name / self.precision / f"{images}{self.epochs}_epochs{config}"

    @property
    def choosing(self) -> "Study":
        """The study whose runs choose the rates and box weights of this one; the same study by default."""
        return replace(self, precision=self.chosen_precision, epochs=self.chosen_epochs)

    @property
    def middle_rate(self) -> float:
        """The learning rate at which box weights are compared."""
        return sorted(self.rates)[len(self.rates) // 2]

    def weight_runs(self) -> list["Run"]:
        """Return one run for every loss and box weight, at the middle rate, on the selection seed."""
        return [
            Run(self, loss, self.middle_rate, weight, self.selection_seed)
            for weight in self.box_weights
            for loss in self.losses
        ]

    def rate_runs(self, best: Mapping[str, "Run"]) -> list["Run"]:
        """Return one run for every loss and rate, at the box weight of its best run so far, on the same seed."""
        return [replace(run, rate=rate) for rate in self.rates for run in best.values()]

    def final_runs(self, best: Mapping[str, "Run"]) -> list["Run"]:
        """Return the final runs: every loss with the settings of its best run, on every seed."""
        return [replace(run, study=self, seed=seed) for seed in self.seeds for run in best.values()]


@dataclass(frozen=True)
class Run:
    """One training."""

    study: Study
    loss: str
    rate: float
    box_weight: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the experiment and the last folder."""
        return f"lr_{self.rate:g}_box_{self.box_weight:g}_seed_{self.seed}"

    @property
    def runs_dir(self) -> Path:
        """The folder of all runs of this loss."""
        return self.study.results_folder / self.loss

    @property
    def outcome_file(self) -> Path:
        """The result; exists once the run is done."""
        return self.runs_dir / self.name / "outcome.json"

    def words(self) -> list[str]:
        """Return the arguments of the `onestage` command."""
        study = self.study
        options = {
            "seed_everything": self.seed,
            "model.optimizer.lr": self.rate,
            "model.loss_weights.box": self.box_weight,
            "model.channels_last": str(study.precision == "bf16-mixed").lower(),  # timed, it could differ between runs
            "trainer.max_epochs": study.epochs,
            "trainer.check_val_every_n_epoch": max(1, study.epochs // 4),
            "trainer.precision": study.precision,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_checkpointing": "false",  # the last weights are evaluated, not the best
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "data.num_workers": 0,
            "drawn_images": 0,
            "experiment": self.name,
            "runs_dir": self.runs_dir,
        }
        words = ["fit", "--config", str(study.config)]
        if study.data == "shapes":
            root = study.folder / f"drawn_{study.num_train}_{study.num_val}"
            options |= {
                "data.source.path": root,
                "data.source.num_train": study.num_train,
                "data.source.num_val": study.num_val,
            }
        else:
            words += ["--config", str(voc_config(study))]
        words += ["--config", str(LOSSES / f"{self.loss}.yaml")]
        return words + [word for key, value in options.items() for word in (f"--{key}", str(value))]


def voc_config(study: Study) -> Path:
    """Write a configuration that replaces the data set by one in VOC format; return its file.

    Raises:
        StudyError: the runs in the study's folder belong to another data set of the same name.
    """
    file = study.folder / f"{study.data_name}.yaml"
    content = (
        "data:\n"
        "  source:\n    class_path: onestage.data.VOC\n"
        f"    init_args: {{path: {Path(study.data).resolve()}, train: [train], val: [val]}}\n"
    )
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise StudyError(
            f"--data {study.data}: {file} names another data set of the name {study.data_name}, and results of the two "
            "would be mixed.\nGive each its own --folder; if the data were moved, correct the path in that file."
        )
    with atomic_write(file) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return file


def write_settings(study: Study) -> None:
    """Write study.json, the settings that all runs of a results folder share.

    Raises:
        StudyError: the folder has runs with other settings, or of another data set of the same name.
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
                f"{file}: {key} must be {kept[key]} as in the existing runs, got {value}. All losses of a folder are "
                "chosen in the same way.\nGive this comparison another --folder."
            )
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def all_losses() -> tuple[str, ...]:
    """Return the names of the files in configs/compare."""
    return tuple(sorted(path.stem for path in LOSSES.glob("*.yaml")))


def unknown_losses(names: Iterable[str]) -> Sequence[str]:
    """Return the names without a file in configs/compare."""
    return [name for name in names if name not in all_losses()]
