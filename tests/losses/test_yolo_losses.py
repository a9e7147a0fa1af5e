import math

import torch
from torch.testing import assert_close

from onestage.losses import ObjectSoftmaxLoss
from onestage.types import BACKGROUND


def test_object_softmax_has_no_background() -> None:
    loss, logits = ObjectSoftmaxLoss(), torch.tensor([[[0.0, math.log(3)], [4.0, 0.0]]])
    assert loss.num_logits(2) == len(loss.prior_bias(2, 0.01)) == 2
    assert_close(loss.scores(logits)[0, 0], torch.tensor([0.25, 0.75]))
    labels = torch.tensor([[1, BACKGROUND]])
    assert_close(loss.anchor_losses(logits, labels), torch.tensor([[-math.log(0.75), 0.0]]))
    assert_close(loss.true_probability(logits, labels)[0, 0], torch.tensor(0.75))


def test_focal_object_softmax_has_the_gradient_of_darknets_focal_loss() -> None:
    logits = torch.tensor([[[0.3, -1.2, 2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    label, alpha = 1, 0.5
    ObjectSoftmaxLoss(alpha=alpha, gamma=2.0)(logits, torch.tensor([[label]])).backward()
    p = logits.detach().softmax(dim=-1)[0, 0].tolist()
    scale = -(1 - p[label]) * (2 * p[label] * math.log(p[label]) + p[label] - 1)
    deltas = [((n == label) - p[n]) * alpha * scale for n in range(4)]  # darknet: the negative gradient
    assert_close(-logits.grad[0, 0], torch.tensor(deltas, dtype=torch.float64))
