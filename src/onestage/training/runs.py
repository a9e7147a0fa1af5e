"""Where a run writes: runs/<experiment>/version_<n>/."""

import os
from pathlib import Path

from onestage.errors import ConfigError

# Lightning starts the processes of ranks 1.. by running the same command again: they must not make folders of their
# own.
RUN_FOLDER_VARIABLE = "ONESTAGE_RUN_FOLDER"


def new_run_folder(runs_dir: str, experiment: str) -> Path:
    """Make and return the next free folder; processes that were started by this one get the same.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    inherited = os.environ.get(RUN_FOLDER_VARIABLE)
    if inherited and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    folder = _claim(Path(runs_dir) / experiment)
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    return folder


def _claim(experiment_folder: Path) -> Path:
    try:
        experiment_folder.mkdir(parents=True, exist_ok=True)
        version = 1 + max((_version(path) for path in experiment_folder.iterdir()), default=-1)
        while True:
            folder = experiment_folder / f"version_{version}"
            try:
                folder.mkdir()  # the one atomic way to claim a number when two runs start together
                return folder
            except FileExistsError:
                version += 1
    except OSError as error:
        raise ConfigError(
            f"the run folder {experiment_folder} cannot be written: {error.strerror or error}.\n"
            "Set --runs_dir to a folder where you may write."
        ) from error


def _version(path: Path) -> int:
    name, _, number = path.name.partition("_")
    return int(number) if name == "version" and number.isdecimal() else -1
