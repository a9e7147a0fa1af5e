from . import data as data, losses as losses, models as models
from .cli.commands import Run as Run, train as train
from .deploy.predictor import (
    Evaluation as Evaluation,
    ImageDetections as ImageDetections,
    Predictor as Predictor,
    load as load,
)
from .training.module import DetectionModule as DetectionModule
from .training.trainer import DetectionTrainer as DetectionTrainer

__all__: list[str]
__version__: str
