"""Where a run writes: runs/<experiment>/version_<n>/."""

import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from onestage.errors import ConfigError


def new_run_folder(runs_dir: str, experiment: str, *, num_nodes: int = 1) -> Path:
    """Make and return the next free folder of an experiment.

    Only the first process of a run does. The others get a path that nothing is written to: what writes on every
    process asks the first one for its folder when they are connected.

    Raises:
        ConfigError: the folder cannot be made or written.
    """
    folder = Path(runs_dir) / experiment
    return _claim(folder) if _is_first_process(num_nodes) else folder / "folder_of_the_first_process"


def _is_first_process(num_nodes: int) -> bool:
    # The rank is the local one where Lightning starts the processes; then NODE_RANK tells the machines apart.
    is_first_node = num_nodes == 1 or os.environ.get("NODE_RANK", "0") == "0"
    return is_first_node and rank_zero_only.rank == 0  # type: ignore[attr-defined] # Lightning sets it when imported


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
