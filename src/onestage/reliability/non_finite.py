"""What keeps a NaN or an infinity out of the weights and out of every checkpoint."""

import json
import math
from collections import deque
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from onestage.errors import ConfigError, NonFiniteError, ResourceError
from onestage.files import atomic_write
from onestage.reliability.diagnosis import (
    SkippedStep,
    StepNumbers,
    as_json,
    box_facts,
    describe,
    image_facts,
    largest_weight,
    likely_cause,
    non_finite_entries,
    non_finite_names,
    prediction_facts,
)
from onestage.training.module import DetectionModule
from onestage.training.optimization import is_fused, scaler_of
from onestage.types import Batch

# fp16's loss scaler starts at 2^16 and halves at each overflow: after 16 in a row the scale is 1 and not the reason.
MAX_SCALER_SKIPS = 20
DIAGNOSIS_FILE = "skipped_steps.json"
NUM_STEPS_KEPT = 20  # in memory and in the file


@dataclass
class Window:
    """The batches of one optimizer step: as many as trainer.accumulate_grad_batches."""

    buffers: dict[str, Tensor]  # copies from before the step
    loss: Tensor | None = None
    batches: list[Batch] = field(default_factory=list)
    numbers: StepNumbers | None = None
    learning_rates: list[float] = field(default_factory=list)
    bad_gradients: list[str] = field(default_factory=list)
    is_stepped: bool = False
    is_skipped: bool = False


class NonFiniteGuard(Callback):
    """Skips a step whose loss or gradient is NaN or infinite, and ends a training that goes on having them.

    A skipped step changes no weight, no optimizer state and no buffer; the learning rate goes on along its schedule. Of
    each one the diagnosis goes into `skipped_steps.json` of the run folder. All processes of a run decide alike. Costs
    one look at the device per step, of loss and gradient norm together, and logs the norm as `train/gradient_norm`.
    fp16's loss scaler skips steps of its own to find its scale; these count only when there is no end of them.

    Args:
        max_skipped_steps: in a row; the next one ends the training. At least 0.
    """

    def __init__(self, max_skipped_steps: int = 3) -> None:
        if max_skipped_steps < 0:
            raise ConfigError(f"guard.max_skipped_steps is {max_skipped_steps}; it must be 0 or more.")
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = 0
        self._num_in_row = self._num_scaler_skips = 0
        self._folder = Path()
        self._window: Window | None = None
        self._persistent: frozenset[str] = frozenset()
        self._steps_before: deque[StepNumbers] = deque(maxlen=NUM_STEPS_KEPT)
        self._records: deque[dict[str, Any]] = deque(maxlen=NUM_STEPS_KEPT)
        self._is_refused = False  # the file of the diagnosis

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on has to know of the steps so far: numbers and text."""
        return {
            "num_skipped": self.num_skipped,
            "num_in_row": self._num_in_row,
            "num_scaler_skips": self._num_scaler_skips,
            "steps_before": [astuple(one) for one in self._steps_before],
            "records": list(self._records),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting. A checkpoint of before there was this state begins at 0."""
        self.num_skipped = state_dict["num_skipped"]
        self._num_in_row = state_dict["num_in_row"]
        self._num_scaler_skips = state_dict["num_scaler_skips"]
        self._records = deque(state_dict["records"], maxlen=NUM_STEPS_KEPT)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined] # the losses are those of the process that saved
            self._steps_before = deque((StepNumbers(*one) for one in state_dict["steps_before"]), maxlen=NUM_STEPS_KEPT)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the weights and, when a run goes on, at the optimizer's state.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))  # the first process's
        weights = pl_module.state_dict()
        self._persistent = frozenset(weights)
        names = non_finite_entries(
            {"state_dict": weights, "optimizer": [one.state_dict() for one in trainer.optimizers]}
        )
        if _is_any(trainer, names):
            raise NonFiniteError(
                f"training cannot start: {_first(names)} NaN or infinity.\n"
                "Start from other weights: model.detector.init_args.backbone_weights or pretrained, or another "
                "checkpoint with --ckpt_path."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the buffers, which the forward pass changes: batch norm's statistics, a loss's running means."""
        if self._window is None:
            named = pl_module.named_buffers()
            self._window = Window({name: one.clone() for name, one in named if name in self._persistent})

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add to the loss of the step. Nothing here waits for the device."""
        if self._window is not None:
            before = self._window.loss
            self._window.loss = loss.detach() if before is None else before + loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at loss and gradient, and take the gradients away if they are not to be stepped with."""
        window = self._window
        if window is None or window.loss is None:
            return
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss, gradient_norm, is_loss_bad, is_norm_bad = _look(trainer, window.loss, norm)
        scaler = scaler_of(trainer)
        is_scaled = scaler is not None and is_fused(optimizer)  # such an optimizer unscales inside its step
        if scaler is not None:
            loss /= scaler.get_scale()
            gradient_norm /= scaler.get_scale() if is_scaled else 1.0
        window.is_stepped = True
        window.numbers = StepNumbers(trainer.global_step, loss, gradient_norm)
        window.learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        if not is_loss_bad and not is_norm_bad:
            self._num_in_row = self._num_scaler_skips = 0
            self._steps_before.append(window.numbers)
            pl_module.log("train/gradient_norm", gradient_norm)
            return
        self._restore(pl_module, window)
        window.bad_gradients = non_finite_names((name, one.grad) for name, one in pl_module.named_parameters())
        is_the_scalers = scaler is not None and not is_loss_bad  # it lowers its scale and does not step either
        self._num_scaler_skips += int(is_the_scalers)
        window.is_skipped = not is_the_scalers or self._num_scaler_skips > MAX_SCALER_SKIPS
        if scaler is not None and is_scaled:
            scaler.unscale_(optimizer)  # now, as its update fails if it has seen no gradients
        optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is left out by every optimizer

    @staticmethod
    def _restore(module: pl.LightningModule, window: Window) -> None:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in window.buffers:
                    buffer.copy_(window.buffers[name])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a skipped step, write its diagnosis, and stop if there were too many.

        Raises:
            NonFiniteError: more than `max_skipped_steps` in a row were skipped.
        """
        window = self._window
        if window is None:
            return
        # Without its images, which are most of its memory.
        window.batches.append(cast(Batch, batch)._replace(images=torch.empty(0)))
        if not window.is_stepped:
            return
        self._window = None
        if window.is_skipped:
            self.num_skipped += 1
            self._num_in_row += 1
            self._report(trainer, self._facts(trainer, cast(DetectionModule, pl_module), window, outputs))
        pl_module.log("train/skipped_steps", float(self.num_skipped))

    def _facts(self, trainer: pl.Trainer, module: DetectionModule, window: Window, outputs: Any) -> SkippedStep:
        assert window.numbers is not None
        terms = {name: float(value.detach()) for name, value in outputs.items() if isinstance(value, Tensor)}
        indices = torch.cat([batch.image_indices for batch in window.batches]).tolist()
        return SkippedStep(
            epoch=trainer.current_epoch,
            step=window.numbers.step,
            loss=window.numbers.loss,
            gradient_norm=window.numbers.gradient_norm,
            loss_terms=terms,
            learning_rates=window.learning_rates,
            precision=str(trainer.precision),
            images=image_facts(module.data.annotations("train"), indices),
            boxes=box_facts([batch.targets for batch in window.batches]),
            predictions=prediction_facts(outputs["predictions"]),
            largest_weight=largest_weight(module),
            bad_weights=non_finite_names(module.named_parameters()),
            bad_gradients=window.bad_gradients,
            steps_before=list(self._steps_before),
        )

    def _report(self, trainer: pl.Trainer, step: SkippedStep) -> None:
        steps = _of_all_processes(trainer, step)
        worst = next((one for one in steps if not math.isfinite(one.loss)), steps[0])
        is_end = self._num_in_row > self.max_skipped_steps or self._num_scaler_skips > MAX_SCALER_SKIPS
        self._records.append({"step": step.step, "processes": [as_json(one) for one in steps]})
        self._write(is_end)
        where = str(self._folder / DIAGNOSIS_FILE) + (", which could not be written" if self._is_refused else "")
        if is_end:
            num = max(self._num_in_row, self._num_scaler_skips)
            raise NonFiniteError(
                f"training ends at step {step.step} of epoch {step.epoch}: loss or gradient was not finite {num} "
                f"times in a row. None of these steps changed the weights.\n{describe(worst)}\n"
                f"All of it: {where}\nWhat was written to {self._folder / 'checkpoints'} before is sound."
            )
        rank_zero_warn(
            f"step {step.step} of epoch {step.epoch} is skipped ({self._num_in_row} in a row, training ends after "
            f"{self.max_skipped_steps}; {self.num_skipped} in all): loss {worst.loss:.4g}, gradient norm "
            f"{worst.gradient_norm:.4g}. Likely cause: {likely_cause(worst)[0]}. See {where}"
        )

    @rank_zero_only
    def _write(self, is_end: bool) -> None:
        is_first, self._is_refused = not self._is_refused, False
        content = {"num_skipped": self.num_skipped, "ended_training": is_end, "latest": list(self._records)}
        try:
            with atomic_write(self._folder / DIAGNOSIS_FILE) as temporary:
                temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except ResourceError as error:  # not worth a training that is well
            if is_first:
                rank_zero_warn(f"{str(error).splitlines()[0]} Training goes on without.")
            self._is_refused = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint be written that holds a NaN or an infinity.

        Raises:
            NonFiniteError: it does.
        """
        names = non_finite_entries(checkpoint)  # asking the others would hang where one process alone saves
        if names:
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            raise NonFiniteError(
                f"training ends at step {trainer.global_step}: the checkpoint was not written, for {_first(names)} NaN "
                "or infinity. Steps with such gradients are not taken, so an update itself overflowed; the learning "
                f"rate is {max(rates, default=0):.4g}.\n"
                "Lower model.optimizer.init_args.lr, or lengthen model.schedule.warmup_steps. Checkpoints written "
                "before are sound."
            )


def _look(trainer: pl.Trainer, loss: Tensor, norm: Tensor) -> tuple[float, float, bool, bool]:
    """Return loss and norm, and of each whether it is not finite in any process. Waits for the device, once."""
    norm = norm.to(loss.device, torch.float32)
    if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a piece of every gradient
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    values = torch.stack((loss.float(), norm))
    are_bad = (~values.isfinite()).float()
    if trainer.world_size > 1:  # gradients are the same everywhere; a loss that gives none is not
        dist.all_reduce(are_bad, dist.ReduceOp.MAX)
    loss_value, norm_value, is_loss_bad, is_norm_bad = torch.cat((values, are_bad)).tolist()
    return loss_value, norm_value, bool(is_loss_bad), bool(is_norm_bad)


def _is_any(trainer: pl.Trainer, names: list[str]) -> bool:
    """Say whether any process has found names; all of them get the same answer."""
    return bool(trainer.strategy.reduce_boolean_decision(bool(names), all=False))


def _first(names: list[str]) -> str:
    return f"{len(names)} tensors, the first of them {names[0]}, hold" if names else "another process's tensors hold"


def _of_all_processes(trainer: pl.Trainer, step: SkippedStep) -> list[SkippedStep]:
    if trainer.world_size == 1:
        return [step]
    steps: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(steps, step)
    return cast(list[SkippedStep], steps)
