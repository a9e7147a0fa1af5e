"""Exponential moving average of the weights."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from onestage.errors import require
from onestage.training.optimization import require_whole_weights

# In a checkpoint `state_dict` holds the average, so that every reader gets the better weights, and this key the raw
# weights. Lightning's WeightAveraging uses the same two names.
RAW_WEIGHTS = "current_model_state"


class ExponentialMovingAverage(Callback):
    """Update average <- d average + (1 - d) weights after every optimizer step, and evaluate the average.

    d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...: a short memory at first, so that the random initial
    weights are soon forgotten. All floating-point entries of the state dict are averaged, including the running
    statistics of batch norm; integer counters are not.

    During a validation the module holds the average and this callback the raw weights; the two exchange storage, so
    that nothing is copied or rounded. After `fit` the module keeps the average. Not Lightning's WeightAveraging, which
    saves average and raw weights swapped if a validation raises, and waits for the device twice per step.

    Args:
        decay: d after the ramp, in (0, 1); null: off. An average over about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float | None = None) -> None:
        remedy = "Set ema.decay: 0.9998 for 100,000 steps, 0.999 for 10,000, or null for no average."
        require(decay is None or 0 < decay < 1, "ema.decay", decay, "in (0, 1), or null", remedy)
        self.decay = decay
        self.num_updates = 0
        self._names: dict[str, int] = {}  # name in the state dict -> position in the lists
        self._weights: list[Tensor] = []  # the module's tensors, each once, even if it has several names
        self._other: list[Tensor] = []  # values that the module does not hold now: the average, or the raw weights
        self._is_swapped = False
        self._step = 0
        self._loaded: dict[str, Tensor] | None = None  # average of a checkpoint, until the module is on its device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the ramp anew; refuse strategies that split the weights."""
        self.num_updates = 0 if stage == "fit" else self.num_updates
        if stage == "fit" and self.decay is not None:
            require_whole_weights(trainer.strategy, "ema.decay", "ema.decay: null")
            rule = "null with trainer.precision bf16-true or 16-true, in which an average loses its small steps"
            require(trainer.precision not in ("bf16-true", "16-true"), "ema.decay", self.decay, rule)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the average. Only now is the module complete, on its device, and loaded from a checkpoint."""
        if self.decay is None:
            return
        state = pl_module.state_dict(keep_vars=True)
        state = {name: value for name, value in state.items() if value.is_floating_point()}
        self._weights = list({id(value): value for value in state.values()}.values())
        positions = {id(value): position for position, value in enumerate(self._weights)}
        self._names = {name: positions[id(value)] for name, value in state.items()}
        self._other = [weight.detach().clone() for weight in self._weights]
        self._is_swapped = False
        if self._loaded is not None:
            for name, position in self._names.items():
                self._other[position].copy_(self._loaded[name])
            self._loaded = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the optimizer step: under accumulation not every batch ends in one."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Update the average after an optimizer step."""
        if self._weights and self.decay is not None and trainer.global_step > self._step:
            decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))  # no device synchronisation
            update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            update(self._other, [weight.data for weight in self._weights], self.num_updates)
            self.num_updates += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the module, also at the end of training: it was evaluated."""
        self._hold_average(True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: Any = None) -> None:
        """Restore the raw weights, also if a validation raises; callbacks that write checkpoints are called later."""
        self._hold_average(False)

    on_train_end, on_exception = on_validation_start, on_validation_end

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the memory; the module keeps what it holds."""
        self._names, self._weights, self._other, self._is_swapped = {}, [], [], False

    def _hold_average(self, wanted: bool) -> None:
        """Make the module hold the average, or the raw weights."""
        if not self._weights or self.num_updates == 0 or self._is_swapped == wanted:
            return
        with torch.inference_mode(False):  # an inference tensor among the weights could never be trained again
            for position, weight in enumerate(self._weights):
                weight.data, self._other[position] = self._other[position], weight.data
        self._is_swapped = wanted

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the ramp."""
        return {"num_updates": self.num_updates} if self._weights else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the ramp."""
        self.num_updates = int(state_dict.get("num_updates", 0)) if self.decay is not None else 0

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the average as `state_dict` and the raw weights beside it, whichever of them the module holds."""
        if self._weights:
            held = checkpoint["state_dict"]
            other = {**held, **{name: self._other[position] for name, position in self._names.items()}}
            checkpoint["state_dict"], checkpoint[RAW_WEIGHTS] = (held, other) if self._is_swapped else (other, held)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue training from the raw weights, and keep the average if there is to be one."""
        raw = checkpoint.get(RAW_WEIGHTS)
        if raw is None and self.decay is not None:
            rank_zero_info("ema: the checkpoint has no average; a new one starts from its weights.")
        elif raw is not None:  # Lightning has loaded `state_dict`, the average
            if self.decay is None:
                rank_zero_info("ema: the average in the checkpoint is ignored, because ema.decay is null.")
            else:  # from the module, because it may ignore entries of the file, such as class weights
                self._loaded = {name: value.clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(raw)
