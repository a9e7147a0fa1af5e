"""A training step: torchvision's ssd300_vgg16, and SSD300.

Forward, loss, backward and SGD with momentum, all layers trained, 91 logits per anchor, from the same weights. On a GPU
with torch.compile too, and the memory of each step.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16

from benchmarks.timing import compare
from benchmarks.training_data import NUM_CLASSES, as_torchvision, synthetic_batch
from onestage.losses import ClassificationLoss, MinedCrossEntropy, SigmoidFocalLoss
from onestage.models import SSD300
from onestage.training.trainer import choose_precision
from onestage.types import Targets


def run(rounds: int, quick: bool) -> None:
    """Compare at batch size 4, 32 on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, reason = choose_precision(device.type)
    print(f"precision of onestage: {precision}, because {reason}")
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    images, targets = synthetic_batch(1 if quick else 32 if device.type == "cuda" else 4, device)

    torch.manual_seed(0)
    reference = _torchvision_model().to(device)
    ours = _onestage_model(reference, MinedCrossEntropy(), device)
    _assert_same_loss(reference, ours, images, targets)
    focal = SSD300(NUM_CLASSES, SigmoidFocalLoss(), anchors="coco").to(device)
    contestants = {
        "torchvision, as it comes (fp32)": torchvision_step(reference, images, targets, None),
        f"torchvision, {precision}, channels_last": torchvision_step(
            _torchvision_model(), images, targets, dtype, channels_last=True
        ),
        f"onestage, {precision}, mined cross-entropy": onestage_step(ours, images, targets, dtype),
        f"onestage, {precision}, focal loss": onestage_step(focal, images, targets, dtype),
    }
    if device.type == "cuda":
        compiled = SSD300(NUM_CLASSES, SigmoidFocalLoss(), anchors="coco").to(device)
        compiled.compile()
        contestants[f"onestage, {precision}, focal loss, compiled"] = onestage_step(compiled, images, targets, dtype)
        for name, step in contestants.items():
            print(f"{name}: {_peak_memory(step):.2f} GB at most")
    compare(f"training step of SSD300, batch {len(images)}, {device.type}", contestants, rounds)


def _torchvision_model() -> torch.nn.Module:
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1)
    return model.train()


def _onestage_model(reference: torch.nn.Module, loss: ClassificationLoss, device: torch.device) -> SSD300:
    """Return an SSD300 with the weights of torchvision's model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(reference.state_dict(), path)
        return SSD300(NUM_CLASSES, loss, anchors="coco", pretrained=str(path)).to(device).train()


@torch.no_grad()
def _assert_same_loss(reference: torch.nn.Module, ours: SSD300, images: Tensor, targets: Targets) -> None:
    theirs = reference(*as_torchvision(images, targets))
    losses = ours.loss(ours(images), targets)
    for name, other in {"classification": "classification", "box": "bbox_regression"}.items():
        expected, found = theirs[other].item(), losses.terms[name].item()
        print(f"{name} loss in fp32: torchvision {expected:.4f}, onestage {found:.4f}")
        assert abs(found / expected - 1) < 1e-3, f"the {name} losses differ"
    print("asserted: the same losses from the same weights, within 0.1 %")


def torchvision_step(
    model: torch.nn.Module, images: Tensor, targets: Targets, dtype: torch.dtype | None, channels_last: bool = False
) -> Callable[[], None]:
    """Return a step of torchvision's model, in autocast to `dtype` if given."""
    model = model.to(images.device)
    their_images, their_targets = as_torchvision(images, targets)  # its transform batches them, contiguous
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            losses = model(their_images, their_targets)
        _update(optimizer, sum(losses.values()))

    return step


def onestage_step(model: SSD300, images: Tensor, targets: Targets, dtype: torch.dtype | None) -> Callable[[], None]:
    """Return a step as the training loop makes it: channels_last, and `dtype` where one is given."""
    model = model.to(memory_format=torch.channels_last).train()
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            terms = model.loss(model(images), targets).terms
        _update(optimizer, terms["classification"] + terms["box"])

    return step


def _peak_memory(step: Callable[[], None]) -> float:
    """Return what a step adds to the memory of all models, at its peak, in GB (10^9 bytes)."""
    step()  # the optimizer's and the compiler's own
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
