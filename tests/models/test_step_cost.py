"""Counts what a step does outside convolutions, which on a GPU is what it launches and waits for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onestage.losses import (
    AutomatedFocalLoss,
    MinedCrossEntropy,
    OHEMCrossEntropy,
    QualityFocalLoss,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
    VarifocalLoss,
)
from onestage.models import SSD160
from onestage.types import PADDING, Predictions, Targets

SYNCHRONISING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "is_nonzero",
    "equal",
    "repeat_interleave.Tensor",
    "_to_cpu",
}


class OperationCounter(TorchDispatchMode):
    """Counts operations that work on data, views left out, and those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.names.append(func._schema.name)
        self.num_syncs += _waits(func, args)
        return func(*args, **(kwargs or {}))


def _waits(func, args) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if name in SYNCHRONISING or f"{name}.{func._schema.overload_name}" in SYNCHRONISING:
        return True
    if name in ("index", "index_put", "index_put_"):  # with a boolean index
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return False


def count(loss, batch_size: int) -> OperationCounter:
    torch.manual_seed(0)
    detector = SSD160(num_classes=3, classification_loss=loss)
    images = torch.randint(0, 256, (batch_size, 3, 160, 160), dtype=torch.uint8)
    low = torch.rand(batch_size, 16, 2) * 100
    labels = torch.where(torch.arange(16) < torch.arange(batch_size)[:, None] % 6, 1, PADDING)
    targets = Targets(torch.cat([low, low + 40], dim=-1) * (labels >= 0)[..., None], labels)
    class_logits = torch.randn(batch_size, 2390, loss.num_logits(3), requires_grad=True)
    box_deltas = torch.randn(batch_size, 2390, 4, requires_grad=True)
    anchors = detector.eval()(images[:1]).anchors
    with OperationCounter() as counter:
        detector.backbone.normalise(images)
        losses = detector.loss(Predictions(class_logits, box_deltas, anchors), targets).terms
        (losses["classification"] + losses["box"]).backward()
    return counter


@pytest.mark.parametrize(
    ("loss", "most"),
    [
        (SigmoidFocalLoss(), 150),
        (SoftmaxFocalLoss(), 150),
        (MinedCrossEntropy(), 150),
        (OHEMCrossEntropy(), 150),
        (SigmoidFocalLoss(label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0]), 200),  # a second pass, over all anchors
        (AutomatedFocalLoss(), 200),  # follows p_t
        (QualityFocalLoss(), 200),  # decodes the boxes once more
        (VarifocalLoss(), 200),
    ],
)
def test_step_outside_convolutions_is_short_and_never_waits(loss, most) -> None:
    small, large = count(loss, batch_size=4), count(loss, batch_size=32)
    assert small.num_syncs == large.num_syncs == 0
    assert small.names == large.names
    assert 20 < len(small.names) <= most


def test_the_counter_sees_what_makes_the_host_wait() -> None:
    values = torch.arange(6.0)
    for wait in (
        lambda: values.sum().item(),
        lambda: bool(values[0] > 1),
        lambda: values[values > 2],
        lambda: values.nonzero(),
        lambda: torch.where(values > 2),
        lambda: values.masked_select(values > 2),
        lambda: values.unique(),
        lambda: values.__setitem__(values > 2, torch.ones(3)),
    ):
        with OperationCounter() as counter:
            wait()
        assert counter.num_syncs > 0
