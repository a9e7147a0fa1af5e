"""What was wrong with a step whose loss or gradient was not finite: the facts, the likely cause, what to change."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from onestage.types import IGNORE, PADDING, AnnotationSet, JSONDict, Predictions, Targets

RISING = 10.0  # a loss this many times the median of the steps before it had got out of hand before it overflowed


@dataclass(frozen=True)
class ImageFacts:
    """An image of the batch."""

    image_id: int
    file: str


@dataclass(frozen=True)
class BoxFacts:
    """The objects of the batch, in network-input pixels."""

    num_boxes: int
    num_regions: int  # left out of the loss
    num_empty: int  # without width or height
    num_non_finite: int
    smallest_side: float | None  # of the finite boxes
    largest_side: float | None


@dataclass(frozen=True)
class TensorFacts:
    """The values of a tensor."""

    num_non_finite: int
    smallest: float | None  # of the finite ones
    largest: float | None


@dataclass(frozen=True)
class StepNumbers:
    """A step of the run: what the guard saw of every one."""

    step: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not taken, as one process saw it."""

    epoch: int
    step: int
    loss: float
    gradient_norm: float
    loss_terms: dict[str, float]  # of the step's last batch
    learning_rates: list[float]  # of each parameter group
    precision: str
    images: list[ImageFacts]
    boxes: BoxFacts
    predictions: dict[str, TensorFacts]  # of the step's last batch
    largest_weight: float
    bad_weights: list[str]  # names of parameters that are not finite
    bad_gradients: list[str]
    steps_before: list[StepNumbers] = field(default_factory=list)


def image_facts(annotations: AnnotationSet, image_indices: Iterable[int]) -> list[ImageFacts]:
    """Name images of a split by the data set's own ids and their files."""
    return [ImageFacts(int(annotations.image_ids[i]), str(annotations.image_paths[i])) for i in image_indices]


def box_facts(targets: Sequence[Targets]) -> BoxFacts:
    """Measure the boxes of one or more batches."""
    boxes = torch.cat([target.boxes[target.labels != PADDING] for target in targets]).float()
    labels = torch.cat([target.labels[target.labels != PADDING] for target in targets])
    is_finite = boxes.isfinite().all(dim=1)
    sides = boxes[is_finite][:, 2:] - boxes[is_finite][:, :2]
    return BoxFacts(
        num_boxes=int((labels != IGNORE).sum()),
        num_regions=int((labels == IGNORE).sum()),
        num_empty=int((sides <= 0).any(dim=1).sum()),
        num_non_finite=int((~is_finite).sum()),
        smallest_side=float(sides.min()) if len(sides) else None,
        largest_side=float(sides.max()) if len(sides) else None,
    )


def tensor_facts(values: Tensor) -> TensorFacts:
    """Measure a tensor."""
    finite = values[values.isfinite()]
    return TensorFacts(
        num_non_finite=values.numel() - finite.numel(),
        smallest=float(finite.min()) if finite.numel() else None,
        largest=float(finite.max()) if finite.numel() else None,
    )


def prediction_facts(predictions: Predictions) -> dict[str, TensorFacts]:
    """Measure what the network said."""
    tensors = {name: value for name, value in predictions._asdict().items() if isinstance(value, Tensor)}
    return {name: tensor_facts(value.detach()) for name, value in tensors.items()}


def non_finite_names(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity."""
    return [
        name for name, tensor in tensors
        if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]  # fmt: skip


def non_finite_entries(checkpoint: JSONDict) -> list[str]:
    """Return the keys of a checkpoint's tensors that hold a NaN or an infinity.

    Single numbers in the states of callbacks are exempt: a best score starts at minus infinity.
    """
    tensors = _tensors("", checkpoint)
    return non_finite_names((key, one) for key, one in tensors if one.ndim > 0 or not key.startswith("callbacks."))


def _tensors(place: str, node: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield place, node
        return
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in children:
        yield from _tensors(f"{place}.{key}" if place else str(key), child)


def largest_weight(module: nn.Module) -> float:
    """Return the largest absolute value of the finite weights."""
    return max((float(p.detach().abs().nan_to_num(0, 0, 0).max()) for p in module.parameters() if p.numel()), default=0)


def likely_cause(step: SkippedStep) -> tuple[str, str]:
    """Return the likely cause in words, and what to change: from the data, forward to the gradient."""
    lower = "Lower model.optimizer.init_args.lr, or lengthen model.schedule.warmup_steps."
    boxes, predictions = step.boxes, step.predictions
    if step.bad_weights:
        return f"the weights are not finite ({_some(step.bad_weights)}): an update before this step overflowed", lower
    if boxes.num_non_finite or boxes.num_empty:
        return (
            f"the targets: of {boxes.num_boxes + boxes.num_regions} boxes {boxes.num_empty} have no area and "
            f"{boxes.num_non_finite} are not finite",
            "Look at the annotations of the images above, and at data.train_transforms if they change boxes.",
        )
    bad_outputs = [name for name, facts in predictions.items() if facts.num_non_finite]
    if bad_outputs and step.precision == "16-mixed":
        return (
            f"activations beyond 65,504, the largest number of fp16: {_some(bad_outputs)} overflowed on finite weights",
            "Set trainer.precision: bf16-mixed, or 32-true.",
        )
    rise = _rise(step)
    if bad_outputs:
        largest = f"the largest of which is {step.largest_weight:.3g}"
        return f"{_some(bad_outputs)} overflowed on finite weights, {largest}{rise}", lower
    bad_terms = [name for name, value in step.loss_terms.items() if not math.isfinite(value) and name != "loss"]
    if bad_terms:
        ranges = ", ".join(f"{name} {facts.smallest:.3g}..{facts.largest:.3g}" for name, facts in predictions.items())
        return (
            f"{_some(bad_terms)} is not finite although all predictions are ({ranges}){rise}",
            f"{lower} If the loss is your own, let it be finite at these values: docs/add_a_loss.md.",
        )
    if not math.isfinite(step.loss):
        return (
            f"an earlier batch of the step (trainer.accumulate_grad_batches) had a loss that is not finite{rise}",
            lower,
        )
    names = step.bad_gradients
    where = f"in {len(names)} parameters from {names[0]} to {names[-1]}" if names else "only in its norm"
    return (
        f"the loss is finite and its gradient is not, {where}{rise}",
        f"{lower} If the loss is your own, check its derivative: docs/add_a_loss.md.",
    )


def _rise(step: SkippedStep) -> str:
    losses = [numbers.loss for numbers in step.steps_before if math.isfinite(numbers.loss)]
    if len(losses) < 2 or losses[-1] < RISING * median(losses[:-1]):
        return ""
    return f"; the loss had risen from {median(losses[:-1]):.3g} to {losses[-1]:.3g} before"


def _some(names: Sequence[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def describe(step: SkippedStep) -> str:
    """Write the facts of a step for people: five lines."""
    boxes = step.boxes
    files = [f"{image.image_id} ({image.file})" for image in step.images]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in step.loss_terms.items())
    rates = ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(step.learning_rates))
    sides = "" if boxes.smallest_side is None else f"sides {boxes.smallest_side:.1f}..{boxes.largest_side:.1f} px, "
    cause, remedy = likely_cause(step)
    return (
        f"Likely cause: {cause}.\n"
        f"What to change: {remedy}\n"
        f"Loss: {terms}; gradient norm {step.gradient_norm:.4g}; learning rate {rates}; precision {step.precision}.\n"
        f"Boxes: {boxes.num_boxes}, {sides}{boxes.num_empty} empty, {boxes.num_non_finite} not finite.\n"
        f"Images: {_some(files, at_most=8)}."
    )


def as_json(step: SkippedStep) -> JSONDict:
    """Return the step for a JSON file, which has no word for NaN and infinity: they become text."""
    cause, remedy = likely_cause(step)
    readable: JSONDict = _without_non_finite({**asdict(step), "likely_cause": cause, "what_to_change": remedy})
    return readable


def _without_non_finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_non_finite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_non_finite(value) for value in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node
