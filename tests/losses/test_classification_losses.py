"""What every member of the family keeps to, whatever its formula."""

import math

import pytest
import torch
from loss_references import FAMILY, random_anchors
from torch.testing import assert_close

from onestage.losses import EffectiveNumberWeights, SigmoidFocalLoss, SoftmaxClassificationLoss, SoftmaxFocalLoss
from onestage.types import BACKGROUND, IGNORE

every_loss = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)


def anchors_of(loss, dtype=torch.float32):
    return random_anchors(loss.num_logits(3), num_classes=3, dtype=dtype)


@every_loss
def test_gradient_is_the_derivative(make) -> None:
    loss = make().double().eval()  # eval: the adaptive gamma would move between evaluations
    logits, labels = anchors_of(loss, torch.float64)
    quality = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, quality), logits)


@every_loss
@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_extreme_logits_give_finite_values_and_gradients(make, size) -> None:
    loss = make()
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]).repeat(3, 2)[:, : loss.num_logits(3)]
    logits = (size * signs)[None].requires_grad_()
    labels = torch.tensor([[0] * 4 + [1] * 4 + [BACKGROUND] * 4])
    quality = torch.linspace(0, 1, 12)[None]
    total = loss(logits, labels, quality)
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_also_under_autocast(make, dtype) -> None:
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
def test_ignored_anchors_cost_nothing_and_have_no_gradient(make) -> None:
    loss = make()
    logits, labels = anchors_of(loss)
    loss(logits, labels).backward()
    is_ignored = labels == IGNORE
    assert (loss.anchor_costs(logits, labels)[is_ignored] == 0).all()
    assert (logits.grad[is_ignored] == 0).all()
    assert (logits.grad[labels >= 0] != 0).any()


@every_loss
def test_the_loss_is_the_sum_of_the_anchors(make) -> None:
    loss = make().eval()
    logits, labels = anchors_of(loss)
    costs = loss.anchor_costs(logits, labels)
    assert costs.shape == labels.shape
    assert (costs >= 0).all()
    assert_close(loss(logits, labels), costs.sum())


@every_loss
def test_background_alone_is_finite_and_positive(make) -> None:
    loss = make()
    logits = torch.zeros(2, 8, loss.num_logits(3), requires_grad=True)
    total = loss(logits, torch.full((2, 8), BACKGROUND))
    total.backward()
    assert total > 0
    assert logits.grad.isfinite().all()


@every_loss
def test_a_single_class_works(make) -> None:
    loss = make()
    if loss.class_weights is not None:
        loss.class_weights = None  # three weights were given
    logits = torch.zeros(1, 3, loss.num_logits(1), requires_grad=True)
    loss(logits, torch.tensor([[0, BACKGROUND, IGNORE]])).backward()
    assert logits.grad.isfinite().all()


@every_loss
def test_scores_start_at_the_prior(make) -> None:
    loss = make()
    scores = loss.scores(loss.prior_bias(4, prior=0.02))
    is_softmax = isinstance(loss, SoftmaxClassificationLoss)
    assert_close(scores, torch.full((4,), 0.005 if is_softmax else 0.02))  # a softmax: 0.02 together
    assert loss.num_logits(4) == (5 if is_softmax else 4)


def test_true_probability_of_sigmoids() -> None:
    def logit(p):
        return math.log(p / (1 - p))

    logits = torch.tensor([[[logit(0.7), logit(0.2)], [logit(0.1), logit(0.4)]]])
    found = SigmoidFocalLoss().true_probability(logits, torch.tensor([[1, BACKGROUND]]))
    assert_close(found, torch.tensor([[0.2, 0.6]]))  # background: 1 - 0.4, the most wrongly believed


def test_true_probability_of_a_softmax() -> None:
    logits = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]]]).log()
    found = SoftmaxFocalLoss().true_probability(logits, torch.tensor([[1, BACKGROUND]]))
    assert_close(found, torch.tensor([[0.2, 0.4]]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [FAMILY["focal"], FAMILY["softmax focal"], FAMILY["mining"]])
def test_compiled_loss_has_the_same_value_and_gradient(make) -> None:
    loss = make()
    logits, labels = anchors_of(loss)
    compiled = torch.compile(loss, fullgraph=True)(logits, labels)
    expected = loss(logits, labels)
    assert_close(compiled, expected)
    assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(expected, logits))


@every_loss
def test_every_loss_is_traced_whole_for_a_compiler_with_the_same_value_and_gradient(make) -> None:
    loss, other = make(), make()  # two, as the adaptive gamma follows what it is shown
    logits, labels = anchors_of(loss)
    quality = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, labels, quality)
    expected = other(logits, labels, quality)
    assert_close(traced, expected)
    assert_close(torch.autograd.grad(traced, logits), torch.autograd.grad(expected, logits))


@every_loss
def test_second_derivatives_which_nobody_wrote_down_are_refused(make) -> None:
    loss = make().double().eval()
    logits, labels = anchors_of(loss, torch.float64)
    with pytest.raises(RuntimeError, match="can be differentiated once only; leave out create_graph=True"):
        torch.autograd.grad(loss(logits, labels), logits, create_graph=True)


def test_weights_found_in_the_training_set_are_a_part_of_the_module() -> None:
    loss = SigmoidFocalLoss(class_weights=EffectiveNumberWeights())
    assert isinstance(loss.get_submodule("class_weights"), EffectiveNumberWeights)
