"""An exponential moving average of the weights: evaluated and kept as the best, while training goes on with the raw."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from onestage.errors import ConfigError
from onestage.training.optimization import shards_parameters

# In a checkpoint `state_dict` holds the average, so that whoever reads the file gets the better weights without knowing
# about this class, and this key the raw weights. Lightning's own WeightAveraging uses the same two names.
RAW_WEIGHTS = "current_model_state"


class ExponentialMovingAverage(Callback):
    """Keeps average <- d average + (1 - d) weights after every optimizer step, and evaluates the average.

    d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...: a short memory at first, so that the random weights of
    the start are soon forgotten. Everything of floating point in the module's state dict is averaged, the running
    statistics of batch norm included; integer counters have no average and stay as they are.

    During a validation the module holds the average and the raw weights wait here, by exchanging storage: nothing is
    copied, and nothing is rounded. After `fit` the module keeps the average. Before the first update there is none, and
    the raw weights are evaluated.

    Args:
        decay: d after the ramp, in (0, 1); null: off. An average over about 1 / (1 - decay) steps.

    Raises:
        ConfigError: decay is out of its range, or the strategy splits the weights over processes.
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ConfigError(
                f"ema.decay is {decay}; it must lie in (0, 1).\nSet ema.decay: 0.9998 for a run of 100,000 steps, "
                "0.999 for one of 10,000, or null for no average."
            )
        self.decay = decay
        self.num_updates = 0
        self._names: dict[str, int] = {}  # of the state dict -> position in the lists
        self._weights: list[Tensor] = []  # the module's own, each once, however many names it has
        self._other: list[Tensor] = []  # the values that the module does not hold now: the average, or the raw ones
        self._is_swapped = False
        self._step = 0
        self._loaded: dict[str, Tensor] | None = None  # the average of a checkpoint, until the module is on its device

    @property
    def is_on(self) -> bool:
        """Whether there is anything to average: in `fit`, with a decay."""
        return bool(self._weights)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies under which a process holds only a part of each weight."""
        if stage == "fit" and self.decay is not None and shards_parameters(trainer.strategy):
            raise ConfigError(
                f"ema.decay is {self.decay}, but {type(trainer.strategy).__name__} splits the weights over the "
                "processes, and the average needs them whole.\nSet ema.decay: null, or trainer.strategy: ddp."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the average. Only now is the module complete, on its device, and loaded from a checkpoint."""
        if self.decay is None:
            return
        state = pl_module.state_dict(keep_vars=True)
        unique = {id(value): value for value in state.values() if value.is_floating_point()}
        positions = {identity: position for position, identity in enumerate(unique)}
        self._names = {name: positions[id(value)] for name, value in state.items() if id(value) in positions}
        self._weights = list(unique.values())
        self._other = [weight.detach().clone() for weight in self._weights]
        self._is_swapped = False
        if self._loaded is not None:
            for name, position in self._names.items():
                self._other[position].copy_(self._loaded[name])
            self._loaded = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the number of optimizer steps: under accumulation not every batch ends in one."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average towards the weights if they were stepped."""
        if self.is_on and trainer.global_step > self._step:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        assert self.decay is not None
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))  # a Python number: no device waits
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(self._other, [weight.data for weight in self._weights], self.num_updates)
        self.num_updates += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module."""
        self._hold_average(True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the raw weights back; Lightning calls the callbacks that write checkpoints after this one."""
        self._hold_average(False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the raw weights back when a validation is cut off."""
        self._hold_average(False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module with the average, which is what the run has shown to be good."""
        self._hold_average(True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the memory. What the module holds stays."""
        self._names, self._weights, self._other, self._is_swapped = {}, [], [], False

    def _hold_average(self, wanted: bool) -> None:
        """Make the module hold the average, or the raw weights."""
        if not self.is_on or self.num_updates == 0 or self._is_swapped == wanted:
            return
        with torch.inference_mode(False):  # an inference tensor among the weights could never be trained again
            for position, weight in enumerate(self._weights):
                weight.data, self._other[position] = self._other[position], weight.data
        self._is_swapped = wanted

    def state_dict(self) -> dict[str, Any]:
        """Return what the ramp of the decay depends on."""
        return {"num_updates": self.num_updates} if self.is_on else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the ramp where the checkpoint was."""
        self.num_updates = int(state_dict.get("num_updates", 0)) if self.decay is not None else 0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average as `state_dict` and the raw weights beside it, whichever of them the module holds now."""
        if not self.is_on:
            return
        held = checkpoint["state_dict"]
        other = {**held, **{name: self._other[position] for name, position in self._names.items()}}
        checkpoint["state_dict"], checkpoint[RAW_WEIGHTS] = (held, other) if self._is_swapped else (other, held)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Train on from the raw weights, with the average beside them if there is to be one."""
        raw = checkpoint.get(RAW_WEIGHTS)
        if raw is None:
            if self.decay is not None:
                rank_zero_info("ema: the checkpoint has no average of its weights; it begins with those weights.")
            return
        if self.decay is None:
            rank_zero_info("ema: the checkpoint's average of the weights is left behind, because ema.decay is null.")
        else:
            # Not from the file, for what the module does not take of it, such as class weights, is not averaged either.
            self._loaded = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.load_state_dict(raw)  # Lightning has loaded `state_dict`
