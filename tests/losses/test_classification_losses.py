import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from onestage.errors import ConfigError
from onestage.losses import MinedCrossEntropy, SigmoidFocalLoss
from onestage.types import BACKGROUND, IGNORE


def random_anchors(num_classes: int = 3, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 20, num_classes, generator=generator, dtype=dtype) * 3
    labels = torch.randint(-2, num_classes, (2, 20), generator=generator)
    assert {BACKGROUND, IGNORE, 0} <= set(labels.flatten().tolist())
    return logits.requires_grad_(), labels


def one_hot(labels, logits):
    targets = torch.zeros_like(logits)
    for image, anchor in (labels >= 0).nonzero().tolist():
        targets[image, anchor, labels[image, anchor]] = 1
    return targets


def test_focal_loss_at_even_odds() -> None:
    logits = torch.zeros(1, 1, 1)
    loss = SigmoidFocalLoss(alpha=0.25, gamma=2.0)
    # p = 1/2: alpha_t * (1/2)^2 * ln 2, alpha_t = 1/4 for a positive and 3/4 for a negative
    assert_close(loss(logits, torch.tensor([[0]])), torch.tensor(0.0625 * math.log(2)))
    assert_close(loss(logits, torch.tensor([[BACKGROUND]])), torch.tensor(0.1875 * math.log(2)))
    assert loss(logits, torch.tensor([[IGNORE]])) == 0


def test_focal_loss_counts_the_other_classes_of_a_positive_as_negatives() -> None:
    loss = SigmoidFocalLoss(alpha=0.25, gamma=2.0)(torch.zeros(1, 1, 4), torch.tensor([[2]]))
    assert_close(loss, torch.tensor((0.0625 + 3 * 0.1875) * math.log(2)))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, None])
def test_focal_loss_and_gradient_equal_torchvision(alpha, gamma) -> None:
    logits, labels = random_anchors()
    loss = SigmoidFocalLoss(alpha, gamma)(logits, labels)
    (gradient,) = torch.autograd.grad(3 * loss, logits)

    terms = sigmoid_focal_loss(logits, one_hot(labels, logits), alpha=-1 if alpha is None else alpha, gamma=gamma)
    expected = terms[labels != IGNORE].sum()
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient_is_the_derivative(gamma) -> None:
    logits, labels = random_anchors(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: SigmoidFocalLoss(0.25, gamma)(x, labels), logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("logit", [100.0, -100.0])
def test_focal_loss_at_extreme_logits_is_finite_and_right(logit, gamma) -> None:
    logits = torch.full((1, 2, 2), logit, requires_grad=True)
    loss = SigmoidFocalLoss(0.25, gamma)(logits, torch.tensor([[0, BACKGROUND]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    # A sigmoid that is wrong by x = 100 costs x with slope 1 times its weight, one that is right costs nothing.
    negative, positive = (75.0, 0.0) if logit > 0 else (0.0, 25.0)
    assert_close(loss, torch.tensor(positive + 3 * negative))
    assert_close(gradient, torch.tensor([[[-positive, negative], [negative, negative]]]) / 100)


def test_focal_loss_starts_where_the_prior_says() -> None:
    loss = SigmoidFocalLoss(alpha=0.25, gamma=2.0)
    bias = loss.prior_bias(20, prior=0.01)
    assert_close(loss.scores(bias), torch.full((20,), 0.01))
    total = loss(bias.expand(1, 1000, 20), torch.full((1, 1000), BACKGROUND))
    assert_close(total, torch.tensor(1000 * 20 * 0.75 * 0.01**2 * -math.log(0.99)), atol=0, rtol=1e-3)


def test_mined_cross_entropy_takes_the_hardest_negatives_of_each_image() -> None:
    # One class; the logits are (object, background = 0), so that a background anchor costs log(1 + e^x).
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    logits = torch.stack([x, torch.zeros_like(x)], dim=-1)
    labels = torch.tensor([[0, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND, IGNORE], [BACKGROUND] * 6])
    # Image 0: its positive, and of 1, 2, 3, 4 the hardest two (5 is ignored). Image 1: as many as for one positive.
    expected = math.log(2) + sum(math.log1p(math.exp(hard)) for hard in (4, 3, 5, 4))
    assert_close(MinedCrossEntropy(2, min_negatives=2)(logits, labels), torch.tensor(expected))


def test_mined_cross_entropy_takes_no_more_negatives_than_there_are() -> None:
    logits = torch.zeros(1, 3, 2)
    labels = torch.tensor([[0, BACKGROUND, IGNORE]])
    assert_close(MinedCrossEntropy(3)(logits, labels), torch.tensor(2 * math.log(2)))


def test_mined_cross_entropy_of_equal_negatives_takes_the_first() -> None:
    logits = torch.zeros(1, 5, 2, requires_grad=True)
    MinedCrossEntropy(2, min_negatives=2)(logits, torch.tensor([[BACKGROUND] * 5])).backward()
    assert logits.grad[0, :, 0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_mined_cross_entropy_equals_torchvision_where_images_have_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 5, generator=generator)  # 4 classes, background last
    labels = torch.where(torch.rand(3, 50, generator=generator) < 0.1, torch.randint(0, 4, (3, 50)), BACKGROUND)
    labels[:, 0] = 2
    theirs = torch.cat([logits[..., -1:], logits[..., :-1]], dim=-1)  # torchvision has the background first
    costs = F.cross_entropy(theirs.flatten(0, 1), (labels + 1).flatten(), reduction="none").view(3, 50)
    expected = torch.tensor(0.0)
    for image in range(3):
        positive = labels[image] >= 0
        hardest = costs[image][~positive].sort(descending=True).values[: 3 * int(positive.sum())]
        expected = expected + costs[image][positive].sum() + hardest.sum()
    assert_close(MinedCrossEntropy()(logits, labels), expected)


def test_mined_cross_entropy_at_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[[100.0, -100.0], [-100.0, 100.0], [100.0, -100.0]]], requires_grad=True)
    loss = MinedCrossEntropy()(logits, torch.tensor([[0, 0, BACKGROUND]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(loss, torch.tensor(400.0))
    assert gradient.tolist() == [[[0, 0], [-1, 1], [1, -1]]]


def test_softmax_scores_leave_the_background_out_and_start_at_the_prior() -> None:
    loss = MinedCrossEntropy()
    assert loss.num_logits(4) == 5
    assert_close(loss.scores(loss.prior_bias(4, prior=0.02)), torch.full((4,), 0.005))  # together 0.02


def test_sigmoid_needs_one_logit_for_each_class() -> None:
    assert SigmoidFocalLoss().num_logits(4) == 4


@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), MinedCrossEntropy()])
def test_losses_under_autocast_compute_in_float32(loss) -> None:
    logits, labels = random_anchors(num_classes=loss.num_logits(3))
    labels = labels.clamp(max=2)
    rounded = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(rounded, labels)
        scores = loss.scores(rounded)
    assert total.dtype == scores.dtype == torch.float32
    assert_close(total, loss(rounded.float(), labels))


@pytest.mark.parametrize("loss", [SigmoidFocalLoss(), MinedCrossEntropy()])
def test_losses_of_background_alone_are_finite_and_positive(loss) -> None:
    logits = torch.zeros(2, 8, loss.num_logits(1), requires_grad=True)
    total = loss(logits, torch.full((2, 8), BACKGROUND))
    total.backward()
    assert total > 0
    assert logits.grad.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha is 1\.5"):
        SigmoidFocalLoss(alpha=1.5)
    with pytest.raises(ConfigError, match=r"gamma is -1\.0"):
        SigmoidFocalLoss(gamma=-1.0)
    with pytest.raises(ConfigError, match="negatives_per_positive is 0"):
        MinedCrossEntropy(negatives_per_positive=0)
