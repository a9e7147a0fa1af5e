"""Keep NaN and infinity out of weights and checkpoints; report the likely cause."""

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from onestage.data.annotations import shortened
from onestage.errors import NonFiniteError, ResourceError, require
from onestage.files import atomic_write
from onestage.training.module import DetectionModule
from onestage.training.optimization import is_fused, scaler_of
from onestage.types import PADDING, Batch, JSONDict

# fp16's loss scaler starts at 2^16 and halves at each overflow: after 16 in a row the scale is 1 and not the reason.
MAX_SCALER_SKIPS = 20
COUNTS = ("num_skipped", "num_in_row", "num_scaler_skips")
DIAGNOSIS_FILE = "skipped_steps.json"
NUM_STEPS_KEPT = 20  # skipped ones, in memory and in the file
LOWER_LR = "Lower model.optimizer.init_args.lr, or lengthen model.schedule.warmup_steps."


@dataclass
class Window:
    """The batches of one optimizer step: trainer.accumulate_grad_batches of them."""

    buffers: dict[str, Tensor]  # copies from before the step
    loss: Tensor | None = None
    batches: list[Batch] = field(default_factory=list)
    facts: JSONDict = field(default_factory=dict)  # of a bad step, known before its gradients are cleared
    is_stepped: bool = False
    is_skipped: bool = False


class NonFiniteGuard(Callback):
    """Skip steps with a non-finite loss or gradient; end a training with too many.

    A skipped step changes no weight, no optimizer state and no buffer. The diagnosis of each one is written to
    `skipped_steps.json` in the run folder. All processes decide alike. Costs one transfer from the device per step.
    fp16's loss scaler skips steps to find its scale; these count only if it finds none.

    Args:
        max_skipped_steps: in a row, >= 0; one more ends the training.
    """

    def __init__(self, max_skipped_steps: int = 3) -> None:
        require(max_skipped_steps >= 0, "guard.max_skipped_steps", max_skipped_steps, ">= 0")
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = self.num_in_row = self.num_scaler_skips = 0
        self._records: deque[JSONDict] = deque(maxlen=NUM_STEPS_KEPT)
        self._folder = Path()
        self._window: Window | None = None
        self._persistent: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and records of the steps so far: numbers and text."""
        return {**{name: getattr(self, name) for name in COUNTS}, "records": list(self._records)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        vars(self).update({name: state_dict[name] for name in COUNTS})
        self._records.extend(state_dict["records"])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Raise NonFiniteError for non-finite weights or resumed optimizer state."""
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))  # of the first process
        weights = module.state_dict()
        self._persistent = frozenset(weights)
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        names = non_finite_names({"state_dict": weights, "optimizer": states})
        if trainer.strategy.reduce_boolean_decision(bool(names), all=False):  # the same answer in all processes
            remedy = "Start from other weights: `pretrained` of the detector, or another checkpoint with --ckpt_path."
            raise NonFiniteError(f"training cannot start: {_first(names)} NaN or infinity.\n{remedy}")

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Copy the buffers that the forward pass changes, such as batch norm's statistics."""
        if self._window is None:
            buffers = module.named_buffers()
            self._window = Window({name: value.clone() for name, value in buffers if name in self._persistent})

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
        """Add to the loss of the step without waiting for the device."""
        if self._window is not None:
            before = self._window.loss
            self._window.loss = loss.detach() if before is None else before + loss.detach()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Optimizer) -> None:
        """Check loss and gradients; clear the gradients if the step must be skipped."""
        window = self._window
        if window is None or window.loss is None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss, gradient_norm, is_loss_bad, is_norm_bad = _check_values(trainer, window.loss, norm)
        scaler = scaler_of(trainer)
        is_scaled = scaler is not None and is_fused(optimizer)  # it unscales inside its step
        if scaler is not None:
            loss /= scaler.get_scale()
            gradient_norm /= scaler.get_scale() if is_scaled else 1.0
        window.is_stepped = True
        numbers = {"step": trainer.global_step, "loss": loss, "gradient_norm": gradient_norm}
        module.log("train/gradient_norm", gradient_norm)  # also if it is not finite, or loggers repeat the last one
        if not is_loss_bad and not is_norm_bad:
            self.num_in_row = self.num_scaler_skips = 0
            return
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in window.buffers:
                    buffer.copy_(window.buffers[name])
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        bad = non_finite_names({name: parameter.grad for name, parameter in module.named_parameters()})
        window.facts = {"epoch": trainer.current_epoch, **numbers, "learning_rates": rates, "bad_gradients": bad}
        is_scaler_skip = scaler is not None and not is_loss_bad  # it lowers its scale and does not step either
        self.num_scaler_skips += int(is_scaler_skip)
        window.is_skipped = not is_scaler_skip or self.num_scaler_skips > MAX_SCALER_SKIPS
        if scaler is not None and is_scaled:
            scaler.unscale_(optimizer)  # its update fails if it has seen no gradients
        optimizer.zero_grad(set_to_none=True)  # every optimizer skips a parameter without gradient

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count and explain a skipped step; raise NonFiniteError if there were too many."""
        window = self._window
        if window is None:
            return
        window.batches.append(cast(Batch, batch)._replace(images=torch.empty(0)))  # most of its memory
        if not window.is_stepped:
            return
        self._window = None
        if window.is_skipped:
            self.num_skipped += 1
            self.num_in_row += 1
            self._report(trainer, self._facts(trainer, module, window, outputs))
        module.log("train/skipped_steps", float(self.num_skipped))

    def _facts(self, trainer: pl.Trainer, module: DetectionModule, window: Window, outputs: Any) -> JSONDict:
        annotations = module.data.annotations("train")
        ids, paths = annotations.image_ids, annotations.image_paths
        rows = torch.cat([batch.image_indices for batch in window.batches]).tolist()
        predictions = outputs["predictions"]._asdict()
        targets = [batch.targets for batch in window.batches]
        boxes = torch.cat([each.boxes[each.labels != PADDING] for each in targets]).float()  # also ignored ones
        is_finite, is_empty = boxes.isfinite().all(dim=1), (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        num_empty, num_non_finite = int((is_empty & is_finite).sum()), int((~is_finite).sum())
        facts = {
            **window.facts,
            "loss_terms": {name: float(value.detach()) for name, value in outputs.items() if isinstance(value, Tensor)},
            "precision": str(trainer.precision),
            "images": [{"image_id": int(ids[row]), "file": str(paths[row])} for row in rows],
            "boxes": {"num_boxes": len(boxes), "num_empty": num_empty, "num_non_finite": num_non_finite},
            "predictions": {name: tensor_facts(t) for name, t in predictions.items() if isinstance(t, Tensor)},
            "bad_weights": non_finite_names(dict(module.named_parameters())),
        }
        cause, remedy = likely_cause(facts)
        return {**facts, "likely_cause": cause, "what_to_change": remedy}

    def _report(self, trainer: pl.Trainer, facts: JSONDict) -> None:
        processes: list[Any] = [facts] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(processes, facts)
        worst = next((other for other in processes if not math.isfinite(other["loss"])), processes[0])
        is_end = self.num_in_row > self.max_skipped_steps or self.num_scaler_skips > MAX_SCALER_SKIPS
        as_text = json.loads(json.dumps(processes), parse_constant=lambda text: str(float(text)))  # NaN and infinity
        self._records.append({"step": facts["step"], "processes": as_text})
        where = self._write(is_end) if trainer.is_global_zero else str(self._folder / DIAGNOSIS_FILE)
        place = f"step {facts['step']} of epoch {facts['epoch']}"
        if is_end:
            count = max(self.num_in_row, self.num_scaler_skips)
            raise NonFiniteError(
                f"training ends at {place}: loss or gradient was not finite {count} times in a row.\n"
                f"Likely cause: {worst['likely_cause']}.\nWhat to change: {worst['what_to_change']}\n"
                f"All details: {where}\nWeights and checkpoints are finite."
            )
        counts = f"{self.num_in_row} in a row, training ends after {self.max_skipped_steps}; {self.num_skipped} in all"
        values = f"loss {worst['loss']:.4g}, gradient norm {worst['gradient_norm']:.4g}"
        rank_zero_warn(f"{place} is skipped ({counts}): {values}. Likely cause: {worst['likely_cause']}. See {where}")

    def _write(self, is_end: bool) -> str:
        """Write the diagnosis; return its place. A full disk is no reason to end the training."""
        content = {"num_skipped": self.num_skipped, "ended_training": is_end, "latest": list(self._records)}
        try:
            with atomic_write(self._folder / DIAGNOSIS_FILE) as temporary:
                temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        except ResourceError as error:
            return str(error).splitlines()[0]
        return str(self._folder / DIAGNOSIS_FILE)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Raise NonFiniteError instead of writing a checkpoint that holds NaN or infinity."""
        names = non_finite_names(checkpoint)  # without the other processes: one may save alone
        if names:
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            raise NonFiniteError(
                f"training ends at step {trainer.global_step}: the checkpoint was not written: {_first(names)} NaN or "
                f"infinity: an update overflowed, with learning rate {max(rates, default=0):.4g}.\n{LOWER_LR}"
            )


def _check_values(trainer: pl.Trainer, loss: Tensor, norm: Tensor) -> tuple[float, float, bool, bool]:
    """Return loss, norm, and whether each is non-finite in any process."""
    norm = norm.to(loss.device, torch.float32)
    if isinstance(trainer.strategy, FSDPStrategy):  # each process holds a part of every gradient
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    values = torch.stack((loss.float(), norm))
    are_bad = (~values.isfinite()).float()
    if trainer.world_size > 1:  # gradients are the same in all processes, losses are not
        dist.all_reduce(are_bad, dist.ReduceOp.MAX)
    loss_value, norm_value, is_loss_bad, is_norm_bad = torch.cat((values, are_bad)).tolist()
    return loss_value, norm_value, bool(is_loss_bad), bool(is_norm_bad)


def _first(names: list[str]) -> str:
    return f"{len(names)} tensors, the first of them {names[0]}, hold" if names else "another process's tensors hold"


def tensor_facts(values: Tensor) -> JSONDict:
    """Count the non-finite values of a tensor; return the range of the finite ones."""
    finite = values.detach()[values.isfinite()]
    num_non_finite = values.numel() - finite.numel()
    smallest, largest = (float(finite.min()), float(finite.max())) if finite.numel() else (None, None)
    return {"num_non_finite": num_non_finite, "smallest": smallest, "largest": largest}


def non_finite_names(node: object, place: str = "") -> list[str]:
    """Return the dotted keys of the tensors with NaN or infinity in nested dictionaries and lists."""
    if isinstance(node, Tensor):
        is_score = node.ndim == 0 and place.startswith("callbacks.")  # of a callback; it may be -inf
        return [place] if node.is_floating_point() and not is_score and not bool(node.isfinite().all()) else []
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    names = (non_finite_names(child, f"{place}.{key}" if place else str(key)) for key, child in children)
    return [name for inner in names for name in inner]


def likely_cause(facts: JSONDict) -> tuple[str, str]:
    """Return cause and remedy, tested in order: data, outputs, loss, gradient."""
    boxes, predictions, names = facts["boxes"], facts["predictions"], facts["bad_gradients"]
    if bad_weights := shortened(facts["bad_weights"], 3):
        return f"the weights are not finite ({bad_weights}): an earlier update overflowed", LOWER_LR
    if boxes["num_non_finite"] or boxes["num_empty"]:
        problem = "of {num_boxes} boxes {num_empty} have no area and {num_non_finite} are not finite".format(**boxes)
        remedy = f"Check the annotations of the images in {DIAGNOSIS_FILE}, and data.train_transforms"
        return f"the targets: {problem}", f"{remedy} if they change boxes."
    bad_outputs = shortened([name for name, values in predictions.items() if values["num_non_finite"]], 3)
    if bad_outputs and facts["precision"] == "16-mixed":
        problem = "activations beyond 65,504, the largest number of fp16: "
        remedy = "Set trainer.precision: bf16-mixed, or 32-true."
        return f"{problem}{bad_outputs} overflowed on finite weights", remedy
    if bad_outputs:
        return f"{bad_outputs} overflowed on finite weights", LOWER_LR
    own_loss = f"{LOWER_LR} If the loss is your own, check its values and derivative: docs/add_a_loss.md."
    terms = facts["loss_terms"].items()
    if bad_terms := shortened([name for name, value in terms if not math.isfinite(value) and name != "loss"], 3):
        ranges = ", ".join(f"{name} {v['smallest']:.3g}..{v['largest']:.3g}" for name, v in predictions.items())
        return f"{bad_terms} is not finite although all predictions are ({ranges})", own_loss
    if not math.isfinite(facts["loss"]):
        return "an earlier batch of the step (trainer.accumulate_grad_batches) has a bad loss", LOWER_LR
    where = f"in {len(names)} parameters from {names[0]} to {names[-1]}" if names else "only in its norm"
    return f"the loss is finite and its gradient is not, {where}", own_loss
