#!/usr/bin/env python
"""Draw the figures of docs/focal_loss.md into docs/images, and print the numbers that stand there.

    python scripts/draw_focal_loss.py

Everything is computed by the package's own losses and SSD300, from weights that were never trained.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from onestage.boxes.matchers import IoUMatcher, assign
from onestage.data.scenes import draw_scene
from onestage.losses import ClassificationLoss, MinedCrossEntropy, SigmoidCrossEntropy, SigmoidFocalLoss
from onestage.models import SSD128, SSD300, SSD512
from onestage.types import BACKGROUND, PADDING, Targets

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
NUM_SCENES = 300  # whose anchors are counted
COLOURS = ("#332288", "#4477aa", "#44aa99", "#cc3311", "#ddaa33")


def main() -> None:
    """Draw both figures and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="of the figures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(folder / "focal_loss.png")
    draw_balance(folder / "focal_balance.png")
    print_values()
    print_first_losses()
    print_imbalance()


def cost(loss: ClassificationLoss, p_t: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Return the loss of one sigmoid for each p_t, and the size of its derivative by the logit, both [N]."""
    logits = torch.logit(p_t) if label == 0 else -torch.logit(p_t)
    logits = logits.clone().requires_grad_()
    costs = loss.anchor_losses(logits[None, :, None], torch.full((1, len(p_t)), label))[0]
    (slope,) = torch.autograd.grad(costs.sum(), logits)
    return costs.detach(), slope.abs()


def draw_curves(path: Path) -> None:
    """Draw the loss and its slope against p_t for each gamma; RetinaNet's figure 1, and its derivative."""
    p_t = torch.linspace(0.002, 0.998, 500, dtype=torch.float64)
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for gamma, colour in zip(GAMMAS, COLOURS, strict=True):
        costs, slope = cost(SigmoidFocalLoss(None, gamma), p_t, 0)
        values.plot(p_t, costs, color=colour, label=f"$\\gamma$ = {gamma:g}")
        slopes.plot(p_t, slope, color=colour)
    values.set(xlabel="$p_t$, probability of the truth", ylabel="$-(1-p_t)^\\gamma \\log p_t$", ylim=(0, 5))
    slopes.set(xlabel="$p_t$, probability of the truth", ylabel="size of the gradient by the logit")
    values.legend(frameon=False)
    for axis in (values, slopes):
        axis.axvspan(0.9, 1, color="#eeeeee")
        axis.text(0.895, axis.get_ylim()[1] * 0.94, "easy", ha="right", color="#888888")
    _save(figure, path)


def draw_balance(path: Path) -> None:
    """Draw what 8,700 backgrounds and 10 objects of an image weigh together, as the backgrounds become easy."""
    background_p_t = torch.linspace(0.5, 0.999, 300, dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for gamma, colour in zip(GAMMAS, COLOURS, strict=True):
        loss = SigmoidFocalLoss(0.25, gamma)
        backgrounds, _ = cost(loss, background_p_t, BACKGROUND)
        objects, _ = cost(loss, torch.tensor([0.3], dtype=torch.float64), 0)
        axis.plot(background_p_t, 8700 * backgrounds / (10 * objects), color=colour, label=f"$\\gamma$ = {gamma:g}")
    axis.axhline(1, color="#888888", lw=1)
    axis.text(0.505, 0.7, "as much as the objects", va="top", color="#666666")
    axis.set(
        yscale="log",
        ylim=(1e-4, 1e4),
        xlabel="$p_t$ of the backgrounds",
        ylabel="loss of 8,700 backgrounds\n/ loss of 10 objects",
    )
    axis.legend(frameon=False, ncols=2, loc="lower left")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def print_values() -> None:
    """Print the loss at a few p_t, with and without focus."""
    p_t = torch.tensor([0.1, 0.5, 0.8, 0.9, 0.968], dtype=torch.float64)
    cross_entropy, _ = cost(SigmoidFocalLoss(None, 0.0), p_t, 0)
    focal, _ = cost(SigmoidFocalLoss(None, 2.0), p_t, 0)
    balanced, _ = cost(SigmoidFocalLoss(0.25, 2.0), p_t, 0)
    print("p_t      cross-entropy   gamma 2    ratio    gamma 2, alpha 0.25")
    for row in zip(p_t.tolist(), cross_entropy.tolist(), focal.tolist(), balanced.tolist(), strict=True):
        print(f"{row[0]:<9g}{row[1]:<16.4f}{row[2]:<11.6f}{row[1] / row[2]:<9.0f}{row[3]:.7f}")


def print_first_losses() -> None:
    """Print the first classification loss of SSD300 with 20 classes, three objects an image, by prior."""
    images = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, labels = torch.zeros(2, 16, 4), torch.full((2, 16), PADDING)
    boxes[:, :3] = torch.tensor([[20.0, 30, 120, 160], [150, 140, 290, 260], [200, 20, 240, 70]])
    labels[:, :3] = torch.tensor([3, 7, 11])
    print("first loss / positive anchor     prior 0.01   prior 0.5")
    contestants = {
        "focal": SigmoidFocalLoss(),
        "cross-entropy": SigmoidCrossEntropy(),
        "hard negative mining": MinedCrossEntropy(),
    }
    for name, loss in contestants.items():
        found = []
        for prior in (0.01, 0.5):
            torch.manual_seed(0)
            detector = SSD300(20, loss, prior=prior).eval()
            with torch.no_grad():
                losses = detector.loss(detector(images), Targets(boxes, labels))
                found.append(losses.terms["classification"].item())
        print(f"{name:<33}{found[0]:<13.3f}{found[1]:.1f}")


def print_imbalance() -> None:
    """Print how many background anchors drawn scenes leave for each positive one: by detector, objects and matcher."""
    thresholds = (0.3, 0.5, 0.6)
    print("background / positive    objects   " + "".join(f"IoU {value:<7}" for value in thresholds))
    for detector in (SSD128(6), SSD300(6), SSD512(6)):
        side = detector.image_size
        with torch.no_grad():
            anchors = detector(torch.zeros(1, 3, side, side, dtype=torch.uint8)).anchors
        for num_objects in (12, 3, 1):
            counts = torch.zeros(len(thresholds), 2)
            for scene in (draw_scene(0, index, num_objects) for index in range(NUM_SCENES)):
                height, width = scene.image.shape[:2]
                boxes = torch.from_numpy(scene.boxes) * torch.tensor([side / width, side / height] * 2)
                targets = Targets(boxes[None], torch.from_numpy(scene.labels)[None])
                for row, threshold in enumerate(thresholds):
                    labels, _ = assign(IoUMatcher(threshold, threshold), targets, anchors)
                    counts[row] += torch.stack([(labels == BACKGROUND).sum(), (labels >= 0).sum()])
            ratios = "".join(f"{background / positive:<11.0f}" for background, positive in counts.tolist())
            print(f"{type(detector).__name__}, {len(anchors.boxes):<16,}1 to {num_objects:<5}{ratios}")


if __name__ == "__main__":
    main()
