"""Promises of every classification loss, whatever its formula."""

import pytest
import torch
from loss_references import FAMILY, random_anchors
from torch.testing import assert_close

from onestage.losses import SigmoidFocalLoss, SoftmaxClassificationLoss, SoftmaxFocalLoss
from onestage.types import BACKGROUND, IGNORE

every_loss = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


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
    is_softmax = isinstance(loss, SoftmaxClassificationLoss)
    assert_close(scores, torch.full((4,), 0.005 if is_softmax else 0.02))  # softmax: 0.02 for all classes together
    assert loss.num_logits(4) == (5 if is_softmax else 4)


@pytest.mark.parametrize(
    ("loss", "logits", "expected"),
    [  # background of sigmoids: 1 - 0.4, the highest score
        (SigmoidFocalLoss(), torch.tensor([[[0.7, 0.2], [0.1, 0.4]]]).logit(), [[0.2, 0.6]]),
        (SoftmaxFocalLoss(), torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]]]).log(), [[0.2, 0.4]]),
    ],
)
def test_true_probability_is_hand_computed(loss, logits, expected) -> None:
    assert_close(loss.true_probability(logits, torch.tensor([[1, BACKGROUND]])), torch.tensor(expected))


COMPILED = [
    pytest.param(make, "aot_eager", id=name, marks=[] if name == "focal" else pytest.mark.slow)
    for name, make in FAMILY.items()
] + [
    pytest.param(FAMILY[name], "inductor", id=f"{name}, inductor", marks=pytest.mark.slow)
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
