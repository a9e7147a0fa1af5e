import pytest
import torch
from torch.testing import assert_close
from torchvision.models import vgg16

from onestage.models.vgg import VGG, L2Norm


def test_l2_norm_scales_each_cell_to_length_20() -> None:
    features = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert_close(L2Norm(2)(features).flatten(), torch.tensor([12.0, 16.0]))  # 20 * 3/5, 20 * 4/5


def test_l2_norm_of_no_activity_is_zero() -> None:
    assert (L2Norm(2)(torch.zeros(1, 2, 1, 1)) == 0).all()


def test_l2_norm_of_float16_does_not_overflow() -> None:
    features = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    normalised = L2Norm(4)(features)
    assert normalised.dtype == torch.float16
    assert_close(normalised.flatten(), torch.full((4,), 10.0, dtype=torch.float16))  # 20 / sqrt(4)


@pytest.mark.parametrize(("image_size", "conv4_side", "fc7_side"), [(300, 38, 19), (512, 64, 32), (160, 20, 10)])
def test_maps_have_the_published_sizes(image_size, conv4_side, fc7_side) -> None:
    with torch.device("meta"):
        conv4, fc7 = VGG()(torch.zeros(1, 3, image_size, image_size))
    assert conv4.shape == (1, 512, conv4_side, conv4_side)
    assert fc7.shape == (1, 1024, fc7_side, fc7_side)


def test_convolutions_are_those_of_vgg16() -> None:
    with torch.device("meta"):
        ours, theirs = VGG(), vgg16()
    shapes = [tuple(p.shape) for p in ours.parameters()]
    expected = [tuple(p.shape) for p in theirs.features.parameters()]
    # ... then fc6, fc7 and the scale of conv4_3, last, because it is a module after the two sequences.
    assert shapes[:26] == expected
    assert shapes[26:] == [(1024, 512, 3, 3), (1024,), (1024, 1024, 1, 1), (1024,), (512,)]


def test_batch_norm_replaces_the_biases() -> None:
    narrow = VGG(depths=(1, 1, 1, 1, 1), widths=(2, 2, 2, 2, 2), fc_width=4, batch_norm=True)
    assert narrow.to_conv4.conv1_1.bias is None
    assert narrow.to_conv4.conv1_1_bn.num_features == 2
    assert narrow.out_channels == (2, 4)
