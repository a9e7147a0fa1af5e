"""Every classification loss: its formula, and the promises that hold whatever the formula."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from annotation_sets import random_anchors
from torch import Tensor
from torch.testing import assert_close

from onestage import losses
from onestage.types import BACKGROUND, IGNORE

QUALITY, WEIGHTS = 0.75, [0.5, 2.0, 1.0]


def focal(margin: Tensor, gamma: float) -> Tensor:
    """The margin is the logit of an answer minus that of all others together: p = sigmoid(margin)."""
    return torch.sigmoid(-margin) ** gamma * F.softplus(-margin, threshold=50)


def sigmoids(alpha: float | None, gamma: float, smoothing: float = 0.0, weights: Sequence[float] = (1, 1, 1)):
    def anchor_loss(x: Tensor, label: int) -> Tensor:
        as_positive = focal(x, gamma) * (1 if alpha is None else alpha)
        as_negative = focal(-x, gamma) * (1 if alpha is None else 1 - alpha)
        if label == BACKGROUND:
            return as_negative.sum()
        targets = torch.full_like(x, smoothing / 2)
        targets[label] = 1 - smoothing / 2
        return weights[label] * (targets * as_positive + (1 - targets) * as_negative).sum()

    return anchor_loss


def softmax(alpha: float | None, gamma: float, smoothing: float = 0.0):
    def anchor_loss(x: Tensor, label: int) -> Tensor:
        others = torch.stack([torch.cat([x[:column], x[column + 1 :]]).logsumexp(0) for column in range(len(x))])
        answers = focal(x - others, gamma)
        if label == BACKGROUND:
            return answers[-1] * (1 if alpha is None else 1 - alpha)
        smoothed = (1 - smoothing) * answers[label] + smoothing * answers.mean()
        return smoothed * (1 if alpha is None else alpha)

    return anchor_loss


def quality_focal(x: Tensor, label: int) -> Tensor:
    terms = focal(-x, 2.0)
    if label >= 0:
        distance = (QUALITY - torch.sigmoid(x[label])).abs()
        cross_entropy = F.softplus(x[label], threshold=50) - QUALITY * x[label]
        terms = torch.cat([terms[:label], terms[label + 1 :], (distance**2 * cross_entropy)[None]])
    return terms.sum()


def varifocal(x: Tensor, label: int) -> Tensor:
    terms = 0.75 * focal(-x, 2.0)
    if label >= 0:
        found = QUALITY * (F.softplus(x[label], threshold=50) - QUALITY * x[label])
        terms = torch.cat([terms[:label], terms[label + 1 :], found[None]])
    return terms.sum()


FAMILY = {  # name -> loss, formula
    "focal": (losses.SigmoidFocalLoss, sigmoids(0.25, 2.0)),
    "focal, gamma 0.5": (lambda: losses.SigmoidFocalLoss(None, 0.5), sigmoids(None, 0.5)),
    "focal, smoothed": (lambda: losses.SigmoidFocalLoss(label_smoothing=0.1), sigmoids(0.25, 2.0, 0.1)),
    "focal, weighted": (lambda: losses.SigmoidFocalLoss(class_weights=WEIGHTS), sigmoids(0.25, 2.0, 0.0, WEIGHTS)),
    "softmax focal": (losses.SoftmaxFocalLoss, softmax(0.25, 2.0)),
    "softmax focal, gamma 0.5": (lambda: losses.SoftmaxFocalLoss(None, 0.5), softmax(None, 0.5)),
    "softmax focal, smoothed": (lambda: losses.SoftmaxFocalLoss(None, 0.5, 0.1), softmax(None, 0.5, 0.1)),
    "cross-entropy": (losses.SigmoidCrossEntropy, sigmoids(None, 0.0)),
    "balanced": (lambda: losses.SigmoidCrossEntropy(0.25), sigmoids(0.25, 0.0)),
    "softmax cross-entropy": (lambda: losses.SoftmaxCrossEntropy(label_smoothing=0.1), softmax(None, 0.0, 0.1)),
    "mining": (losses.MinedCrossEntropy, softmax(None, 0.0)),  # all anchors are mined
    "OHEM": (lambda: losses.OHEMCrossEntropy(8), softmax(None, 0.0)),  # all are among the eight hardest
    "adaptive": (losses.AutomatedFocalLoss, sigmoids(0.25, 2.0)),  # before the first positive anchor
    "quality": (losses.QualityFocalLoss, quality_focal),
    "varifocal": (losses.VarifocalLoss, varifocal),
}
every_loss = pytest.mark.parametrize("make", [make for make, _ in FAMILY.values()], ids=FAMILY)


@pytest.mark.parametrize("size", [100.0, 30.0, 0.7])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_equal_the_formula_in_float64(name, size) -> None:
    """Also where sigmoids round to 0 or 1 in float32."""
    make, formula = FAMILY[name]
    loss = make().eval()
    signs = torch.tensor([[1.0, -1, -1, -1], [-1, 1, -1, 1], [1, 1, -1, -1], [-1, -1, -1, 1]]).repeat(2, 1)
    signs = signs[:, : loss.num_logits(3)]
    labels = torch.tensor([[0, 0, 2, 1, BACKGROUND, 1, 2, BACKGROUND]])
    # Shifted by column, so that no two logits of a softmax are equal.
    logits = (size * signs + torch.arange(signs.shape[1])).float()[None].requires_grad_()
    found = loss.anchor_losses(logits, labels, torch.full(labels.shape, QUALITY))
    (gradient,) = torch.autograd.grad(found.sum(), logits)

    exact = logits.detach().double().requires_grad_()
    expected = torch.stack([formula(exact[0, row], int(labels[0, row])) for row in range(labels.shape[1])])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert expected.max() > 0.05 * size
    assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def anchors_of(loss, dtype=torch.float32):
    return random_anchors(loss.num_logits(3), num_classes=3, dtype=dtype)


@every_loss
def test_extreme_logits_give_finite_loss_and_gradient(make) -> None:
    loss = make()
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]).repeat(3, 2)[:, : loss.num_logits(3)]
    logits = (10_000 * signs)[None].requires_grad_()
    labels = torch.tensor([[0] * 4 + [1] * 4 + [BACKGROUND] * 4])
    quality = torch.linspace(0, 1, 12)[None]
    total = loss(logits, labels, quality)
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_under_autocast(make, dtype) -> None:
    loss = make().eval()
    logits, labels = anchors_of(loss)
    rounded = logits.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        total, scores = loss(rounded, labels), loss.scores(rounded)
    total.backward()
    assert total.dtype == scores.dtype == torch.float32
    assert_close(total, loss(rounded.float(), labels))
    assert rounded.grad.dtype == dtype
    assert rounded.grad.isfinite().all()


@every_loss
def test_ignored_anchors_have_zero_loss_and_gradient(make) -> None:
    loss = make()
    logits, labels = anchors_of(loss)
    loss(logits, labels).backward()
    is_ignored = labels == IGNORE
    assert (loss.anchor_losses(logits, labels)[is_ignored] == 0).all()
    assert (logits.grad[is_ignored] == 0).all()
    assert (logits.grad[labels >= 0] != 0).any()


@every_loss
@pytest.mark.parametrize("labels", [[[BACKGROUND] * 8] * 2, [[0, BACKGROUND, IGNORE]]], ids=["background", "one class"])
def test_images_without_objects_and_a_single_class_give_finite_gradients(make, labels) -> None:
    loss = make()
    loss.class_weights = None  # three weights were given
    labels = torch.tensor(labels)
    logits = torch.zeros(*labels.shape, loss.num_logits(1), requires_grad=True)
    total = loss(logits, labels)
    total.backward()
    assert total > 0
    assert logits.grad.isfinite().all()


@every_loss
def test_untrained_scores_are_the_prior(make) -> None:
    loss = make()
    scores = loss.scores(loss.prior_bias(4, prior=0.02))
    is_softmax = isinstance(loss, losses.SoftmaxClassificationLoss)
    assert_close(scores, torch.full((4,), 0.005 if is_softmax else 0.02))  # softmax: 0.02 for all classes together
    assert loss.num_logits(4) == (5 if is_softmax else 4)


@pytest.mark.parametrize(
    ("loss", "logits", "expected"),
    [  # background of sigmoids: 1 - 0.4, the highest score
        (losses.SigmoidFocalLoss(), torch.tensor([[[0.7, 0.2], [0.1, 0.4]]]).logit(), [[0.2, 0.6]]),
        (losses.SoftmaxFocalLoss(), torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]]]).log(), [[0.2, 0.4]]),
    ],
)
def test_true_probability_is_hand_computed(loss, logits, expected) -> None:
    assert_close(loss.true_probability(logits, torch.tensor([[1, BACKGROUND]])), torch.tensor(expected))


COMPILED = [
    pytest.param(make, "aot_eager", id=name, marks=[] if name == "focal" else pytest.mark.slow)
    for name, (make, _) in FAMILY.items()
] + [
    pytest.param(FAMILY[name][0], "inductor", id=f"{name}, inductor", marks=pytest.mark.slow)
    for name in ("focal", "softmax focal", "mining")
]


@pytest.mark.parametrize(("make", "backend"), COMPILED)
def test_compiled_loss_is_one_graph_with_equal_value_and_gradient(make, backend) -> None:
    loss, reference = make(), make()  # two, because the adaptive gamma changes with every call
    logits, labels = anchors_of(loss)
    quality = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)(logits, labels, quality)
    expected = reference(logits, labels, quality)
    assert_close(compiled, expected)
    assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(expected, logits))


def test_object_softmax_has_no_background() -> None:
    loss, logits = losses.ObjectSoftmaxLoss(), torch.tensor([[[0.0, math.log(3)], [4.0, 0.0]]])
    assert loss.num_logits(2) == len(loss.prior_bias(2, 0.01)) == 2
    assert_close(loss.scores(logits)[0, 0], torch.tensor([0.25, 0.75]))
    labels = torch.tensor([[1, BACKGROUND]])
    assert_close(loss.anchor_losses(logits, labels), torch.tensor([[-math.log(0.75), 0.0]]))
    assert_close(loss.true_probability(logits, labels)[0, 0], torch.tensor(0.75))


def test_focal_object_softmax_has_the_gradient_of_darknets_focal_loss() -> None:
    logits = torch.tensor([[[0.3, -1.2, 2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    label, alpha = 1, 0.5
    losses.ObjectSoftmaxLoss(alpha=alpha, gamma=2.0)(logits, torch.tensor([[label]])).backward()
    p = logits.detach().softmax(dim=-1)[0, 0].tolist()
    scale = -(1 - p[label]) * (2 * p[label] * math.log(p[label]) + p[label] - 1)
    deltas = [((n == label) - p[n]) * alpha * scale for n in range(4)]  # darknet: the negative gradient
    assert_close(-logits.grad[0, 0], torch.tensor(deltas, dtype=torch.float64))
