import math

import torch
from torch.testing import assert_close

from onestage.boxes.coders import GridBoxCoder
from onestage.losses import GridBoxLoss, ObjectSoftmaxLoss, SquaredGridBoxLoss
from onestage.types import BACKGROUND, Anchors

ANCHORS = Anchors(torch.tensor([[16.0, 16.0, 10.0, 20.0]] * 2), torch.tensor([32.0] * 2), (2,))


def test_grid_box_losses_equal_hand_computed_values_and_skip_other_anchors() -> None:
    gt_boxes = torch.tensor([[[3.0, 6.0, 13.0, 26.0], [0.0, 0.0, 0.0, 0.0]]])  # centre (8, 16): sigmoids 1/4, 1/2
    outputs = torch.tensor([[[0.0, 0.0, 0.2, -0.4], [5.0, 5.0, 5.0, 5.0]]], requires_grad=True)
    is_positive = torch.tensor([[True, False]])
    sizes = (0.2**2 + 0.4**2) / 2
    found = GridBoxLoss().per_anchor_loss(outputs, gt_boxes, ANCHORS, GridBoxCoder(), is_positive)
    assert_close(found, torch.tensor([[2 * math.log(2) + sizes, 0.0]]))
    found = SquaredGridBoxLoss()(outputs, gt_boxes, ANCHORS, GridBoxCoder(), is_positive)
    assert_close(found, torch.tensor(0.25**2 / 2 + sizes))
    found.backward()
    assert (outputs.grad[0, 1] == 0).all()


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
