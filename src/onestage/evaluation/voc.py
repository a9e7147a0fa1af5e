"""COCO's summary numbers and the AP of each class, from one evaluation by `torchmetrics`.

Nothing here knows of processes, batches or annotation files: `coco.py` brings both sides into lists of images.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torchmetrics.detection.helpers import CocoBackend
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from onestage.errors import ConfigError
from onestage.types import Metrics

Package = Literal["faster_coco_eval", "pycocotools"]
Backend = Literal["auto"] | Package

# torchmetrics' name of each of our numbers, in COCO's order.
TORCHMETRICS_NAMES = {
    "mAP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "mAP_small": "map_small",
    "mAP_medium": "map_medium",
    "mAP_large": "map_large",
    "AR1": "mar_1",
    "AR10": "mar_10",
    "AR100": "mar_100",
    "AR_small": "mar_small",
    "AR_medium": "mar_medium",
    "AR_large": "mar_large",
}
METRIC_NAMES = tuple(TORCHMETRICS_NAMES)

# torchmetrics' own default comes from a float32 linspace, where 0.01 is 0.009999999776: recall bins shift at ties and
# the AP numbers are off by up to 1.3e-4.
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()


def choose_backend(backend: Backend = "auto") -> Package:
    """Return the package that evaluates: faster_coco_eval where it is installed, else pycocotools.

    Both give the same numbers to the last bit; faster_coco_eval takes a fifth of the time.

    Raises:
        ConfigError: if the package is not installed.
    """
    choices: list[Package] = list(get_args(Package)) if backend == "auto" else [backend]
    for choice in choices:
        if choice in get_args(Package) and find_spec(choice) is not None:
            return choice
    raise ConfigError(
        f"COCO evaluation with backend {backend!r} needs one of these installed: {', '.join(choices)}.\n"
        "To install:   pip install faster-coco-eval pycocotools"
    )


def average_precision(
    predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]], backend: Package
) -> tuple[Metrics, dict[int, float]]:
    """Evaluate image by image matched lists.

    Args:
        predictions: for each image boxes [D, 4] xyxy px, scores [D] and labels [D], float32, float32 and int64, on
            the CPU, because torchmetrics reads them number by number.
        targets: for each image boxes [M, 4], labels [M], area [M] (px^2) and iscrowd [M]; 0 or 1.
        backend: the package that counts.

    Returns:
        The twelve numbers by name, 0..1, and the AP (IoU 0.50:0.95, all areas) of each label that occurs on either
        side. NaN where there is no object to find.
    """
    if not any(len(target["labels"]) for target in targets):
        return dict.fromkeys(METRIC_NAMES, float("nan")), {}
    metric = MeanAveragePrecision(
        backend=backend,
        rec_thresholds=RECALL_THRESHOLDS,
        sync_on_compute=False,  # the lists are complete, and other processes may not be evaluating
    )
    recording = _RecordingBackend(backend)
    metric._coco_backend = recording
    metric.update(predictions, targets)
    with _paused_garbage_collection():
        numbers = metric.compute()
    metrics = {name: _nan_if_negative(float(numbers[key])) for name, key in TORCHMETRICS_NAMES.items()}
    return metrics, recording.average_precision_by_label()


class _RecordingBackend(CocoBackend):
    """Keeps the precision table of an evaluation.

    torchmetrics offers it through `extended_summary`, which converts every IoU matrix too (4 s on 5,000 images), and
    AP per class through `class_metrics`, which evaluates a second time.
    """

    precision: npt.NDArray[np.float64]  # [IoU threshold, recall, class, area range, detection limit], -1 undefined
    labels: list[int]  # of the class axis

    @property
    def cocoeval(self) -> Any:
        """The backend's evaluation class, with its result noted down."""
        backend = self

        class RecordedEvaluation(super().cocoeval):  # type: ignore[misc] # which class it is depends on the backend
            def summarize(self) -> None:
                super().summarize()
                backend.precision = np.asarray(self.eval["precision"])
                backend.labels = [int(label) for label in self.params.catIds]

        return RecordedEvaluation

    def average_precision_by_label(self) -> dict[int, float]:
        """Return the mean over IoU thresholds and recalls, all areas, 100 detections: COCOeval's `stats[0]`."""
        averages = {}
        for position, label in enumerate(self.labels):
            values = self.precision[:, :, position, 0, -1]
            defined = values[values > -1]
            averages[label] = float(defined.mean()) if defined.size else float("nan")
        return averages


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """COCO's format is a dict per box: collecting again and again what is still in use is a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nan_if_negative(value: float) -> float:
    return value if value >= 0 else float("nan")  # pycocotools says -1 where nothing is defined
