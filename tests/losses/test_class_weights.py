import pytest
import torch
from annotation_sets import random_anchors
from torch.testing import assert_close

from onestage.errors import ConfigError
from onestage.losses import ClassWeights, EffectiveNumberWeights, MinedCrossEntropy, SigmoidFocalLoss, SoftmaxFocalLoss
from onestage.types import BACKGROUND


@pytest.mark.parametrize("loss", [SigmoidFocalLoss, SoftmaxFocalLoss, MinedCrossEntropy])
def test_weights_apply_to_sigmoid_softmax_and_mined_losses(loss) -> None:
    logits, labels = random_anchors(3, num_classes=2)
    plain, weighted = loss(), loss(class_weights=[2.0, 2.0])
    expected = plain.anchor_losses(logits, labels) * torch.where(labels >= 0, 2.0, 1.0)
    assert_close(weighted.anchor_losses(logits, labels), expected)


def test_effective_number_is_hand_computed_and_a_class_without_objects_weighs_as_one_with_one() -> None:
    # beta 0.5: 1 object weighs 0.5 / 0.5 = 1, 2 objects weigh 0.5 / 0.75 = 2/3 each.
    # The mean over the three objects is (1 + 2 * 2/3) / 3 = 7/9, which becomes 1: 9/7 and 6/7.
    weights = EffectiveNumberWeights(beta=0.5)
    weights.set_class_counts(torch.tensor([1, 2]))
    assert_close(weights(torch.tensor([[0, 1, BACKGROUND]])), torch.tensor([[9 / 7, 6 / 7, 1.0]]))
    weights = EffectiveNumberWeights()
    weights.set_class_counts(torch.tensor([50, 0, 1]))
    assert weights.values.isfinite().all()
    assert weights.values[1] == weights.values[2]
    weights.set_class_counts(torch.tensor([0, 0]))
    assert weights.values.isfinite().all()


def test_weights_are_1_before_counts_and_restored_from_a_checkpoint() -> None:
    loss, other = (SigmoidFocalLoss(class_weights=EffectiveNumberWeights()) for _ in range(2))
    labels = torch.tensor([[0, 1]])
    assert other.class_weights(labels).tolist() == [[1, 1]]
    loss.class_weights.set_class_counts(torch.tensor([10, 1000]))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.class_weights(labels), loss.class_weights(labels))


@pytest.mark.parametrize("number", [2, 3])
def test_weights_of_this_run_are_kept_when_a_checkpoint_is_loaded(number) -> None:
    by_hand, counted = ClassWeights([2.0, 3.0]), EffectiveNumberWeights()
    counted.set_class_counts(torch.tensor([10, 1000]))
    for weights in (by_hand, counted):
        values, saved = weights.values.clone(), {"values": torch.ones(number)}
        if number == 2:
            weights.load_state_dict(saved)
        else:
            with pytest.raises(RuntimeError, match="size mismatch for values"):
                weights.load_state_dict(saved)
        assert torch.equal(weights.values, values)
        assert (saved["values"] == 1).all()
        with pytest.raises(RuntimeError, match="Missing key"):
            weights.load_state_dict({})


def test_number_of_weights_must_be_the_number_of_classes() -> None:
    with pytest.raises(ConfigError, match=r"class_weights must be 3 numbers, .* got \[1\.0, 2\.0\]"):
        ClassWeights([1.0, 2.0]).set_class_counts(torch.tensor([1, 2, 3]))
