"""Loggers that continue across resumes and survive a full disk: TensorBoard events and metrics.csv."""

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from onestage.files import atomic_write, read_rows

METRICS_FILE = "metrics.csv"

logger = logging.getLogger(__name__)


def run_loggers(folder: Path, resumed_step: int | None = None) -> list[Logger]:
    """Return the loggers of the run in `folder`; it continues at optimizer step `resumed_step`, or is new (None)."""
    place: dict[str, Any] = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    return [EventLogger(**place, purge_step=resumed_step), TableLogger(**place, resumed_step=resumed_step)]


class EventLogger(TensorBoardLogger):
    """TensorBoard's event files. A full disk ends them and not the run."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write metrics, if there is room."""
        with _full_disk_tolerated("TensorBoard's event files"):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flush, if there is room; Lightning would also write hparams.yaml, empty because config.yaml has it all."""
        with _full_disk_tolerated("TensorBoard's event files"):
            self.experiment.flush()


class TableLogger(CSVLogger):
    """metrics.csv. Lightning's logger would delete the rows of a resumed run; a full disk ends it and not the run."""

    def __init__(self, save_dir: str, *, name: str, version: str, resumed_step: int | None) -> None:
        super().__init__(save_dir, name=name, version=version)
        self._resumed_step = resumed_step
        self._restored: set[tuple[int, frozenset[str]]] = set()  # step and keys of each restored row

    @property
    def experiment(self) -> Any:
        """Lightning's writer; at its first use the rows before the resumed step are restored."""
        if self._resumed_step is None:
            return super().experiment
        file, before, self._resumed_step = Path(self.log_dir) / METRICS_FILE, self._resumed_step, None
        header, rows = read_rows(file)  # before the writer deletes the file
        writer = super().experiment
        if header and isinstance(writer, ExperimentWriter):
            writer.metrics_keys = header
            kept = [row for row in rows if int(row["step"]) < before]
            self._restored = {(int(row["step"]), frozenset(key for key in row if row[key])) for row in kept}
            with atomic_write(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as lines:
                table = csv.DictWriter(lines, fieldnames=header)
                table.writeheader()
                table.writerows(kept)
        return writer

    def save(self) -> None:
        """Write the rows, if there is room; not those of a validation that a kill after it made the run repeat."""
        writer = self.experiment
        if self._restored and isinstance(writer, ExperimentWriter):
            writer.metrics = [row for row in writer.metrics if (row["step"], frozenset(row)) not in self._restored]
        with _full_disk_tolerated(METRICS_FILE):
            super().save()
        self.experiment.metrics = []  # Lightning clears them only once they are written


_warned: set[str] = set()


@contextmanager
def _full_disk_tolerated(name: str) -> Iterator[None]:
    """Warn once, instead of raising, if a file cannot be written."""
    try:
        yield
    except OSError as error:
        if name not in _warned:
            _warned.add(name)
            logger.warning("%s cannot be written (%s); training continues without.", name, error.strerror or error)
