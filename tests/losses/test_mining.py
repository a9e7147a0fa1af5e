import torch
import torch.nn.functional as F
from torch.testing import assert_close

from onestage.losses import MinedCrossEntropy, OHEMCrossEntropy
from onestage.types import BACKGROUND, IGNORE


def two_logits(x: torch.Tensor) -> torch.Tensor:
    """One class: logits (object, background = 0), so a background anchor has loss log(1 + e^x)."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1)


def softplus(*values: float) -> torch.Tensor:
    return F.softplus(torch.tensor(values)).sum()


def test_images_without_objects_have_min_negatives() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]])
    labels = torch.full((1, 3), BACKGROUND)
    assert MinedCrossEntropy(min_negatives=0)(two_logits(x), labels) == 0
    assert_close(MinedCrossEntropy(min_negatives=1)(two_logits(x), labels), softplus(3.0))
    assert_close(MinedCrossEntropy(min_negatives=9)(two_logits(x), labels), softplus(3.0, 1, 2))


def test_mined_cross_entropy_of_equal_negatives_takes_the_first() -> None:
    logits = torch.zeros(1, 5, 2, requires_grad=True)
    MinedCrossEntropy(2, min_negatives=2)(logits, torch.tensor([[BACKGROUND] * 5])).backward()
    assert logits.grad[0, :, 0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_mined_cross_entropy_equals_torchvision_where_images_have_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 5, generator=generator)  # 4 classes, background last
    is_object = torch.rand(3, 50, generator=generator) < 0.1
    labels = torch.where(is_object, torch.randint(0, 4, (3, 50), generator=generator), BACKGROUND)
    labels[:, 0] = 2
    theirs = torch.cat([logits[..., -1:], logits[..., :-1]], dim=-1)  # torchvision has the background first
    losses = F.cross_entropy(theirs.flatten(0, 1), (labels + 1).flatten(), reduction="none").view(3, 50)
    expected = torch.tensor(0.0)
    for image in range(3):
        positive = labels[image] >= 0
        hardest = losses[image][~positive].sort(descending=True).values[: 3 * int(positive.sum())]
        expected = expected + losses[image][positive].sum() + hardest.sum()
    assert_close(MinedCrossEntropy()(logits, labels), expected)


def test_ohem_takes_the_hardest_positives_and_negatives_of_each_image() -> None:
    x = torch.tensor([[-4.0, 1.0, 2.0, 9.0], [4.0, 1.0, 2.0, 0.0]])
    labels = torch.tensor([[0, BACKGROUND, BACKGROUND, IGNORE], [0, BACKGROUND, BACKGROUND, BACKGROUND]])
    # Image 0: the missed object, log(1 + e^4), then the background at 2. Image 1: its object, log(1 + e^-4), is
    # easier than the backgrounds at 2 and 1.
    expected = softplus(4.0, 2) + softplus(2.0, 1)
    assert_close(OHEMCrossEntropy(anchors_per_image=2)(two_logits(x), labels), expected)
