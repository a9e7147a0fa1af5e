"""Working operations and synchronisations of a training step, outside its convolutions.

Counted on the calls that reach the device's kernels, from images and logits to the gradient of the logits. A working
operation is one that computes or copies: views and allocations are free. A synchronisation is one whose result the host
has to wait for: reading a number, or an output whose size depends on the data. On a GPU an operation costs some
5 microseconds to launch and a synchronisation leaves the device idle.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import ssd300_vgg16

from benchmarks.training_data import IMAGE_SIZE, NUM_CLASSES, as_torchvision, synthetic_batch
from onestage.losses import ClassificationLoss, MinedCrossEntropy, SigmoidFocalLoss
from onestage.models import SSD300
from onestage.types import Predictions

NUM_ANCHORS = 8732
FEATURE_SIDES = (38, 19, 10, 5, 3, 1)
MAX_WORKING_OPERATIONS = 170

# Outputs of a size that only the data decide, and numbers that are read.
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}


def run(rounds: int, quick: bool) -> None:
    """Count at batch sizes 4, 8 and 32; counts do not vary, so that `rounds` changes nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("outside the convolutions of a training step        working operations   synchronisations")
    counts: dict[str, set[tuple[int, int]]] = {}
    for batch_size in (1, 2) if quick else (4, 8, 32):
        sides = {
            "torchvision": torchvision_bookkeeping(batch_size, device),
            "onestage, mined cross-entropy": onestage_bookkeeping(batch_size, device, MinedCrossEntropy()),
            "onestage, focal loss": onestage_bookkeeping(batch_size, device, SigmoidFocalLoss()),
        }
        for name, bookkeeping in sides.items():
            count = count_operations(bookkeeping)
            counts.setdefault(name, set()).add(count)
            print(f"batch {batch_size:<3} {name:<40} {count[0]:>18} {count[1]:>18}")
    for name in ("onestage, mined cross-entropy", "onestage, focal loss"):
        assert len(counts[name]) == 1, f"{name}: the counts depend on the batch size"
        ((working, synchronising),) = counts[name]
        assert synchronising == 0, f"{name}: the host waits for the device {synchronising} times"
        assert working <= MAX_WORKING_OPERATIONS, f"{name}: {working} working operations"
    print(f"asserted: onestage never waits and has at most {MAX_WORKING_OPERATIONS} operations, at any batch size")


class OperationCounter(TorchDispatchMode):
    """Counts while it is entered; backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.working: Counter[str] = Counter()
        self.synchronising: Counter[str] = Counter()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation down and run it."""
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING or _indexes_by_mask(name, args):
            self.synchronising[name] += 1
        if name not in FREE and not _is_view(func):
            self.working[name] += 1
        return func(*args, **(kwargs or {}))


def count_operations(call: Callable[[], object]) -> tuple[int, int]:
    """Return how many working operations and synchronisations a call makes, after a first call to settle."""
    call()
    with OperationCounter() as counter:
        call()
    return counter.working.total(), counter.synchronising.total()


def _is_view(func: Any) -> bool:
    """An output that shares memory with an input which is not written."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def _indexes_by_mask(name: str, args: Any) -> bool:
    """x[mask] and x[mask] = y look for the true places first."""
    if name not in ("index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


class _Fixed(nn.Module):
    """Stands in for a network: returns what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Any) -> Any:
        return self.output


def torchvision_bookkeeping(batch_size: int, device: torch.device) -> Callable[[], None]:
    """Return ssd300_vgg16's training step without its backbone and head."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1).to(device).train()
    logits = torch.randn(batch_size, NUM_ANCHORS, NUM_CLASSES + 1, device=device, requires_grad=True)
    deltas = torch.randn(batch_size, NUM_ANCHORS, 4, device=device, requires_grad=True)
    maps = {str(side): torch.zeros(1, 1, side, side, device=device) for side in FEATURE_SIDES}
    model.backbone = _Fixed(OrderedDict(maps))
    model.head = _Fixed({"cls_logits": logits, "bbox_regression": deltas})
    images, targets = as_torchvision(*synthetic_batch(batch_size, device))
    return lambda: sum(model(images, targets).values()).backward()


def onestage_bookkeeping(batch_size: int, device: torch.device, loss: ClassificationLoss) -> Callable[[], None]:
    """Return SSD300's training step without its network: normalisation, matching, loss, backward to the logits."""
    model = SSD300(NUM_CLASSES, loss, anchors="coco").to(device).train()
    num_logits = loss.num_logits(NUM_CLASSES)
    logits = torch.randn(batch_size, NUM_ANCHORS, num_logits, device=device, requires_grad=True)
    deltas = torch.randn(batch_size, NUM_ANCHORS, 4, device=device, requires_grad=True)
    predictions = Predictions(logits, deltas, model.anchor_grid([(side, side) for side in FEATURE_SIDES]))
    images, targets = synthetic_batch(batch_size, device)
    assert images.shape[-1] == IMAGE_SIZE == model.image_size

    def bookkeeping() -> None:
        model.backbone.normalise(images)
        terms = model.loss(predictions, targets).terms
        (terms["classification"] + terms["box"]).backward()

    return bookkeeping
