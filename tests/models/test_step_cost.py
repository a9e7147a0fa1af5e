"""Operations of a step outside convolutions: on a GPU these are kernel launches and waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onestage.losses import AutomatedFocalLoss, MinedCrossEntropy, QualityFocalLoss, SigmoidFocalLoss
from onestage.models import SSD160
from onestage.types import PADDING, Predictions, Targets

WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "is_nonzero"}
WAITING |= {"unique_consecutive", "equal", "repeat_interleave.Tensor", "_to_cpu"}


class OperationCounter(TorchDispatchMode):
    """Counts operations that work on data, without views, and those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.num_waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.names.append(func._schema.name)
        name = func._schema.name.removeprefix("aten::")
        waits = name in WAITING or f"{name}.{func._schema.overload_name}" in WAITING
        if name in ("index", "index_put", "index_put_"):  # with a boolean index
            waits |= any(index is not None and index.dtype == torch.bool for index in args[1])
        self.num_waits += waits
        return func(*args, **(kwargs or {}))


def count(loss, batch_size: int) -> OperationCounter:
    torch.manual_seed(0)
    detector = SSD160(num_classes=3, classification_loss=loss)
    images = torch.randint(0, 256, (batch_size, 3, 160, 160), dtype=torch.uint8)
    low = torch.rand(batch_size, 16, 2) * 100
    labels = torch.where(torch.arange(16) < torch.arange(batch_size)[:, None] % 6, 1, PADDING)
    targets = Targets(torch.cat([low, low + 40], dim=-1) * (labels >= 0)[..., None], labels)
    class_logits = torch.randn(batch_size, 2390, loss.num_logits(3), requires_grad=True)
    box_outputs = torch.randn(batch_size, 2390, 4, requires_grad=True)
    anchors = detector.eval()(images[:1]).anchors
    with OperationCounter() as counter:
        detector.backbone.normalise(images)
        losses = detector.loss(Predictions(class_logits, box_outputs, anchors), targets)
        (losses.terms["classification"] + losses.terms["box"]).backward()
    return counter


@pytest.mark.parametrize(
    ("loss", "max_operations"),
    [
        (SigmoidFocalLoss(), 165),
        (MinedCrossEntropy(), 165),
        (SigmoidFocalLoss(label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0]), 215),  # a second pass, over all anchors
        (AutomatedFocalLoss(), 215),  # follows p_t
        (QualityFocalLoss(), 215),  # decodes the boxes once more
    ],
)
def test_step_outside_convolutions_is_short_and_never_waits(loss, max_operations) -> None:
    small, large = count(loss, batch_size=4), count(loss, batch_size=32)
    assert small.num_waits == large.num_waits == 0
    assert small.names == large.names
    assert 20 < len(small.names) <= max_operations
