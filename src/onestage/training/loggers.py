"""Where the numbers of a run go: TensorBoard's event files and metrics.csv, which go on where a resumed run goes on."""

import csv
import io
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from onestage.files import atomic_write

METRICS_FILE = "metrics.csv"

logger = logging.getLogger(__name__)


def run_loggers(folder: Path, resumed_step: int | None = None) -> list[Logger]:
    """Return the loggers of the run in `folder`, runs/<experiment>/<version>.

    Args:
        folder: of the run.
        resumed_step: the optimizer step at which the run in this folder goes on; None for a new folder.
    """
    runs_dir, name, version = str(folder.parent.parent), folder.parent.name, folder.name
    return [
        EventLogger(runs_dir, name=name, version=version, purge_step=resumed_step),
        TableLogger(runs_dir, name=name, version=version, resumed_step=resumed_step),
    ]


class EventLogger(TensorBoardLogger):
    """TensorBoard's event files. A full disk ends them and not the run."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write numbers, if there is room."""
        try:
            super().log_metrics(metrics, step)
        except OSError as error:
            _say_once("TensorBoard's event files", error)

    def save(self) -> None:
        """Flush, if there is room."""
        try:
            super().save()
        except OSError as error:
            _say_once("TensorBoard's event files", error)


class TableLogger(CSVLogger):
    """metrics.csv. Lightning's would delete the rows of a run that is resumed; a full disk ends it and not the run."""

    def __init__(self, save_dir: str, *, name: str, version: str, resumed_step: int | None) -> None:
        super().__init__(save_dir, name=name, version=version)
        self._resumed_step = resumed_step

    @property
    def experiment(self) -> Any:
        """Lightning's writer, which goes on below the rows that a resumed run still has."""
        if self._experiment is None:
            file = Path(self.log_dir) / METRICS_FILE
            header, rows = _read_rows(file) if self._resumed_step is not None else ([], [])
            writer = super().experiment
            if header and isinstance(writer, ExperimentWriter):
                writer.metrics_keys = header
                _write_rows(file, header, [row for row in rows if int(row["step"]) < (self._resumed_step or 0)])
        return super().experiment

    def save(self) -> None:
        """Write the rows so far, if there is room."""
        try:
            super().save()
        except OSError as error:
            self.experiment.metrics = []
            _say_once(METRICS_FILE, error)


def _read_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and every whole row: a run that was killed may have left half a line."""
    if not file.is_file():
        return [], []
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        rows = [row for row in reader if None not in row.values() and row.get("step", "").isdecimal()]
    return list(reader.fieldnames or []), rows


def _write_rows(file: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=header)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(file) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


_said: set[str] = set()


def _say_once(what: str, error: OSError) -> None:
    if what not in _said:
        _said.add(what)
        logger.warning("%s cannot be written (%s); training goes on without.", what, error.strerror or error)
